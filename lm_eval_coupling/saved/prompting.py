"""What makes a task's prompts, in words: runs that differ in it measured other prompts, whatever their model and task."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

UNKNOWN = "unknown prompts"  # of a table whose results are not there
_TEXTS = ("description", "doc_to_text", "gen_prefix", "fewshot_delimiter")  # of the task's configuration
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # a function has another one in every process


def prompting(results: Mapping[str, Any], tasks: Sequence[str], settings: Mapping[str, Any]) -> str:
    """How the prompts of a task, or of the tasks of a group, were made and where they were measured.

    Args:
        results: what lm-eval wrote.
        tasks: single tasks.
        settings: of the coupling that was measured, or nothing.

    Returns:
        Parts such as ``5-shot, chat template 1f0c22ab, one turn, system instruction 77aa01de, task text 9b3d8c11,
        chosen samples 02fe54b7, token 0``. Digests stand for texts: equal ones for equal texts. Equal words mean that the
        same document had the same prompt; the numbers of documents evaluated and measured do not count.
    """
    if not results.get("results"):
        return ", ".join([UNKNOWN, *_token(settings)])
    shots = sorted({_shots(results, task) for task in tasks})
    parts = ["/".join(shots) + "-shot"]
    if template := results.get("chat_template"):
        parts.append(f"chat template {results.get('chat_template_sha') or _digest(template)}"[:22])
        if shots != ["0"] and results.get("fewshot_as_multiturn") is False:
            parts.append("one turn")
    if system := results.get("system_instruction"):
        parts.append(f"system instruction {_digest(system)}")
    if texts := _texts(results, tasks):
        parts.append(f"task text {_digest(texts)}")
    seed = (results.get("config") or {}).get("fewshot_seed")
    if shots != ["0"] and seed is not None:
        parts.append(f"few-shot seed {seed}")
    if chosen := [task for task in tasks if _were_chosen(results, task)]:
        hashes = {task: (results.get("task_hashes") or {}).get(task) for task in chosen}
        parts.append(f"chosen samples {_digest(hashes)}")
    return ", ".join(parts + _token(settings))


def differing(of_runs: Iterable[str]) -> dict[str, str]:
    """Of each of these descriptions the parts that not all of them have, which may be none."""
    parts = {words: words.split(", ") for words in of_runs}
    common = set.intersection(*map(set, parts.values())) if parts else set()
    return {words: ", ".join(part for part in own if part not in common) for words, own in parts.items()}


def _token(settings: Mapping[str, Any]) -> list[str]:
    """Which token was measured, unless it is the last one that the model is given."""
    position = settings.get("position", -1)
    return [] if str(position) == "-1" else [f"token {position}"]


def _shots(results: Mapping[str, Any], task: str) -> str:
    count = (results.get("n-shot") or {}).get(task)
    if count is None:
        count = ((results.get("configs") or {}).get(task) or {}).get("num_fewshot")
    return "?" if count is None else f"{count:g}" if isinstance(count, int | float) else str(count)


def _texts(results: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, dict[str, str]]:
    configs = {task: (results.get("configs") or {}).get(task) or {} for task in tasks}
    texts = {task: {name: config[name] for name in _TEXTS if config.get(name)} for task, config in configs.items()}
    return {task: {name: _ADDRESS.sub("", str(text)) for name, text in own.items()} for task, own in texts.items() if own}


def _were_chosen(results: Mapping[str, Any], task: str) -> bool:
    """lm-eval's ``--samples`` leaves fewer documents than there are, without a limit."""
    count = (results.get("n-samples") or {}).get(task)
    config = results.get("config") or {}
    if not isinstance(count, Mapping) or "limit" not in config or config["limit"] is not None:
        return False
    effective, original = count.get("effective"), count.get("original")
    return isinstance(effective, int) and isinstance(original, int) and effective < original


def _digest(value: Any) -> str:
    plain = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(plain.encode(errors="surrogatepass")).hexdigest()[:8]
