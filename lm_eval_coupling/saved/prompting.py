"""What makes a task's prompts, in words: runs that differ in it measured other prompts, whatever their model and task."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

UNKNOWN = "unknown prompts"  # of a table that does not say, whose results are not there
_ALWAYS = "task text"  # every task has one: it says something only beside another
_DIGESTED = (
    _ALWAYS,
    "chosen samples",
    "chat template",
    "system instruction",
)  # parts that end in a digest
_SEED = 1234  # of lm-eval's choice of few-shot examples, unless another is given
# Of a task's configuration: what its prompts are rendered from, and their examples, whose answers stand in them.
TEXTS: tuple[str, ...] = (
    "doc_to_text",
    "doc_to_choice",
    "doc_to_target",
    "description",
    "gen_prefix",
    "process_docs",
)
TEXTS += (
    "fewshot_delimiter",
    "target_delimiter",
    "fewshot_config",
    "fewshot_split",
    "training_split",
    "validation_split",
)
TEXTS += ("use_prompt",)
# Arguments of a model that change the tokens of its prompts.
_ENCODING = (
    "tokenizer",
    "add_bos_token",
    "prefix_token_id",
    "max_length",
    "truncation",
    "enable_thinking",
    "chat_template_args",
)


def model_arguments(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of the model, as they were given to lm-eval."""
    given = (results.get("config") or {}).get("model_args")
    if isinstance(given, str):
        return dict(part.split("=", 1) for part in given.split(",") if "=" in part)
    return given or {}


def encoding(arguments: Mapping[str, Any]) -> list[str]:
    """Of a model's arguments those that change the tokens of its prompts, in words such as ``add_bos_token=True``.

    A tokenizer that was handed over as an object is one that says so, or has a digest for a name.

    Returns:
        One text per argument.
    """
    given = {name: arguments.get(name) for name in _ENCODING}
    if "(name_or_path=" in str(given["tokenizer"]):  # as lm-eval writes an object
        given["tokenizer"] = "an object"
    given["tokenizer"] = (
        given["tokenizer"] if given["tokenizer"] != arguments.get("pretrained") else None
    )
    given["chat_template_args"] = _digest(given["chat_template_args"])
    given["truncation"] = given["truncation"] or None
    return [
        f"{name}={value}"
        for name, value in given.items()
        if isinstance(value, bool | int | str) and value != ""
    ]


def prompting(results: Mapping[str, Any], tasks: Sequence[str], coupling: Mapping[str, Any]) -> str:
    """How the prompts of a task, or of the tasks of a group, were made and where they were measured.

    Args:
        results: what lm-eval wrote; empty where only a table is there.
        tasks: single tasks.
        coupling: what the run or the table says of its coupling; may be empty.

    Returns:
        Parts such as ``5-shot, chat template 1f0c22ab, one turn, system instruction 77aa01de, task text 9b3d8c11,
        chosen samples 02fe54b7, token 0``. Digests stand for texts: equal ones for equal texts. Equal words mean that the
        same document had the same prompt; the numbers of documents evaluated and measured do not count.
    """
    found = {task: _of_task(results, task, coupling) for task in tasks}
    if not any(found.values()):
        return ", ".join([UNKNOWN, *_token(coupling)])
    parts = ["/".join(sorted({str(of["num_fewshot"]) for of in found.values()})) + "-shot"]
    for name in ("chat_template", "turns", "system_instruction", "seed"):
        parts += sorted({text for of in found.values() if (text := of.get(name))})
    told_by = [of["encoding"] for of in found.values() if of]
    parts += dict.fromkeys(word for words in told_by for word in words)
    for name, words in (("task_texts", _ALWAYS), ("samples", "chosen samples")):
        told = {task: of[name] for task, of in found.items() if of.get(name)}
        if told:
            parts.append(f"{words} {told[tasks[0]] if len(tasks) == 1 else _digest(told)}")
    return ", ".join(parts + _token(coupling))


def _of_task(results: Mapping[str, Any], task: str, coupling: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of one task, digests cut to eight digits. What the run recorded itself goes before lm-eval's results."""
    recorded = coupling.get("prompts") or {}
    recorded = recorded if "num_fewshot" in recorded else recorded.get(task) or {}
    if not recorded and task not in results.get("results", {}):
        return {}
    config = (results.get("configs") or {}).get(task) or {}
    shots = _shots(
        recorded.get(
            "num_fewshot", (results.get("n-shot") or {}).get(task, config.get("num_fewshot"))
        )
    )
    template = (
        recorded.get("chat_template")
        or results.get("chat_template_sha")
        or _digest(results.get("chat_template"))
    )
    turns = recorded.get("fewshot_as_multiturn", results.get("fewshot_as_multiturn"))
    system = _digest(recorded.get("system_instruction") or results.get("system_instruction"))
    texts = recorded.get("task_texts") or (
        config and _digest({name: config.get(name) for name in TEXTS})
    )
    seed = (results.get("config") or {}).get("fewshot_seed", _SEED)
    return {
        "num_fewshot": shots,
        "chat_template": template and f"chat template {template[:8]}",
        "turns": "one turn" if template and shots != "0" and turns is False else None,
        "system_instruction": system and f"system instruction {system}",
        "seed": f"few-shot seed {seed}" if shots != "0" and seed != _SEED else None,
        "task_texts": (texts or "")[:8],
        "encoding": recorded["encoding"]
        if "encoding" in recorded
        else encoding(model_arguments(results)),
        "samples": _digest(recorded.get("samples")) if recorded else _chosen(results, task),
    }


def differing(of_runs: Iterable[str]) -> dict[str, str]:
    """Of each of these descriptions of one task the parts that not all of them have, which may be none, for a reader."""
    of_runs = list(of_runs)
    parts = {words: readable(words, of_runs).split(", ") for words in of_runs}
    common = set.intersection(*map(set, parts.values())) if parts else set()
    return {
        words: ", ".join(part for part in own if part not in common) for words, own in parts.items()
    }


def readable(description: str, others: Iterable[str] = ()) -> str:
    """``description`` for a reader.

    Args:
        description: of :func:`prompting`.
        others: descriptions of the same task; it may be among them.

    Returns:
        What its digests stand for, and a digest only where ``others`` do not have the same.
    """
    known = [dict(map(_kind, other.split(", "))) for other in others]
    told = []
    for part in description.split(", "):
        kind, digest = _kind(part)
        same = (
            (digest,) if kind == _ALWAYS else (digest, None)
        )  # that another has none is told by the kind
        if digest and any(other.get(kind) not in same for other in known):
            told.append(part)
        elif not digest or kind != _ALWAYS:
            told.append(kind)
    return ", ".join(told)


def _kind(part: str) -> tuple[str, str]:
    """What a part is of, and its digest, "" if it is no digest."""
    kind, _, digest = part.rpartition(" ")
    return (kind, digest) if kind in _DIGESTED else (part, "")


def _token(coupling: Mapping[str, Any]) -> list[str]:
    """Which token was measured, unless it is the last one that the model is given."""
    settings = coupling.get("settings") or {}
    position, prompt = settings.get("position", -1), settings.get("prompt", "scored")
    rendered = [] if prompt == "scored" else [f"{prompt} prompt"]
    return rendered if str(position) in ("-1", "[-1]") else [*rendered, f"token {position}"]


def _shots(count: Any) -> str:
    return "?" if count is None else f"{count:g}" if isinstance(count, int | float) else str(count)


def _chosen(results: Mapping[str, Any], task: str) -> str | None:
    """A digest of the documents that lm-eval's ``--samples`` left: fewer than there are, without a limit."""
    count, config = (results.get("n-samples") or {}).get(task), results.get("config") or {}
    if not isinstance(count, Mapping) or "limit" not in config or config["limit"] is not None:
        return None
    effective, original = count.get("effective"), count.get("original")
    fewer = isinstance(effective, int) and isinstance(original, int) and effective < original
    return _digest([(results.get("task_hashes") or {}).get(task), effective]) if fewer else None


def _digest(value: Any) -> str | None:
    if not value:
        return None
    plain = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    plain = re.sub(
        r" at 0x[0-9a-fA-F]+", "", plain
    )  # lm-eval writes functions in nested settings as Python prints them
    return hashlib.sha256(plain.encode(errors="surrogatepass")).hexdigest()[:8]
