"""`lm-eval-coupling measure`: coupling of the prompts in a file, without a task or scores."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval_coupling.errors import CouplingError, require_token_ids, why
from lm_eval_coupling.harness.model_request import Measured, ModelRequest
from lm_eval_coupling.measures.formulas.means import mean_and_error
from lm_eval_coupling.saved.bounded import parse_json

logger = logging.getLogger("lm_eval.coupling")
FIELDS = ("prompt", "text", "tokens")


class Line(NamedTuple):
    """A prompt of a file, as a text or as token ids, with the further fields of its object."""

    prompt: str | list[int]
    fields: Mapping[str, Any]


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
        file: see :func:`read_lines`. Further fields become columns of the table, and ``score`` is
            what ``fit`` asks about.
        out: folder of results, samples and tables; the file's name becomes that of the task.
        model_args: further arguments of lm-eval's ``hf``, as ``name=value`` joined by commas.
        coupling: settings in the same form, such as ``ranks=10+30,limit=50``; the limit is ``all``
            by default.
        device: such as ``cuda``; the best there is by default.

    Returns:
        lm-eval's table with a summary of the measuring below it, and whether Ctrl-C came first.

    Raises:
        CouplingError: for a wrong argument, before anything heavy is loaded, or for a file without
            prompts.
    """
    request = ModelRequest.checked(
        model, out, model_args=model_args, coupling=coupling, device=device, limit="all"
    )
    request.options.require_positions_in_prompts("the prompts of a file")
    lines = read_lines(file)
    fields = further_fields(lines, file)
    lm = request.load()
    from lm_eval.utils import make_table

    from lm_eval_coupling.runs.announcement import announce
    from lm_eval_coupling.runs.prompt_results import prompt_results, sample_of
    from lm_eval_coupling.runs.results import save_run
    from lm_eval_coupling.runs.run import dry_run_lines, measure_documents, warn_of_failures

    assert lm.session is not None  # it measures
    keys = _keys(file.stem, [line.prompt for line in lines])
    chosen = _document_prompts(lm, keys, lines, fields)
    if lm.coupling_options.dry_run:
        costs = ["Dry run: nothing is written", *dry_run_lines(lm.session, chosen)]
        return Measured("\n".join(costs), interrupted=False)
    announce(lm.session, lm.coupling_options, model, {file.stem: len(lines)})
    run = measure_documents(lm.session, chosen)
    info = lm.describe(run, [file.stem], {file.stem: None})
    warn_of_failures(info, len(chosen))
    given = {**request.arguments, **request.settings}
    results = prompt_results(
        file.stem,
        [sample_of(key, number) for number, key in enumerate(keys)],
        # The name that lm-eval's tracker takes.
        model_name=str(next(given[k] for k in ("peft", "delta", "pretrained") if k in given)),
        config={"model": "coupling-hf", "model_args": given} | lm.get_model_info(),
    )
    _add_fields(results, file.stem, fields)
    save_run(results, info, out)
    return Measured(make_table(results), run.interrupted, info.unstored)


def read_lines(file: Path) -> list[Line]:
    """Read the prompts of a file: one per line, lines of nothing but spaces left out.

    In a ``.jsonl`` file a line is a JSON string, a list of token ids, or an object with one of them
    under ``prompt``, ``text`` or ``tokens`` and any further fields. In any other file a line is a
    prompt, white space included.

    Returns:
        Prompts as texts or lists of token ids, with their further fields.

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
        _line(line, f"line {number} of {file}") if file.suffix == ".jsonl" else Line(line, {})
        for number, line in numbered
    ]


def _line(line: str, where: str) -> Line:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise CouplingError(f"got {where}, which is no JSON ({error})") from None
    fields: dict[str, Any] = {}
    if isinstance(value, dict):
        name = next((name for name in FIELDS if name in value), "")
        fields = {other: v for other, v in value.items() if other != name}
        value = value.get(name)
    is_ids = (
        isinstance(value, list)
        and value
        and all(type(token) is int and token >= 0 for token in value)
    )
    if is_ids or (isinstance(value, str) and value):
        return Line(value, fields)
    raise CouplingError(
        f"got {where}, expected a JSON string, token ids, or an object with {', '.join(FIELDS)}"
    )


def further_fields(lines: Sequence[Line], file: Path) -> dict[str, list[Any]]:
    """Return the further fields of the lines as columns of a table.

    A column is of numbers or of truth values if all of its values are; others become texts. Where
    a line lacks a field the column has None.

    Args:
        lines: the lines of a file.
        file: for the message.

    Returns:
        One value per line, by the name of the field.

    Raises:
        CouplingError: if a field has the name of a column of the tables, or ``score`` is no number.
    """
    names = list(dict.fromkeys(name for line in lines for name in line.fields))
    if not names:
        return {}
    from lm_eval_coupling.saved.tables import IMAGE, RESPONSE, table_columns

    taken = {*table_columns(), *(column.name for column in (*RESPONSE, *IMAGE))}
    if twice := [name for name in names if name in taken]:
        raise CouplingError(
            f"got the field {twice[0]!r} in {file}, which is a column of the tables; rename it"
        )
    columns = {name: _plain([line.fields.get(name) for line in lines]) for name in names}
    if any(isinstance(score, str) for score in columns.get("score", ())):
        raise CouplingError(f"got a score in {file} that is no number; write numbers, or null")
    return columns


def _plain(values: list[Any]) -> list[Any]:
    present = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in present):
        return values
    if all(_is_number(value) for value in present):
        return [None if value is None else float(value) for value in values]
    return [
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for value in values
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000


def _add_fields(results: dict[str, Any], task: str, fields: Mapping[str, Sequence[Any]]) -> None:
    """Add the fields to the samples of a run, and the mean of ``score`` to its results."""
    for number, sample in enumerate(results["samples"][task]):
        sample["doc"] = {name: values[number] for name, values in fields.items()}
        if (score := sample["doc"].get("score")) is not None:
            sample |= {"score": float(score), "metrics": ["score", "coupling"]}
    mean = mean_and_error(float(s) for s in fields.get("score", ()) if s is not None)
    if mean["n"]:
        stderr = mean["stderr"] if mean["n"] > 1 else "N/A"
        results["results"][task] |= {"score,none": mean["mean"], "score_stderr,none": stderr}
        results["higher_is_better"][task]["score"] = True


def _keys(task: str, prompts: Sequence[str | list[int]]) -> list[Any]:
    """Return the identity of each prompt; a counter keeps equal prompts apart."""
    from lm_eval_coupling.runs.rows import DocumentKey

    seen = Counter[str]()
    keys = []
    for prompt in prompts:
        repeat = {"repeat": seen[str(prompt)]} if seen[str(prompt)] else {}
        seen[str(prompt)] += 1
        # As lm-eval hashes a document.
        document = json.dumps({"prompt": prompt} | repeat, indent=2, ensure_ascii=False)
        keys.append(DocumentKey(task, _hash(document), _hash(str(prompt))))
    return keys


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _document_prompts(
    lm: Any, keys: Sequence[Any], lines: Sequence[Line], fields: Mapping[str, Sequence[Any]]
) -> list[Any]:
    """Encode the chosen prompts.

    Args:
        lm: a `CouplingLM`.
        keys: identity of each prompt, all of one task.
        lines: the prompts, as texts or token ids.
        fields: further columns, one value per line.

    Returns:
        One `DocumentPrompt` per chosen prompt, cut on the left to the model's length.

    Raises:
        CouplingError: for token ids that the model does not have.
    """
    from lm_eval_coupling.runs.rows import DocumentPrompt
    from lm_eval_coupling.runs.sampling import choose

    options = lm.coupling_options
    chosen = choose(keys, [keys[0].task], options.limit, options.seed)
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    selected, n_cut = [], 0
    for number, (key, line) in enumerate(zip(keys, lines, strict=True)):
        if key not in chosen:
            continue
        prompt = line.prompt
        ids = lm.tok_encode(prompt) if isinstance(prompt, str) else prompt
        require_token_ids(ids, vocabulary)
        n_cut += len(ids) > lm.max_length
        tokens = tuple(ids[-lm.max_length :])
        text = lm.tokenizer.decode(list(tokens))
        columns = {name: values[number] for name, values in fields.items()}
        selected.append(
            DocumentPrompt(
                key, number, index=0, kind="text", tokens=tokens, text=text, columns=columns
            )
        )
    if n_cut:
        logger.warning(
            "coupling: %d of %d prompts are longer than the model's %d tokens; "
            "the last of these are measured",
            *(n_cut, len(selected), lm.max_length),
        )
    return selected
