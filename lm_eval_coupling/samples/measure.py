"""`lm-eval-coupling measure --samples`: coupling of an evaluation that somebody else ran."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.harness.model_request import Measured, ModelRequest
from lm_eval_coupling.runs.rows import DocumentPrompt
from lm_eval_coupling.samples.logged import (
    LoggedEvaluation,
    LoggedRequest,
    find_evaluations,
    read_evaluation,
    require_apart,
)
from lm_eval_coupling.saved.prompting import describe_documents, model_arguments

if TYPE_CHECKING:
    from lm_eval_coupling.runs.results import CouplingInfo
    from lm_eval_coupling.runs.run import Run

logger = logging.getLogger("lm_eval.coupling")

_NOW = re.compile(r"""strftime_now\((['"])(.*?)\1\)""")  # in chat templates


def measure_samples(
    model: str,
    results: Path | Sequence[Path],
    out: Path,
    *,
    model_args: str | Mapping[str, Any] = "",
    coupling: str | Mapping[str, Any] = "",
    device: str | None = None,
    same_model: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Measured:
    """Measure the prompts that an evaluation logged, and write its results with coupling.

    The same documents are chosen, and the same tokens measured, as ``coupling-hf`` would have in
    the evaluation itself. Nothing is scored, and what was there is not touched.

    Args:
        model: a transformers folder or a name on the hub: the model that was evaluated.
        results: lm-eval's results file or a folder, with samples beside it; of several
            evaluations in a folder, as a sweep leaves it, those of ``model`` are measured. Or
            results files, all of which are measured.
        out: folder of the new results, samples and tables.
        model_args: further arguments of lm-eval's ``hf``, as ``name=value`` joined by commas.
        coupling: settings in the same form, such as ``ranks=10+30,limit=50``.
        device: such as ``cuda``; the best there is by default.
        same_model: measure even if the results name another model than ``model``.
        metadata: added to the metadata of every task, as by lm-eval's ``--metadata``.

    Returns:
        lm-eval's table of each evaluation with a summary of the measuring below it, and whether
        Ctrl-C ended the measuring early.

    Raises:
        CouplingError: for a wrong argument or unusable samples, before anything heavy is loaded,
            or if ``model`` is not the evaluated one.
    """
    if isinstance(results, Path):
        require_apart(results, out, "--samples", "--out")
    request = ModelRequest.checked(
        model, out, model_args=model_args, coupling=coupling, device=device
    )
    if isinstance(results, Path):
        revision = str(request.arguments.get("revision", "main"))
        results = list(find_evaluations(results, model, revision))
    evaluations = [read_evaluation(file) for file in results]

    from lm_eval.utils import make_table

    from lm_eval_coupling.runs.results import save_run
    from lm_eval_coupling.runs.run import dry_run_lines
    from lm_eval_coupling.samples.same_model import differences

    # Where it was given, the logged responses lack the reasoning.
    logged = model_arguments(evaluations[0].results).get("think_end_token")
    thinking = {} if logged is None else {"think_end_token": logged}
    lm = request.load(**thinking)
    assert lm.session is not None  # it measures
    others = [differences(lm, evaluation.results) for evaluation in evaluations]
    for evaluation, other in zip(evaluations, others, strict=True):
        _require_same_model(model, evaluation, other, same_model)
    if lm.coupling_options.dry_run:
        prompts = [p for evaluation in evaluations for p in _chosen_prompts(lm, evaluation)]
        lines = ["Dry run: nothing is written", *dry_run_lines(lm.session, prompts)]
        return Measured("\n".join(lines), interrupted=False)
    tables: list[str] = []
    interrupted, problem = False, ""
    for evaluation, other in zip(evaluations, others, strict=True):
        run, info = _measure_evaluation(lm, evaluation, other)
        merged = _without_coupling(evaluation, model, metadata or {})
        save_run(merged, info, out, evaluation.members)
        tables.append(make_table(merged))
        problem = problem or info.unstored
        if interrupted := run.interrupted:
            break
    return Measured("\n".join(tables), interrupted, problem)


def measure_configured(file: Path) -> Measured:
    """Measure what a file asks for, which has the arguments of :func:`measure_samples` by name.

    Args:
        file: in YAML, as a sweep writes it.

    Returns:
        The same as :func:`measure_samples`.

    Raises:
        CouplingError: also if the file cannot be read.
    """
    import yaml

    try:
        arguments = yaml.safe_load(file.read_text(encoding="utf-8"))
        results = [Path(name) for name in arguments.pop("results")]
        model, out = arguments.pop("model"), Path(arguments.pop("out"))
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise CouplingError(
            f"got --config {file}, expected the measure.yaml of a sweep ({why(error)})"
        ) from None
    return measure_samples(model, results, out, **arguments)


def _measure_evaluation(
    lm: Any, evaluation: LoggedEvaluation, other: list[str]
) -> tuple[Run, CouplingInfo]:
    """Measure one evaluation and describe the run."""
    from lm_eval_coupling.runs.run import measure_documents, warn_of_failures

    prompts = _chosen_prompts(lm, evaluation)
    run = measure_documents(lm.session, prompts)
    info = lm.describe(
        run,
        list(evaluation.samples),
        {task: _prompt_identity(task, evaluation) for task in evaluation.samples},
        samples_of={
            "model": evaluation.results.get("model_name"),
            "date": evaluation.results.get("date"),
            "differences": other,
        },
    )
    warn_of_failures(info, len({prompt.document for prompt in prompts}))
    return run, info


def _require_same_model(
    model: str, evaluation: LoggedEvaluation, other: list[str], same_model: bool
) -> None:
    if not other:
        return
    if not same_model:
        raise CouplingError(
            f"got {model} for the samples of {evaluation.results.get('model_name')}, "
            f"which differ in {'; '.join(other)}; give --model_args that match, "
            "or --same-model if the weights are the same"
        )
    logger.warning("coupling: measured as the same model in spite of %s", "; ".join(other))


def _chosen_prompts(lm: Any, evaluation: LoggedEvaluation) -> list[DocumentPrompt]:
    """Encode the prompts of the chosen documents as `CouplingLM` does in an evaluation."""
    from lm_eval_coupling.harness.documents import Document
    from lm_eval_coupling.runs.sampling import choose

    options = lm.coupling_options
    documents = {
        key: sample
        for task in evaluation.samples
        for key, sample in evaluation.documents(task).items()
    }
    chosen = choose(documents, evaluation.roots, options.limit, options.seed)
    prompts: list[DocumentPrompt] = []
    n_changed = 0
    date = evaluation.results.get("date")
    time = datetime.fromtimestamp(date) if isinstance(date, int | float) else datetime.now()
    for key, sample in documents.items():
        if key not in chosen:
            continue
        requests = [
            _as_text(lm, request, time) for request in evaluation.requests(key.task, sample)
        ]
        contexts = {request.args[0].strip() for request in requests}
        made = lm.prompts_of(Document(key, sample["doc_id"], requests, sample.get("target")))
        n_changed += sum(
            prompt.kind == "context" and not _is_of(prompt.text.strip(), contexts)
            for prompt in made
        )
        prompts += made
    if n_changed:
        logger.warning(
            "coupling: %d of %d prompts do not decode back to the logged text; "
            "is the tokenizer that of the evaluation?",
            *(n_changed, len(prompts)),
        )
    return prompts


def _is_of(decoded: str, contexts: set[str]) -> bool:
    """Return whether a prompt is a logged context: longer by special tokens, or cut on the left."""
    return any(decoded.endswith(context) or context.endswith(decoded) for context in contexts)


def _as_text(lm: Any, request: LoggedRequest, time: datetime) -> LoggedRequest:
    """Render the messages that were sent to a chat API at a time with the tokenizer's template."""
    context = request.args[0]
    if isinstance(context, list) and len(context) == 1:
        context = context[0]  # lm-eval logs the messages as one JSON text.
    messages = _messages(context)
    if messages is None:
        if not isinstance(context, str):
            raise CouplingError(f"got a context of type {type(context).__name__}, expected text")
        return request._replace(args=(context, *request.args[1:]))
    if not lm.tokenizer.chat_template:
        raise CouplingError(
            "got messages in the samples, and a tokenizer without chat template; "
            "evaluate without --apply_chat_template, or give a tokenizer that has one"
        )
    template = lm.tokenizer.chat_template
    try:
        if isinstance(template, str):  # such as Llama's, which writes the date of the day
            lm.tokenizer.chat_template = _NOW.sub(lambda m: repr(time.strftime(m[2])), template)
        return request._replace(args=(lm.apply_chat_template(messages), *request.args[1:]))
    finally:
        lm.tokenizer.chat_template = template


def _messages(context: Any) -> list[dict[str, str]] | None:
    if not isinstance(context, str) or not context.startswith('[{"role"'):
        return None
    try:
        return json.loads(context)
    except ValueError:
        return None


def _prompt_identity(task: str, evaluation: LoggedEvaluation) -> Mapping[str, Any]:
    """Return what made a task's prompts: as `coupling-hf` recorded it, else as the results tell."""
    from lm_eval_coupling.samples.prompt_facts import prompt_facts

    own = (evaluation.results.get("config") or {}).get("coupling") or {}
    recorded = (own.get("prompts") or {}).get(task) or prompt_facts(task, evaluation.results)
    documents = describe_documents(key.doc_hash for key in evaluation.documents(task))
    return recorded | {"documents": documents}


def _without_coupling(
    evaluation: LoggedEvaluation, default_name: str, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Copy the results, with samples, and leave out the coupling of an earlier measurement."""
    merged = json.loads(json.dumps(evaluation.results))
    for rows in (merged.get("results", {}), merged.get("groups", {})):
        for row in rows.values():
            for name in [name for name in row if name.startswith("coupling")]:
                del row[name]
    (merged.setdefault("config", {})).pop("coupling", None)
    merged.setdefault("model_name", default_name)
    for config in merged["configs"].values() if metadata else ():
        config["metadata"] = {**(config.get("metadata") or {}), **metadata}
    merged["samples"] = {
        task: [{k: v for k, v in sample.items() if k != "coupling"} for sample in samples]
        for task, samples in evaluation.samples.items()
    }
    return merged
