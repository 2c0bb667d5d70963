"""`lm-eval-coupling measure`: the prompts of a file, without any task; leaves what an evaluation leaves, but scores."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.harness import plugin
from lm_eval_coupling.runs.options import Options, settings_of

if TYPE_CHECKING:
    from lm_eval_coupling.harness.documents import Document
    from lm_eval_coupling.harness.lm import CouplingLM
    from lm_eval_coupling.runs.results import CouplingInfo

logger = logging.getLogger("lm_eval.coupling")
FIELDS = ("prompt", "text", "tokens")


def measure_texts(
    model: str,
    file: Path,
    out: Path,
    *,
    model_args: str = "",
    coupling: str = "",
    device: str | None = None,
) -> str:
    """Measure each prompt of a file at its last token, or where ``coupling`` says.

    Args:
        model: a transformers folder or a name on the hub.
        file: see :func:`read_prompts`.
        out: folder of results, samples and tables; the name of the file stands for the task.
        model_args: further arguments of lm-eval's ``hf``, as ``name=value`` with commas between them.
        coupling: settings in the same form, such as ``ranks=10+30,untrained=0``; all prompts unless there is a ``limit``.
        device: such as ``cuda``; the best there is by default.

    Returns:
        What lm-eval would print: its table, with a few lines on what was measured and where it lies.

    Raises:
        CouplingError: for a wrong argument, before anything heavy is loaded, or for a file without prompts.
    """
    settings = {"coupling_limit": "all"} | settings_of(coupling)
    Options.take_from({"pretrained": model} | settings)
    plugin.require_writable(out)
    plugin.interrupted.clear()
    prompts = read_prompts(file)
    plugin.install()
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import make_table, simple_parse_args_string

    from lm_eval_coupling.harness.lm import CouplingLM
    from lm_eval_coupling.numerics.devices import device_named
    from lm_eval_coupling.runs.results import add_to_results

    arguments = simple_parse_args_string(model_args) | {"pretrained": model}
    lm = CouplingLM(**arguments, **settings, device=str(device_named(device)))
    documents = _documents(file.stem, prompts)
    info = _measured(lm, file.stem, documents, prompts)
    results = _results(lm, file.stem, documents, arguments | settings)
    add_to_results(results, info, {})
    tracker = EvaluationTracker(output_path=str(out))
    tracker.general_config_tracker.log_experiment_args(
        model_source="coupling-hf",
        model_args=arguments,
        system_instruction="",
        chat_template="",
        fewshot_as_multiturn=False,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results, samples)
    tracker.save_results_samples(file.stem, samples[file.stem])
    return make_table(results)


def read_prompts(file: Path) -> list[str | list[int]]:
    """The prompts of a file: texts, or token ids, which are taken as they are.

    A line each, as it stands without the end of the line; lines of nothing but spaces are passed over. In a ``.jsonl`` file
    a line is a JSON string, a list of token ids, or an object with one of them under ``prompt``, ``text`` or ``tokens``.

    Returns:
        One prompt per line that is not passed over, in order.

    Raises:
        CouplingError: if there is no such file, or a line is something else, which it names.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CouplingError(
            f"got {file} for the prompts, which cannot be read as UTF-8 text ({why(error)})"
        ) from None
    numbered = [
        (number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not numbered:
        raise CouplingError(f"got {file}, which has no prompts; write one a line")
    return [
        _prompt(line, f"line {number} of {file}") if file.suffix == ".jsonl" else line
        for number, line in numbered
    ]


def _prompt(line: str, where: str) -> str | list[int]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise CouplingError(f"got {where}, which is no JSON ({error})") from None
    if isinstance(value, dict):
        value = next((value[name] for name in FIELDS if name in value), None)
    is_ids = (
        isinstance(value, list)
        and value
        and all(type(token) is int and token >= 0 for token in value)
    )
    if is_ids or (isinstance(value, str) and value):
        return value
    raise CouplingError(
        f"got {where}, expected a JSON string, token ids, or an object with {', '.join(FIELDS)}"
    )


def _documents(task: str, prompts: list[str | list[int]]) -> list[Document]:
    """One for each line that has a prompt, from 0; equal ones are told apart by how many there were before."""
    from lm_eval.utils import hash_string

    from lm_eval_coupling.harness.documents import Document, doc_hash
    from lm_eval_coupling.runs.rows import DocumentKey

    found, seen = [], Counter[str]()
    for number, prompt in enumerate(prompts):
        repeat = {"repeat": seen[str(prompt)]} if seen[str(prompt)] else {}
        key = DocumentKey(task, doc_hash({"prompt": prompt} | repeat), hash_string(str(prompt)))
        found.append(Document(key=key, doc_id=number, requests=[], target=None))
        seen[str(prompt)] += 1
    return found


def _measured(
    lm: CouplingLM, task: str, documents: list[Document], prompts: list[str | list[int]]
) -> CouplingInfo:
    from lm_eval_coupling.harness.prompts import Prompt
    from lm_eval_coupling.runs.results import CouplingInfo
    from lm_eval_coupling.runs.sampling import choose

    options = lm.coupling_options
    chosen = choose([document.key for document in documents], [task], options.limit, options.seed)

    vocabulary = lm.model.get_input_embeddings().weight.shape[0]

    def encoded(prompt: str | list[int]) -> list[int]:
        ids = lm.tok_encode(prompt) if isinstance(prompt, str) else prompt
        if ids and max(ids) >= vocabulary:
            raise CouplingError(
                f"got token {max(ids)} among the prompts, expected ids below {vocabulary} for this model"
            )
        return ids

    every = [
        (document, encoded(prompts[document.doc_id]))
        for document in documents
        if document.key in chosen
    ]
    asked = [(document, 0, Prompt(tuple(ids[-lm.max_length :]), "text")) for document, ids in every]
    cut = sum(len(ids) > lm.max_length for _, ids in every)
    if cut:
        logger.warning(
            "coupling: %d of %d prompts are longer than the model's %d tokens; the last of these are measured",
            *(cut, len(asked), lm.max_length),
        )
    if options.dry_run:
        assert lm.session is not None
        told = lm.session.try_one([prompt.tokens for _, _, prompt in asked])
        print("\n".join(["Dry run: nothing is written", *told]))
        raise SystemExit(0)
    rows, counts = lm.measure(asked)
    if counts["interrupted"]:
        plugin.interrupted.set()
    return CouplingInfo(
        lm.about_run(rows, [task], [counts]) | {"prompts": {task: None}}, rows, options.out
    )


def _results(
    lm: CouplingLM, task: str, documents: list[Document], arguments: dict[str, Any]
) -> dict[str, Any]:
    """As lm-eval would have left them, of a task without a metric."""
    counts = {"original": len(documents), "effective": len(documents)}
    return {
        "results": {task: {"name": task, "alias": task, "sample_len": len(documents)}},
        "group_subtasks": {},
        "configs": {task: {"task": task, "output_type": "text", "num_fewshot": 0}},
        "versions": {task: 1},
        "n-shot": {task: 0},
        "higher_is_better": {task: {}},
        "n-samples": {task: counts},
        "config": {"model": "coupling-hf", "model_args": arguments} | lm.get_model_info(),
        "samples": {task: [_sample(document) for document in documents]},
    }


def _sample(document: Document) -> dict[str, Any]:
    return {
        "doc_id": document.doc_id,
        "doc": {},
        "target": "",
        "arguments": [],
        "resps": [],
        "filtered_resps": [],
        "filter": "none",
        "metrics": ["coupling"],
        "doc_hash": document.key.doc_hash,
        "prompt_hash": document.key.prompt_hash,
        "target_hash": "",
    }
