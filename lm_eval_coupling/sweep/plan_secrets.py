"""Secrets of a plan: recognized by name or form, kept out of all files, passed by environment."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_NAME = re.compile(
    r"(?:^|_)(?:auth_?token|access_?token|token|pat|secret|password|passwd|pwd"
    r"|credentials?|api_?key|access_?key(?:_id)?|secret_?key|private_?key|auth)$",
    re.IGNORECASE,
)
# Names of special tokens of a vocabulary, which end in `token` as well.
_NO_SECRET = re.compile(r"(?:^|_)(?:bos|eos|pad|unk|sep|cls|mask|input|output|stop)_token$", re.I)
_FORM = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[A-Z0-9]{16}|wandb_v1_\w{16,}"
)
_IN_ADDRESS = re.compile(r"://[^/\s:@]*:([^/\s@]+)@")  # the password in user:password@host
HIDDEN = "[secret]"


def secret_in(name: str, value: Any) -> str | None:
    """Return the secret that a named value is or contains, or None."""
    if not isinstance(value, str) or not value.strip():
        return None
    if _NAME.search(name) and not _NO_SECRET.search(name) and not _is_switch(value):
        return value.strip()
    if match := _FORM.search(value):
        return match[0]
    if match := _IN_ADDRESS.search(value):
        return match[1]
    return None


def secrets_in(content: Any, name: str = "") -> Iterator[str]:
    """Yield every secret in nested mappings and lists, also in texts such as ``a=1,token=x``."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from secrets_in(value, str(key))
    elif isinstance(content, list):
        for value in content:
            yield from secrets_in(value, name)
    elif secret := secret_in(name, content):
        yield secret
    elif isinstance(content, str):
        for key, value in re.findall(r"([\w-]+)\s*[=:]\s*([^\s,;&\"']+)", content):
            if secret := secret_in(key.replace("-", "_"), value):
                yield secret


def hide(text: str, secrets: Iterable[str]) -> str:
    """Replace every secret in a text, the longest first."""
    for secret in sorted({s for s in secrets if len(s) > 3}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def _is_switch(value: str) -> bool:
    return value.strip().lower() in ("true", "false", "yes", "no", "none", "null", "0", "1")
