"""`lm-eval-coupling measure`: coupling of the prompts in a file, without a task or scores."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.runs.options import Options, parse_settings
from lm_eval_coupling.saved.atomic import require_writable

logger = logging.getLogger("lm_eval.coupling")
FIELDS = ("prompt", "text", "tokens")


class Measured(NamedTuple):
    """The table to print, and whether Ctrl-C ended the measuring early."""

    table: str
    interrupted: bool


def measure_texts(
    model: str,
    file: Path,
    out: Path,
    *,
    model_args: str = "",
    coupling: str = "",
    device: str | None = None,
) -> Measured:
    """Measure each prompt of a file at its last token, or at the tokens that ``coupling`` names.

    Args:
        model: a transformers folder or a name on the hub.
        file: see :func:`read_prompts`.
        out: folder of results, samples and tables; the file's name becomes that of the task.
        model_args: further arguments of lm-eval's ``hf``, as ``name=value`` joined by commas.
        coupling: settings in the same form, such as ``ranks=10+30,limit=50``; the limit is ``all``
            by default.
        device: such as ``cuda``; the best there is by default.

    Returns:
        lm-eval's table with a summary of the measuring below it.

    Raises:
        CouplingError: for a wrong argument, before anything heavy is loaded, or for a file without
            prompts.
    """
    settings = {"coupling_limit": "all"} | parse_settings(coupling)
    options = Options.take_from({"pretrained": model} | settings)
    if not options.measures_anything:
        raise CouplingError("got coupling_limit=0, expected a number of prompts to measure, or all")
    require_writable(out)
    prompts = read_prompts(file)

    from lm_eval_coupling.numerics.devices import device_named

    where = str(device_named(device))
    from lm_eval_coupling.harness import plugin

    plugin.install()
    from lm_eval.utils import make_table, simple_parse_args_string

    from lm_eval_coupling.harness.lm import CouplingLM
    from lm_eval_coupling.runs.announcement import announce
    from lm_eval_coupling.runs.results import save_run
    from lm_eval_coupling.runs.run import dry_run_lines, measure_documents, warn_of_failures

    arguments = simple_parse_args_string(model_args) | {"pretrained": model}
    lm = CouplingLM(**arguments, **settings, device=where)
    assert lm.session is not None  # it measures
    samples = _samples(prompts)
    chosen = _document_prompts(lm, file.stem, samples, prompts)
    if lm.coupling_options.dry_run:
        lines = ["Dry run: nothing is written", *dry_run_lines(lm.session, chosen)]
        return Measured("\n".join(lines), interrupted=False)
    announce(lm.session, lm.coupling_options, model, {file.stem: len(prompts)})
    run = measure_documents(lm.session, chosen)
    info = lm.describe(run, [file.stem], {file.stem: None})
    warn_of_failures(info, len(chosen))
    results = _results(lm, file.stem, samples, arguments | settings)
    save_run(results, info, out)
    return Measured(make_table(results), run.interrupted)


def read_prompts(file: Path) -> list[str | list[int]]:
    """Read the prompts of a file: one per line, lines of nothing but spaces left out.

    In a ``.jsonl`` file a line is a JSON string, a list of token ids, or an object with one of them
    under ``prompt``, ``text`` or ``tokens``. In any other file a line is a prompt, white space
    included.

    Returns:
        Texts, or lists of token ids.

    Raises:
        CouplingError: if the file cannot be read, or naming the line that is no prompt.
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


def _samples(prompts: Sequence[str | list[int]]) -> list[dict[str, Any]]:
    """Make one lm-eval sample per prompt; a counter keeps equal prompts apart."""
    seen = Counter[str]()
    samples = []
    for number, prompt in enumerate(prompts):
        repeat = {"repeat": seen[str(prompt)]} if seen[str(prompt)] else {}
        seen[str(prompt)] += 1
        samples.append(
            {
                "doc_id": number,
                "doc": {},
                "target": "",
                "arguments": [],
                "resps": [],
                "filtered_resps": [],
                "filter": "none",
                "metrics": ["coupling"],
                # As lm-eval hashes a document.
                "doc_hash": _hash(
                    json.dumps({"prompt": prompt} | repeat, indent=2, ensure_ascii=False)
                ),
                "prompt_hash": _hash(str(prompt)),
                "target_hash": "",
            }
        )
    return samples


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _document_prompts(
    lm: Any, task: str, samples: Sequence[dict[str, Any]], prompts: Sequence[str | list[int]]
) -> list[Any]:
    """Encode the chosen prompts.

    Args:
        lm: a `CouplingLM`.
        task: name of the task.
        samples: one per prompt.
        prompts: texts or token ids.

    Returns:
        One `DocumentPrompt` per chosen prompt, cut on the left to the model's length.

    Raises:
        CouplingError: for token ids that the model does not have.
    """
    from lm_eval_coupling.runs.rows import DocumentKey, DocumentPrompt
    from lm_eval_coupling.runs.sampling import choose

    options = lm.coupling_options
    keys = [DocumentKey(task, sample["doc_hash"], sample["prompt_hash"]) for sample in samples]
    chosen = choose(keys, [task], options.limit, options.seed)
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    selected, n_cut = [], 0
    for number, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
        if key not in chosen:
            continue
        ids = lm.tok_encode(prompt) if isinstance(prompt, str) else prompt
        if ids and max(ids) >= vocabulary:
            raise CouplingError(
                f"got token {max(ids)} among the prompts, "
                f"expected ids below {vocabulary} for this model"
            )
        n_cut += len(ids) > lm.max_length
        tokens = tuple(ids[-lm.max_length :])
        text = lm.tokenizer.decode(list(tokens))
        selected.append(DocumentPrompt(key, number, index=0, kind="text", tokens=tokens, text=text))
    if n_cut:
        logger.warning(
            "coupling: %d of %d prompts are longer than the model's %d tokens; "
            "the last of these are measured",
            *(n_cut, len(selected), lm.max_length),
        )
    return selected


def _results(
    lm: Any, task: str, samples: list[dict[str, Any]], arguments: dict[str, Any]
) -> dict[str, Any]:
    """Make the results that lm-eval would have left of a task without a metric."""
    hashes = "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)
    return {
        "results": {task: {"name": task, "alias": task, "sample_len": len(samples)}},
        "group_subtasks": {},
        "configs": {task: {"task": task, "output_type": "text", "num_fewshot": 0}},
        "versions": {task: 1},
        "n-shot": {task: 0},
        "higher_is_better": {task: {}},
        "n-samples": {task: {"original": len(samples), "effective": len(samples)}},
        "config": {"model": "coupling-hf", "model_args": arguments} | lm.get_model_info(),
        "samples": {task: samples},
        "task_hashes": {task: _hash(hashes)},
        "model_source": "coupling-hf",
        # The name that lm-eval's tracker takes.
        "model_name": next(
            str(arguments[name]) for name in ("peft", "delta", "pretrained") if name in arguments
        ),
    }
