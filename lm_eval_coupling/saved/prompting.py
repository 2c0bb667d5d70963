"""Descriptions of how a task's prompts and answers were made, equal where both are made equally.

A description is a text of parts, such as ``5-shot, chat template 1f0c22ab, task version 2``. Each
part has a kind (``shots``, ``chat template``, …). Digests stand for texts.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lm_eval_coupling.saved.answer_settings import (
    SEED,
    describe_generation,
    from_text,
    mapping,
    one_word,
    short_digest,
)

UNKNOWN = "unknown prompts"  # of a table without results that says nothing of them
_OF_THE_TASK = ("task text", "task version", "dataset", "documents")
# Every task has these, so that they tell a reader something only where they differ.
_OF_A_GROUP = ("shots by task", "group tasks", "group version")
_HIDDEN_UNLESS_DIFFERENT = (*_OF_THE_TASK, *_OF_A_GROUP, "generation", "scoring")
_DIGESTED = (
    "chosen samples",
    "chat template",
    "system instruction",
    "task text",
    "dataset",
    "documents",
    "scoring",
    "shots by task",
    "group tasks",
)
_ORDER = (  # of the parts; the arguments of the model that change tokens have no prefix
    "chat template",
    "one turn",
    "system instruction",
    "few-shot seed",
    "",
    *_HIDDEN_UNLESS_DIFFERENT,
    "chosen samples",
)
_PREFIXES = (*_DIGESTED, "task version", "group version", "generation", "few-shot seed", "token")
# Kinds that a run without configs says nothing of; another run's value is then no difference.
_UNKNOWN_IF_ABSENT = (*_OF_THE_TASK, "group version", "scoring")
# The fields of a task's configuration that its prompts and few-shot examples are rendered from.
TEXTS: tuple[str, ...] = (
    "doc_to_text",
    "doc_to_choice",
    "doc_to_target",
    "description",
    "gen_prefix",
    "process_docs",
    "fewshot_delimiter",
    "target_delimiter",
    "fewshot_config",
    "fewshot_split",
    "training_split",
    "validation_split",
    "use_prompt",
)
# The fields of a task's configuration that make scores of answers.
_SCORING = ("output_type", "metric_list", "filter_list", "repeats", "process_results")
# Arguments of a model that change the tokens of its prompts.
_ENCODING = (
    "tokenizer",
    "use_fast_tokenizer",
    "add_bos_token",
    "prefix_token_id",
    "max_length",
    "truncation",
    "enable_thinking",
    "chat_template_args",
)


def model_arguments(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the model arguments that lm-eval was given."""
    given = (results.get("config") or {}).get("model_args")
    return from_text(given) if isinstance(given, str) else mapping(given)


def encoding(arguments: Mapping[str, Any]) -> list[str]:
    """Return the model arguments that change the tokens of prompts, such as ``add_bos_token=True``.

    A tokenizer that was handed over as an object is named "an object", or by a digest.

    Returns:
        One text per argument.
    """
    given = {name: arguments.get(name) for name in _ENCODING}
    if "(name_or_path=" in str(given["tokenizer"]):  # as lm-eval writes an object
        given["tokenizer"] = "an object"
    if given["tokenizer"] == arguments.get("pretrained"):
        given["tokenizer"] = None
    given["chat_template_args"] = short_digest(given["chat_template_args"])
    given["truncation"] = given["truncation"] or None
    given["use_fast_tokenizer"] = {"False": False}.get(str(given["use_fast_tokenizer"]))
    return [
        f"{name}={value}"
        for name, value in given.items()
        if isinstance(value, bool | int | str) and value != ""
    ]


def describe_prompting(
    results: Mapping[str, Any],
    tasks: Sequence[str],
    coupling: Mapping[str, Any],
    documents: Mapping[str, str] = MappingProxyType({}),
    group: str = "",
) -> str:
    """Describe how prompts and answers of tasks were made, and at which token they were measured.

    Numbers of documents evaluated and measured are no part of it.

    Args:
        results: what lm-eval wrote; empty where only a table is there.
        tasks: one single task, or those of a group.
        coupling: what the run or the table says of its coupling; may be empty.
        documents: digests of the documents of tasks of which other runs have others.
        group: name of the group whose tasks they are; "" for a single task.

    Returns:
        Parts such as ``5-shot, chat template 1f0c22ab, one turn, task text 9b3d8c11, token 0``.
        Equal descriptions mean that the same document had the same prompt.
    """
    of_tasks = {task: _parts_of_task(results, task, coupling) for task in tasks}
    of_tasks = {
        task: parts | ({"documents": documents[task]} if task in documents else {})
        for task, parts in of_tasks.items()
        if parts
    }
    if not of_tasks:
        return ", ".join([UNKNOWN, *_token(coupling)])
    shots = {task: parts["shots"] for task, parts in of_tasks.items()}
    described = ["/".join(sorted({*shots.values()})) + "-shot"]
    if len({*shots.values()}) > 1:
        described.append(f"shots by task {short_digest(shots)}")
    if group:
        described.append(f"group tasks {short_digest(sorted(tasks))}")
        if version := _version((results.get("versions") or {}).get(group)):
            described.append(f"group version {version}")
    kinds = dict.fromkeys(kind for parts in of_tasks.values() for kind in parts if kind != "shots")
    for kind in sorted(kinds, key=_order):
        values = {task: parts[kind] for task, parts in of_tasks.items() if parts.get(kind)}
        if kind == "":
            words = (word for words in values.values() for word in words)
            described += dict.fromkeys(map(one_word, words))
        elif len(tasks) == 1 or len(set(values.values())) == 1 and len(values) == len(tasks):
            described += [f"{kind} {values[next(iter(values))]}".strip()] if values else []
        elif values:
            described.append(f"{kind} {short_digest(values)}")
    return ", ".join(described + _token(coupling))


def _order(kind: str) -> int:
    return _ORDER.index(kind)


def _parts_of_task(
    results: Mapping[str, Any], task: str, coupling: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the parts of one task by kind; empty if nothing is known.

    The run's own record goes before lm-eval's results. Under "" stand the model arguments that
    change tokens.
    """
    recorded = _recorded_prompts(coupling, task)
    if not recorded and task not in results.get("results", {}):
        return {}
    config = mapping((results.get("configs") or {}).get(task))
    shots = _shots(
        recorded.get(
            "num_fewshot", (results.get("n-shot") or {}).get(task, config.get("num_fewshot"))
        )
    )
    template = recorded.get("chat_template") or results.get("chat_template_sha")
    template = str(template or short_digest(results.get("chat_template")) or "")[:8]
    turns = recorded.get("fewshot_as_multiturn", results.get("fewshot_as_multiturn"))
    texts = recorded.get("task_texts") or (
        config and short_digest({name: config.get(name) for name in TEXTS})
    )
    seed = (results.get("config") or {}).get("fewshot_seed", SEED)
    version = (results.get("versions") or {}).get(task, recorded.get("task_version"))
    arguments = model_arguments(results)
    parts = {
        "shots": shots,
        "chat template": template,
        "one turn": " " if template and shots != "0" and turns is False else "",
        "system instruction": short_digest(
            recorded.get("system_instruction") or results.get("system_instruction")
        ),
        "few-shot seed": str(seed) if shots != "0" and seed != SEED else "",
        "": _list(recorded["encoding"]) if "encoding" in recorded else encoding(arguments),
        "task text": str(texts or "")[:8],
        "task version": _version(version),
        "dataset": _dataset(config or recorded, arguments),
        "generation": describe_generation(config, results.get("config") or {}, arguments),
        "scoring": short_digest({name: config[name] for name in _SCORING if config.get(name)}),
        "chosen samples": short_digest(recorded["samples"])
        if recorded.get("samples")
        else _chosen(results, task)
        if not recorded
        else None,
    }
    return {kind: value for kind, value in parts.items() if value}


def _recorded_prompts(coupling: Mapping[str, Any], task: str) -> Mapping[str, Any]:
    """Return what a run or table recorded of a task's prompts; empty if nothing."""
    recorded = mapping(coupling.get("prompts"))
    return recorded if "num_fewshot" in recorded else mapping(recorded.get(task))


def describe_documents(doc_hashes: Iterable[str]) -> dict[str, Any]:
    """Return the number of documents and a digest of their hashes, whatever their order."""
    hashes = sorted(doc_hashes)
    return {"number": len(hashes), "digest": hashlib.sha256(" ".join(hashes).encode()).hexdigest()}


def evaluated_documents(
    results: Mapping[str, Any], task: str, coupling: Mapping[str, Any]
) -> tuple[tuple[Any, ...], str] | None:
    """Return what tells whether two runs evaluated the same documents of a task.

    A run of `coupling-hf` records :func:`describe_documents`. lm-eval's own hash, which it writes
    with logged samples, is of the prompts as well, and of their order.

    Returns:
        The scope within which runs compare, and a digest: digests of one scope differ only if the
        documents do. None if nothing is known.
    """
    own = mapping(_recorded_prompts(coupling, task).get("documents"))
    if own.get("digest") and isinstance(own.get("number"), int):
        return ("recorded", own["number"]), str(own["digest"])[:8]
    logged = (results.get("task_hashes") or {}).get(task)
    count = mapping((results.get("n-samples") or {}).get(task)).get("effective")
    if not logged or not isinstance(count, int):
        return None
    return ("logged", count, describe_prompting(results, [task], coupling)), str(logged)[:8]


def _shots(count: Any) -> str:
    return "?" if count is None else f"{count:g}" if isinstance(count, int | float) else str(count)


def _version(version: Any) -> str:
    """Return 1, 1.0 and "1.0" as "1", other texts as they are, "" for what is unknown."""
    try:
        return f"{float(version):g}"
    except (TypeError, ValueError, OverflowError):
        is_known = isinstance(version, str) and version not in ("", "None", "N/A")
        return one_word(version) if is_known else ""


def _dataset(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> str | None:
    """Digest what chooses a task's documents: part of the dataset, split, and ``--metadata``."""
    metadata = mapping(config.get("metadata"))
    # lm-eval adds the arguments of the model to the metadata of every task.
    own = {
        name: value
        for name, value in metadata.items()
        if name not in ("version", "config_source", *arguments) and not name.startswith("coupling_")
    }
    path = str(config.get("dataset_path") or "").rstrip("/").rpartition("/")[2]
    chosen = {name: config.get(name) for name in ("dataset_name", "test_split")}
    revision = mapping(config.get("dataset_kwargs")).get("revision")
    choices = {"path": path, "revision": revision, "metadata": own, **chosen}
    return short_digest(choices) if any(choices.values()) else None


def _chosen(results: Mapping[str, Any], task: str) -> str | None:
    """Digest the documents that lm-eval's ``--samples`` left: fewer than all without a limit."""
    count, config = (results.get("n-samples") or {}).get(task), results.get("config") or {}
    if not isinstance(count, Mapping) or "limit" not in config or config["limit"] is not None:
        return None
    effective, original = count.get("effective"), count.get("original")
    fewer = isinstance(effective, int) and isinstance(original, int) and effective < original
    return (
        short_digest([(results.get("task_hashes") or {}).get(task), effective]) if fewer else None
    )


def _token(coupling: Mapping[str, Any]) -> list[str]:
    """Name the measured token, unless it is the last one that the model is given."""
    settings = mapping(coupling.get("settings"))
    position, prompt = settings.get("position", -1), settings.get("prompt", "scored")
    rendered = [] if prompt == "scored" else [f"{one_word(prompt)} prompt"]
    is_last = str(position) in ("-1", "[-1]")
    return rendered if is_last else [*rendered, f"token {one_word(position)}"]


def differing(descriptions: Iterable[str]) -> dict[str, str]:
    """Return for each description of one task the parts that not all have, made readable."""
    descriptions = list(descriptions)
    parts = {text: readable(text, descriptions).split(", ") for text in descriptions}
    common = set.intersection(*map(set, parts.values())) if parts else set()
    return {
        text: ", ".join(part for part in own if part not in common) for text, own in parts.items()
    }


def readable(description: str, others: Iterable[str] = ()) -> str:
    """Shorten a description for a reader.

    Args:
        description: of :func:`describe_prompting`.
        others: descriptions of the same task; it may be among them.

    Returns:
        The parts without digests, versions and settings in which ``others`` are the same.
    """
    parts_of_others = [_by_kind(other) for other in others]
    parts = []
    for kind, part in _by_kind(description).items():
        is_hidden = kind in _HIDDEN_UNLESS_DIFFERENT
        # Another run without a chat template is told by the kind; no digest is needed.
        same = (part,) if is_hidden else (part, None)
        differs = any(other.get(kind) not in same for other in parts_of_others)
        if differs or not (is_hidden or kind in _DIGESTED):
            parts.append(part)
        elif not is_hidden:
            parts.append(kind)
    return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """A kind of part in which two descriptions differ, with both parts ("" if there is none).

    ``first`` and ``second`` are the numbers of the two descriptions.
    """

    kind: str
    first: int
    second: int
    parts: tuple[str, str]


def find_disagreements(
    descriptions: Sequence[str], of_the_model: bool = False
) -> list[Disagreement]:
    """Find what makes the scores of several models on one task differ, besides the models.

    Chat templates are left out, and what a run says nothing of.

    Args:
        descriptions: of :func:`describe_prompting`.
        of_the_model: find differences of model arguments that change tokens, which may belong to
            the models, instead of all others.

    Returns:
        The first disagreement of each kind, in the order of the first description's parts.
    """
    every = [_by_kind(text) for text in descriptions]
    kinds = dict.fromkeys(kind for parts in every for kind in parts)
    disagreements = []
    for kind in kinds:
        if kind in ("chat template", UNKNOWN) or (kind in _ENCODING) != of_the_model:
            continue
        stated = [
            (number, parts.get(kind, ""))
            for number, parts in enumerate(every)
            if UNKNOWN not in parts
            and parts.get(kind) != "?-shot"
            and (kind in parts or kind not in _UNKNOWN_IF_ABSENT)
            and (kind != "turns" or "chat template" in parts)
        ]
        other = next(((n, part) for n, part in stated if part != stated[0][1]), None)
        if other is not None:
            (first, part), (second, different) = stated[0], other
            disagreements.append(Disagreement(kind, first, second, (part, different)))
    return disagreements


def _by_kind(description: str) -> dict[str, str]:
    """Return the parts of a description by their kind."""
    return {_kind(part): part for part in description.split(", ")}


def _kind(part: str) -> str:
    for prefix in _PREFIXES:
        if part.startswith(f"{prefix} "):
            return prefix
    if part.endswith("-shot") and "=" not in part:  # not the name of a tokenizer
        return "shots"
    if part.startswith("one turn"):
        return "turns"
    return part.split("=", 1)[0]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
