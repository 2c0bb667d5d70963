"""`lm-eval-coupling measure --samples`: coupling of an evaluation that somebody else ran."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.runs.options import Options, parse_settings
from lm_eval_coupling.runs.rows import DocumentPrompt
from lm_eval_coupling.samples.logged import LoggedEvaluation, LoggedRequest, read_evaluations
from lm_eval_coupling.saved.atomic import require_writable
from lm_eval_coupling.saved.prompting import describe_documents, model_arguments

logger = logging.getLogger("lm_eval.coupling")


def measure_samples(
    model: str,
    results: Path,
    out: Path,
    *,
    model_args: str = "",
    coupling: str = "",
    device: str | None = None,
    same_model: bool = False,
) -> tuple[str, bool]:
    """Measure the prompts that an evaluation logged, and write its results with coupling.

    The same documents are chosen, and the same tokens measured, as ``coupling-hf`` would have in
    the evaluation itself. Nothing is scored, and what was there is not touched.

    Args:
        model: a transformers folder or a name on the hub: the model that was evaluated.
        results: lm-eval's results file or a folder, with samples beside it; of several
            evaluations in a folder, as a sweep leaves it, those of ``model`` are measured.
        out: folder of the new results, samples and tables.
        model_args: further arguments of lm-eval's ``hf``, as ``name=value`` joined by commas.
        coupling: settings in the same form, such as ``ranks=10+30,limit=50``.
        device: such as ``cuda``; the best there is by default.
        same_model: measure even if the results name another model than ``model``.

    Returns:
        lm-eval's table of each evaluation with a summary of the measuring below it, and whether
        Ctrl-C ended the measuring early.

    Raises:
        CouplingError: for a wrong argument or unusable samples, before anything heavy is loaded,
            or if ``model`` is not the evaluated one.
    """
    settings = parse_settings(coupling)
    if not Options.take_from({"pretrained": model} | settings).measures_anything:
        raise CouplingError("got limit=0, expected a number of documents to measure, or all")
    from lm_eval.utils import simple_parse_args_string

    given = simple_parse_args_string(model_args)
    evaluations = read_evaluations(results, model, given.get("revision", "main"))
    require_writable(out)

    from lm_eval_coupling.harness import plugin

    plugin.install()
    from lm_eval_coupling.harness.lm import CouplingLM
    from lm_eval_coupling.numerics.devices import device_named
    from lm_eval_coupling.runs.run import dry_run_lines
    from lm_eval_coupling.samples.same_model import differences

    # Where it was given, the logged responses lack the reasoning.
    logged = model_arguments(evaluations[0].results).get("think_end_token")
    thinking = {} if logged is None else {"think_end_token": logged}
    arguments = thinking | given | {"pretrained": model}
    lm = CouplingLM(**arguments, **settings, device=str(device_named(device)))
    assert lm.session is not None  # limit=0 was refused above.
    others = [differences(lm, evaluation.results) for evaluation in evaluations]
    for evaluation, other in zip(evaluations, others, strict=True):
        _require_same_model(model, evaluation, other, same_model)
    if lm.coupling_options.dry_run:
        prompts = [p for evaluation in evaluations for p in _chosen_prompts(lm, evaluation)]
        lines = ["Dry run: nothing is written", *dry_run_lines(lm.session, prompts)]
        return "\n".join(lines), False
    tables: list[str] = []
    interrupted = False
    for evaluation, other in zip(evaluations, others, strict=True):
        table, interrupted = _measure_evaluation(lm, model, evaluation, other, out)
        tables.append(table)
        if interrupted:
            break
    return "\n".join(tables), interrupted


def _measure_evaluation(
    lm: Any, model: str, evaluation: LoggedEvaluation, other: list[str], out: Path
) -> tuple[str, bool]:
    """Measure and save one evaluation; return its table and whether Ctrl-C ended it early."""
    from lm_eval.utils import make_table

    from lm_eval_coupling.runs.results import save_run
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
    merged = _without_coupling(evaluation, default_name=model)
    save_run(merged, info, out, evaluation.members)
    return make_table(merged), run.interrupted


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
    for key, sample in documents.items():
        if key not in chosen:
            continue
        requests = [_as_text(lm, request) for request in evaluation.requests(key.task, sample)]
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


def _as_text(lm: Any, request: LoggedRequest) -> LoggedRequest:
    """Render the messages that were sent to a chat API with the tokenizer's own template."""
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
    return request._replace(args=(lm.apply_chat_template(messages), *request.args[1:]))


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


def _without_coupling(evaluation: LoggedEvaluation, default_name: str) -> dict[str, Any]:
    """Copy the results, with samples, and leave out the coupling of an earlier measurement."""
    merged = json.loads(json.dumps(evaluation.results))
    for rows in (merged.get("results", {}), merged.get("groups", {})):
        for row in rows.values():
            for name in [name for name in row if name.startswith("coupling")]:
                del row[name]
    (merged.setdefault("config", {})).pop("coupling", None)
    merged.setdefault("model_name", default_name)
    merged["samples"] = {
        task: [{k: v for k, v in sample.items() if k != "coupling"} for sample in samples]
        for task, samples in evaluation.samples.items()
    }
    return merged
