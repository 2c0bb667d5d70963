"""Evaluations on disk: lm-eval's results file with the samples beside it."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.runs.rows import DocumentKey
from lm_eval_coupling.saved.answer_settings import mapping
from lm_eval_coupling.saved.bounded import parse_json, read_json
from lm_eval_coupling.saved.jsonlines import read_lines
from lm_eval_coupling.saved.prompting import model_arguments
from lm_eval_coupling.saved.results_file import RESULTS, number, require_shape
from lm_eval_coupling.saved.run_files import date_in
from lm_eval_coupling.saved.saved_run import leaf_tasks

logger = logging.getLogger("lm_eval.coupling")

_REQUEST_TYPES = {
    "multiple_choice": "loglikelihood",
    "loglikelihood": "loglikelihood",
    "loglikelihood_rolling": "loglikelihood_rolling",
    "generate_until": "generate_until",
}
_HASHES = ("doc_hash", "prompt_hash")
_RERUN = "run lm_eval again with --log_samples"


class LoggedRequest(NamedTuple):
    """Request as lm-eval sent it.

    ``args`` are the context, and the continuation or the generation arguments. ``resps`` are the
    responses to it.
    """

    request_type: str
    args: tuple[Any, ...]
    resps: Sequence[Any] = ()


@dataclass(frozen=True)
class LoggedEvaluation:
    """Evaluation by lm-eval: ``results`` as in its JSON, and ``samples`` by task.

    A task with several filters has one sample per document and filter.
    """

    file: Path
    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]

    @cached_property
    def members(self) -> dict[str, list[str]]:
        """Leaf tasks of every group."""
        return leaf_tasks(self._groups)

    @cached_property
    def roots(self) -> list[Any]:
        """Requested groups as nested lists of names, and tasks outside of groups."""
        groups = self._groups
        inner = {member for members in groups.values() for member in members}
        nested = [_nested(name, groups) for name in groups if name not in inner]
        return nested + [task for task in self.samples if task not in inner]

    @property
    def _groups(self) -> dict[str, list[str]]:
        listed = self.results.get("group_subtasks") or {}
        return {name: list(members) for name, members in listed.items() if members}

    def documents(self, task: str) -> dict[DocumentKey, dict[str, Any]]:
        """Return one sample per document, whatever the number of filters."""
        documents: dict[DocumentKey, dict[str, Any]] = {}
        for sample in self.samples[task]:
            key = DocumentKey(task, sample["doc_hash"], sample["prompt_hash"])
            documents.setdefault(key, sample)
        return documents

    def requests(self, task: str, sample: Mapping[str, Any]) -> list[LoggedRequest]:
        """Return the requests of one document in the order of their ``idx``.

        Raises:
            CouplingError: if the sample does not hold them, or holds images or audio.
        """
        output_type = self.results["configs"][task].get("output_type")
        if output_type not in _REQUEST_TYPES:
            raise CouplingError(
                f"got output_type={output_type!r} for task {task} in {self.file}, "
                f"expected one of {', '.join(_REQUEST_TYPES)}"
            )
        arguments, resps = sample["arguments"], sample.get("resps")
        logged = resps if isinstance(resps, list) else ()
        requests = []
        for place in range(len(arguments)):
            given = arguments[f"gen_args_{place}"]
            args = tuple(given[f"arg_{n}"] for n in range(len(given)))
            if len(args) > 2:
                raise CouplingError(
                    f"got images or audio in the samples of task {task}, expected text alone"
                )
            own = logged[place] if place < len(logged) else ()
            requests.append(LoggedRequest(_REQUEST_TYPES[output_type], args, own))
        return requests


def find_evaluations(
    path: Path, model: str, revision: str = "main", option: str = "--samples"
) -> dict[Path, dict[str, Any]]:
    """Find the evaluations of one model.

    Args:
        path: lm-eval's results file, or a folder that holds some, at any depth. In a folder with
            several, as a sweep leaves it, those of other models and revisions are left out.
        model: name or path of the model; its last part decides.
        revision: of the model.
        option: where ``path`` was given, for the message.

    Returns:
        The results by their file, all of different tasks.

    Raises:
        CouplingError: if there is none, or if a task was evaluated twice.
    """
    results = read_results(path, option)
    return dict(results) if len(results) == 1 else of_model(results, path, model, revision, option)


def read_results(path: Path, option: str = "--samples") -> dict[Path, dict[str, Any]]:
    """Read all results of lm-eval in a folder, or one file of them.

    Returns:
        The results by their file.

    Raises:
        CouplingError: if there is none, or a file of that name is no such results.
    """
    files = [path] if path.is_file() else []
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.json") if _has_name_of_results(file))
    results = {}
    for file in files:
        try:
            results[file] = _read_results(file)
        except CouplingError as error:
            if file == path or file.name.startswith("results_"):
                raise
            logger.warning("coupling: %s; it is passed over", error)
    if not results:
        raise CouplingError(
            f"got {option} {path}, expected a results_*.json or NAME_<date>.json of lm-eval or a "
            "folder with one"
        )
    return results


def _has_name_of_results(file: Path) -> bool:
    # `--output_path NAME.json` makes NAME_<date>.json instead of results_<date>.json.
    has_name = file.name.startswith("results_") or date_in(file) != ""
    return file.suffix == ".json" and has_name and not file.is_dir()


def of_model(
    results: Mapping[Path, dict[str, Any]], path: Path, model: str, revision: str, option: str
) -> dict[Path, dict[str, Any]]:
    """Return those of several results that are of a model at a revision, as far as they tell.

    Args:
        results: by file, in the folder ``path``.
        path: for the message.
        model: name or path of the model; its last part decides.
        revision: of the model.
        option: where ``path`` was given, for the message.

    Raises:
        CouplingError: if there is none, or if a task was evaluated twice.
    """
    own = {
        file: content
        for file, content in results.items()
        if last_part(evaluated_model(content)) in (last_part(model), None)
        and (content.get("config") or {}).get("model_revision", revision) in (revision, None)
    }
    if not own:
        others = sorted({str(evaluated_model(content)) for content in results.values()})
        raise CouplingError(
            f"got {option} {path} with evaluations of {', '.join(others[:5])}, "
            f"expected one of {model} at revision {revision}"
        )
    counts = Counter(task for content in own.values() for task in content["configs"])
    if twice := [task for task, count in counts.items() if count > 1]:
        named = ", ".join(file.relative_to(path).as_posix() for file in list(own)[:3])
        raise CouplingError(
            f"got {option} {path} with {len(own)} evaluations ({named}, …) that share the task "
            f"{twice[0]}, expected one of each task; give its results file"
        )
    return own


def require_apart(results: Path, out: Path, results_option: str, out_option: str) -> None:
    """Refuse an output inside the folder of evaluations, whose results it would add to.

    Raises:
        CouplingError: naming both folders by their options.
    """
    if results.is_dir() and out.resolve().is_relative_to(results.resolve()):
        raise CouplingError(
            f"got {out_option} {out} inside {results_option} {results}, whose evaluations it would "
            "be taken for; choose a folder outside of it"
        )


def evaluated_model(results: Mapping[str, Any]) -> Any:
    """Return the name of the model that was evaluated, None if the results do not tell."""
    arguments = model_arguments(results)
    return arguments.get("pretrained") or arguments.get("model") or results.get("model_name")


def last_part(name: Any) -> str | None:
    """Return the last part of a model's name or path in lower case, None without a name."""
    return PurePath(str(name)).name.lower() if isinstance(name, str) and name else None


def _read_results(file: Path) -> dict[str, Any]:
    try:
        results = read_json(file)
    except (OSError, ValueError) as error:
        raise CouplingError(f"got {file}, expected the results of lm-eval ({why(error)})") from None
    configs = results.get("configs") if isinstance(results, dict) else None
    if not isinstance(configs, dict) or not all(isinstance(c, dict) for c in configs.values()):
        raise CouplingError(f"got {file}, expected the results of lm-eval, with `configs`")
    require_shape(file, results, RESULTS)
    return results


def read_evaluation(file: Path) -> LoggedEvaluation:
    """Read one evaluation with the whole lines of its samples.

    A task without samples, and a line that was cut off, are named in a warning and left out.

    Returns:
        The results with the samples.

    Raises:
        CouplingError: if it has no samples, or samples that cannot be measured.
    """
    results = _read_results(file)
    files = samples_files(file, results)
    for task in results["configs"]:
        if task not in files:
            logger.warning("coupling: %s has no samples beside %s; it is left out", task, file)
    samples = {task: _read_samples(logged, task) for task, logged in files.items()}
    for task, of_task in samples.items():
        _compare_count(results, task, of_task)
    return LoggedEvaluation(file, results, samples)


def samples_files(file: Path, results: Mapping[str, Any]) -> dict[str, Path]:
    """Return the files of samples beside a file of results, by task.

    Raises:
        CouplingError: if there is none.
    """
    files = {}
    for task in results["configs"]:
        if (samples := _samples_file(file, task)) is not None:
            files[task] = samples
    if files:
        return files
    date = date_in(file)
    expected = f"samples_*_{date}.jsonl" if date else "samples_*.jsonl that can only be its own"
    raise CouplingError(f"got {file} without {expected} beside it; {_RERUN}")


def _samples_file(results: Path, task: str) -> Path | None:
    """Return the samples of a task that have the date of the results.

    Results that were renamed have no date. They take the only samples of the task in their folder,
    if there are no other results that these can belong to.
    """
    try:
        if date := date_in(results):
            exact = results.with_name(f"samples_{task}_{date}.jsonl")
            return exact if exact.is_file() else None
        beside = [file for file in results.parent.iterdir() if file.is_file()]
    except (OSError, ValueError):  # a task's name that no file can have
        return None
    dated = [file for file in beside if file.name == f"samples_{task}_{date_in(file)}.jsonl"]
    others = [file for file in beside if file.suffix == ".json" and file.name != results.name]
    is_certain = len(dated) == 1 and not any(map(_is_evaluation, others))
    return dated[0] if is_certain else None


def _is_evaluation(file: Path) -> bool:
    """Return whether a file has the name or the content of lm-eval's results."""
    try:
        return _has_name_of_results(file) or bool(_read_results(file))
    except CouplingError:
        return False


def _read_samples(file: Path, task: str) -> list[dict[str, Any]]:
    """Read the whole lines; a line that was cut off is named and left out."""
    samples = []
    try:
        for n, line in enumerate(read_lines(file), 1):
            if not line.strip():
                continue
            try:
                sample = parse_json(line.decode("utf-8"))
            except ValueError as error:
                logger.warning(
                    "coupling: line %d of %s is left out, for instance because it is cut off (%s)",
                    *(n, file, why(error)),
                )
                continue
            samples.append(_checked(sample, f"line {n} of {file}"))
    except OSError as error:
        raise CouplingError(f"got {file}, which cannot be read ({why(error)})") from None
    if not samples:
        raise CouplingError(f"got {file} without a whole line, expected the samples of {task}")
    return samples


def _checked(sample: Any, where: str) -> dict[str, Any]:
    has_names = isinstance(sample, dict) and isinstance(sample.get("doc_id"), int)
    if not has_names or not all(isinstance(sample.get(name), str) for name in _HASHES):
        raise CouplingError(f"got {where} without doc_hash and prompt_hash; {_RERUN}")
    arguments = sample.get("arguments")
    if not _is_numbered(arguments, "gen_args") or not all(
        _is_numbered(request, "arg") for request in arguments.values()
    ):
        raise CouplingError(f"got {where} without the requests of lm-eval (`arguments`); {_RERUN}")
    return sample


def _is_numbered(values: Any, name: str) -> bool:
    """Return whether a mapping has the names ``name_0, name_1, …``, at least one."""
    if not isinstance(values, dict) or not values:
        return False
    return values.keys() == {f"{name}_{n}" for n in range(len(values))}


def _compare_count(
    results: Mapping[str, Any], task: str, samples: Sequence[Mapping[str, Any]]
) -> None:
    evaluated = number(mapping((results.get("n-samples") or {}).get(task)).get("effective"))
    logged = len({sample["doc_id"] for sample in samples})
    if not math.isnan(evaluated) and logged != evaluated:
        logger.warning(
            "coupling: %d of %g documents of %s are among the samples", logged, evaluated, task
        )


def _nested(name: str, groups: Mapping[str, Sequence[str]], above: tuple[str, ...] = ()) -> Any:
    """Return a group as nested lists of names; a group within itself is left out."""
    if name not in groups:
        return name
    inside = (*above, name)
    return [_nested(member, groups, inside) for member in groups[name] if member not in inside]
