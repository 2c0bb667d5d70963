"""`coupling-hf`: lm-eval's HFLM that also measures block coupling. With plugin.py, the only module that knows lm-eval."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import math
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import handle_non_serializable, hash_string
from tqdm.auto import tqdm

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.harness import plugin
from lm_eval_coupling.harness.prompts import Prompt, document_prompts
from lm_eval_coupling.harness.sampling import DocumentKey, choose
from lm_eval_coupling.jacobians.engine import resolve_token
from lm_eval_coupling.measures.coupling import chance_level
from lm_eval_coupling.measures.tokens import cost
from lm_eval_coupling.measuring.prompt import DTYPES, PromptCoupling, Settings, groups, measure_prompts
from lm_eval_coupling.measuring.store import MeasurementStore, default_store_path
from lm_eval_coupling.measuring.summary import document_value, headline_rank, mean_and_error, summarize
from lm_eval_coupling.numerics.memory import memory_of
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.residual.fingerprint import fingerprint
from lm_eval_coupling.residual.untrained import untrained_twin
from lm_eval_coupling.saved import tables as records

logger = logging.getLogger("lm_eval.coupling")  # below lm-eval's own, so that its verbosity and handler apply

PACKAGES = ("lm-eval-coupling", "lm-eval", "transformer-lens", "transformers", "torch")


@dataclass(frozen=True)
class Options:
    """The ``coupling_`` arguments of a run, checked."""

    settings: Settings
    limit: int | None
    seed: int
    position: int
    untrained: int | None
    store: Path
    out: Path | None

    @classmethod
    def parse(
        cls,
        ranks: Any = "10+30+50",
        limit: Any = 100,
        seed: Any = 0,
        measures: Any = "depth+regularity",
        position: Any = -1,
        dtype: str = "float32",
        method: str = "auto",
        window: Any = None,
        tokens: Any = "last8",
        layers: Any = "spaced4",
        trajectories: Any = False,
        untrained: Any = None,
        store: Any = None,
        out: Any = None,
    ) -> Options:
        """Read the arguments as lm-eval hands them over: strings, numbers or lists.

        Raises:
            CouplingError: naming the argument that is wrong.
        """
        options = cls(
            Settings(
                tuple(_whole("ranks", k) for k in _several(ranks)),
                tuple(map(str, _several(measures))),
                dtype,
                method,
                None if window is None else _whole("window", window),
                str(tokens),
                str(layers),
                bool(_whole("trajectories", int(trajectories) if isinstance(trajectories, bool) else trajectories)),
            ),
            None if limit == "all" else _whole("limit", limit),
            _whole("seed", seed),
            _whole("position", position),
            None if untrained is None else _whole("untrained", untrained),
            Path(store).expanduser() if store else default_store_path(),
            Path(out).expanduser() if out else None,
        )
        if options.limit is not None and options.limit < 0:
            raise CouplingError(f"got coupling_limit={limit}, expected a number of documents, 0 (only score) or all")
        if options.out is not None:
            plugin.require_writable(options.out)
        return options

    def as_dict(self) -> dict[str, Any]:
        """Every setting that a reader of the results must know."""
        return self.settings.as_dict() | {
            "limit": "all" if self.limit is None else self.limit,
            "seed": self.seed,
            "position": self.position,
        }


_OPTION_NAMES = (*inspect.signature(Options.parse).parameters,)


def _several(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.strip("[]() ").replace("+", ",").split(",") if part.strip()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _whole(name: str, value: Any) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise CouplingError(f"got coupling_{name}={value!r}, expected a whole number") from None


@dataclass(frozen=True)
class Document:
    """One evaluated document of this process, with its requests."""

    key: DocumentKey
    doc_id: int
    requests: list[Any]
    target: Any


@dataclass(frozen=True)
class Subject:
    """Weights whose coupling is measured: ``trained``, those that are scored, or ``untrained``."""

    weights: str
    model: ResidualModel
    fingerprint: str


@register_model("coupling-hf")
class CouplingLM(HFLM):
    """Scores exactly as `hf` does, and measures block coupling of a sample of the evaluated documents afterwards."""

    def __init__(self, pretrained: Any, **kwargs: Any) -> None:
        """Load the model as HFLM does and boot the measuring twin on its weights.

        Args:
            pretrained: as for `hf`.
            **kwargs: everything `hf` takes, and the ``coupling_`` arguments.

        Raises:
            CouplingError: for a wrong ``coupling_`` argument, before any work, or a model that cannot be measured.
        """
        plugin.install()
        self.coupling_options = Options.parse(**_take_coupling_arguments(kwargs))
        if kwargs.get("tp_plan"):
            raise CouplingError("got tp_plan, which splits every weight over processes; use --model hf to only score")
        self._measuring = self.coupling_options.limit != 0
        self._store = MeasurementStore(self.coupling_options.store) if self._measuring else None
        super().__init__(pretrained, **kwargs)
        self._split_data_without_gpus()
        self.coupling_info: dict[str, Any] = {}
        if self._measuring:
            if self.backend != "causal":
                raise CouplingError(
                    f"got a {self.backend} model, expected a decoder-only one; use --model hf or coupling_limit=0"
                )
            if self._device.type == "mps" and self.coupling_options.settings.dtype == "float64":
                raise CouplingError("got coupling_dtype=float64 on MPS, which has no float64; use float32 or device=cpu")
            self.residual_model = ResidualModel.wrap(self._model, self.tokenizer)
            self.coupling_options.settings.check_shape(self.residual_model.d_model, self.residual_model.n_layers)
            self._trained = Subject("trained", self.residual_model, fingerprint(self._model))
            self._subjects = [self._trained]
            if (seed := self.coupling_options.untrained) is not None:
                twin = untrained_twin(self._model, seed)
                self._subjects.append(Subject("untrained", ResidualModel.wrap(twin, self.tokenizer), fingerprint(twin)))

    def _get_config(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what the configuration already rules out, before the weights are loaded."""
        try:
            super()._get_config(*args, **kwargs)
        except (OSError, ValueError) as error:
            what = f"model {args[0] if args else kwargs.get('pretrained')!r}, revision {kwargs.get('revision', 'main')!r}"
            raise CouplingError(f"got {what}, which transformers cannot load: {str(error).splitlines()[0]}") from error
        shape = [getattr(self._config.get_text_config(), name, None) for name in ("hidden_size", "num_hidden_layers")]
        if self._measuring and all(shape):
            self.coupling_options.settings.check_shape(*shape)

    def _split_data_without_gpus(self) -> None:
        """HFLM shares the documents among processes only where it sees several GPUs."""
        accelerator = getattr(self, "accelerator", None)
        if self._world_size == 1 and accelerator is not None and accelerator.num_processes > 1:
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def get_model_info(self) -> dict[str, Any]:
        """Facts about the model for ``config`` in the results, with ``coupling`` beside HFLM's own."""
        return super().get_model_info() | ({"coupling": self.coupling_info} if self._measuring else {})

    def record_coupling(self, task_dict: Mapping[str, Any], results: dict[str, Any] | None) -> None:
        """Measure the chosen documents of an evaluation that has just been scored, and add the values to its results.

        Every process must call this; process 0 gathers and gets ``results``.
        """
        if not self._measuring:
            return
        tasks, roots = _tasks_and_roots(task_dict)
        documents = list(_documents(tasks))
        by_rank = self._gather_everywhere([d.key for d in documents])
        chosen = choose(chain(*by_rank), roots, self.coupling_options.limit, self.coupling_options.seed)
        elsewhere = set(chain(*by_rank[: self.rank]))
        mine = [d for d in _distinct(documents) if d.key in chosen and d.key not in elsewhere]
        measured, counts = self._measure(mine)
        gathered = self.gather_object((measured, counts), dst=0)
        if results is None:
            return
        rows = [row for part, _ in gathered for row in part]
        totals = {name: sum(part[name] for _, part in gathered) for name in counts}
        trained = [row for row in rows if row["weights"] == "trained"]
        values = _document_couplings(trained, headline_rank(self.coupling_options.settings.ranks))
        self.coupling_info = self._describe(rows, totals, tasks)
        _add_to_results(results, values, _members(roots, task_dict), self.coupling_info)
        plugin.pending_tables[self.coupling_info["run_id"]] = lambda folder, date: self._write(rows, folder, date)
        if not self.coupling_info["measured"] and chosen:
            logger.error("coupling: none of %d documents could be measured: %s", len(chosen), _reasons(rows))
        elif self.coupling_info["failed"]:
            logger.warning("coupling: %d documents were not measured: %s", self.coupling_info["failed"], _reasons(rows))

    def _gather_everywhere(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        parts: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(parts, value)
        return parts

    def _measure(self, documents: list[Document]) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Rows of this process's documents, each distinct prompt measured once; Ctrl-C keeps what is there."""
        prompts = {document.key: self._prompts(document) for document in documents}
        everything = [prompt for group in prompts.values() for prompt in group]
        known: dict[str, PromptCoupling] = {}
        counts = {"prompts": 0, "reused": 0, "interrupted": 0}
        try:
            for subject in self._subjects:
                known.update(self._known(subject, everything))
            counts["reused"] = len(self._rows(self._trained, documents, prompts, known))
            for subject in self._subjects:
                self._measure_what_is_missing(subject, everything, known)
        except KeyboardInterrupt:
            counts["interrupted"] = 1
            done = len(self._rows(self._trained, documents, prompts, known))
            logger.warning("coupling: interrupted, %d of %d prompts are measured and kept", done, len(everything))
        rows = [row for subject in self._subjects for row in self._rows(subject, documents, prompts, known)]
        counts["prompts"] = len(rows)
        return rows, counts

    def _rows(
        self,
        subject: Subject,
        documents: list[Document],
        prompts: Mapping[DocumentKey, list[Prompt]],
        known: Mapping[str, PromptCoupling],
    ) -> list[dict[str, Any]]:
        found = [
            (document, index, prompt, known.get(self._key(subject, prompt)))
            for document in documents
            for index, prompt in enumerate(prompts[document.key])
        ]
        return [
            self._row(document, index, prompt, record) | {"weights": subject.weights}
            for document, index, prompt, record in found
            if record is not None
        ]

    def _prompts(self, document: Document) -> list[Prompt]:
        try:
            return document_prompts(self, document.requests, document.target)
        except Exception as error:
            logger.warning("coupling: no prompt for document %s of %s: %s", document.doc_id, document.key.task, error)
            return []

    def _key(self, subject: Subject, prompt: Prompt) -> str:
        options = self.coupling_options
        return self._store.key(subject.fingerprint, options.settings.as_dict(), prompt.tokens, options.position)

    def _known(self, subject: Subject, prompts: Iterable[Prompt]) -> dict[str, PromptCoupling]:
        """What earlier runs have measured of these prompts."""
        found = ((key, self._store.get(key)) for key in {self._key(subject, prompt) for prompt in prompts})
        return {key: PromptCoupling.from_columns(columns) for key, columns in found if columns is not None}

    def _measure_what_is_missing(self, subject: Subject, prompts: list[Prompt], known: dict[str, PromptCoupling]) -> None:
        """Fill ``known``: each distinct prompt once, a few of about the same length at a time, stored as they are made."""
        waiting = list(dict.fromkeys(prompt.tokens for prompt in prompts if self._key(subject, prompt) not in known))
        batches = groups(subject.model, waiting, self.coupling_options.settings)
        if batches:
            self._announce_memory(batches, waiting)
            self._announce_tokenwise(max(map(len, waiting)))
            batches.insert(0, batches.pop(len(batches) // 2))  # the time announced is that of the median length
        hidden = self.rank != 0 or not prompts
        what = "Measuring coupling" + (", untrained" if subject is not self._trained else "")
        with tqdm(total=len(prompts), desc=what, disable=hidden, initial=len(prompts) - len(waiting)) as bar:
            for number, batch in enumerate(batches):
                start = time.perf_counter()
                self._measure_batch(subject, [waiting[i] for i in batch], known)
                bar.update(len(batch))
                if number == 0:
                    self._announce(len(prompts), len(waiting), (time.perf_counter() - start) / len(batch))
            if not batches:
                self._announce(len(prompts), 0, 0.0)

    def _measure_batch(self, subject: Subject, prompts: list[tuple[int, ...]], known: dict[str, PromptCoupling]) -> None:
        options = self.coupling_options
        for record in measure_prompts(subject.model, prompts, options.position, options.settings):
            key = self._key(subject, Prompt(record.tokens, ""))
            known[key] = record
            if record.certificate is not None or record.norms is not None:
                self._keep(key, record)

    def _keep(self, key: str, measurement: PromptCoupling) -> None:
        try:
            self._store.put(key, measurement.to_columns())
        except Exception as error:
            logger.warning("coupling: a measurement could not be stored (%s); it stays in this run's tables", error)

    def _row(self, document: Document, index: int, prompt: Prompt, measurement: PromptCoupling) -> dict[str, Any]:
        return {
            "task": document.key.task,
            "doc_id": document.doc_id,
            "doc_hash": document.key.doc_hash,
            "prompt_hash": document.key.prompt_hash,
            "prompt_index": index,
            "kind": prompt.kind,
            "text": self.tokenizer.decode(list(prompt.tokens)),
            "n_tokens": len(prompt.tokens),
        } | measurement.to_columns()

    def _announce(self, prompts: int, waiting: int, seconds: float) -> None:
        if self.rank != 0 or not prompts:
            return
        logger.info(
            "coupling: %d prompts on this process, %d distinct ones not measured before, about %.1f s each",
            *(prompts, waiting, seconds),
        )

    def _announce_memory(self, batches: list[list[int]], waiting: list[tuple[int, ...]]) -> None:
        """What the largest batch takes beside the model."""
        if self.rank != 0:
            return
        settings = self.coupling_options.settings
        size = {"rank": settings.ranks[-1], "itemsize": DTYPES[settings.dtype].itemsize}
        needed = (
            memory_of(self.residual_model, seq=max(len(waiting[i]) for i in batch), prompts=len(batch), **size)
            for batch in batches
        )
        logger.info("coupling: measuring takes %s", max(needed, key=lambda memory: memory.total))

    def _announce_tokenwise(self, longest: int) -> None:
        """What measures over tokens cost, before the first prompt is measured."""
        settings, model = self.coupling_options.settings, self.residual_model
        try:
            jacobians, megabytes = cost(
                model.n_layers, model.d_model, resolve_token(self.coupling_options.position, longest), settings
            )
        except CouplingError:
            return  # tokens that the prompt does not have: its record says so
        if jacobians and self.rank == 0:
            logger.info(
                "coupling: measures over tokens take up to %d Jacobians more for a prompt, where the depth takes %d; "
                "%.0f MB of them at a time",
                *(jacobians, model.n_layers, megabytes),
            )

    def _describe(self, rows: list[dict[str, Any]], totals: dict[str, int], tasks: Mapping[str, Any]) -> dict[str, Any]:
        options, model = self.coupling_options, self.residual_model
        ranks = options.settings.ranks
        summaries = {subject.weights: _summaries(rows, subject.weights, tasks, ranks) for subject in self._subjects}
        trained = summaries.pop("trained")
        architecture = self.model.config.get_text_config()
        certificates = [row["certificate"].max() for row in rows if row["certificate"] is not None]
        return {
            "run_id": uuid.uuid4().hex,
            "schema_version": records.SCHEMA_VERSION,
            "settings": options.as_dict(),
            "versions": {name: _version(name) for name in PACKAGES},
            "model": str(getattr(self.pretrained, "name_or_path", self.pretrained)),
            "revision": self.revision,
            "fingerprint": self._trained.fingerprint,
            "model_dtype": str(model.dtype),
            "device": str(self.device),
            "d_model": model.d_model,
            "n_layers": model.n_layers,
            "n_params": model.n_params,
            "n_heads": getattr(architecture, "num_attention_heads", None),
            "vocab_size": getattr(architecture, "vocab_size", None),
            "headline_rank": headline_rank(ranks),
            "chance": {k: chance_level(k) for k in ranks},
            "measured": sum(s["measured"] for s in trained.values()),
            "failed": sum(s["failed"] for s in trained.values()),
            "reused": totals["reused"],
            "interrupted": bool(totals["interrupted"]),
            "worst_certificate": float(max(certificates, default=math.nan)),
            "tasks": trained,
        } | {weights: {"seed": options.untrained, "tasks": tasks} for weights, tasks in summaries.items()}

    def _write(self, rows: list[dict[str, Any]], folder: Path | None, date: str) -> list[Path]:
        folder = self.coupling_options.out or folder
        return records.write_tables(rows, folder, date, self.coupling_info) if folder else []


def _take_coupling_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove the ``coupling_`` arguments from ``kwargs``; refuse unknown ones with the nearest right name."""
    taken = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("coupling")}
    known = [f"coupling_{name}" for name in _OPTION_NAMES]
    for name in taken:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise CouplingError(f"got unknown argument {name}, did you mean {nearest}? There are {', '.join(known)}")
    return {name.removeprefix("coupling_"): value for name, value in taken.items()}


def _tasks_and_roots(task_dict: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """All leaf tasks, and what was requested as nested lists of task names."""
    if "tasks" in task_dict:
        tasks, groups = task_dict["tasks"], task_dict.get("groups", {})
    else:
        from lm_eval.evaluator_utils import _handle_back_comp

        groups, tasks = _handle_back_comp(dict(task_dict))
    inner = {g.name for group in groups.values() for g in group.get_all_groups()}
    roots: list[Any] = [_nested(group) for name, group in groups.items() if name not in inner]
    grouped = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    return dict(tasks), roots + [name for name in tasks if name not in grouped]


def _nested(group: Any) -> list[Any]:
    return [member.task_name if hasattr(member, "task_name") else _nested(member) for member in group]


def _documents(tasks: Mapping[str, Any]) -> Iterable[Document]:
    for name, task in tasks.items():
        by_id: dict[int, list[Any]] = {}
        for instance in task.instances or []:
            by_id.setdefault(instance.doc_id, []).append(instance)
        for doc_id, requests in by_id.items():
            requests.sort(key=lambda request: request.idx)
            first = requests[0]
            yield Document(
                DocumentKey(name, doc_hash(first.doc), hash_string(first.arguments[0])),
                doc_id,
                requests,
                _target(task, first.doc),
            )


def _target(task: Any, doc: Any) -> Any:
    """The task's target; tasks written in Python may have none, and it only matters where there is no context."""
    try:
        return task.doc_to_target(doc)
    except Exception:
        return None


def _distinct(documents: Iterable[Document]) -> Iterable[Document]:
    """Equal documents with equal prompts are one."""
    seen: set[DocumentKey] = set()
    for document in documents:
        if document.key not in seen:
            seen.add(document.key)
            yield document


def doc_hash(doc: Any) -> str:
    """lm-eval's own hash of a document: what samples and tables are joined on."""
    return hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False))


def _key(row: Mapping[str, Any]) -> DocumentKey:
    return DocumentKey(row["task"], row["doc_hash"], row["prompt_hash"])


def _summaries(
    rows: Iterable[Mapping[str, Any]], weights: str, tasks: Iterable[str], ranks: Sequence[int]
) -> dict[str, Any]:
    by_task: dict[str, dict[DocumentKey, list[PromptCoupling]]] = {}
    for row in rows:
        if row["weights"] == weights:
            by_task.setdefault(row["task"], {}).setdefault(_key(row), []).append(PromptCoupling.from_columns(dict(row)))
    return {task: summarize(by_task[task], ranks) for task in tasks if task in by_task}


def _document_couplings(rows: Iterable[Mapping[str, Any]], rank: int) -> dict[DocumentKey, float]:
    prompts: dict[DocumentKey, list[PromptCoupling]] = {}
    for row in rows:
        prompts.setdefault(_key(row), []).append(PromptCoupling.from_columns(dict(row)))
    return {key: document_value(group, rank) for key, group in prompts.items()}


def _members(roots: list[Any], task_dict: Mapping[str, Any]) -> dict[str, list[str]]:
    groups = task_dict.get("groups", {}) if "tasks" in task_dict else {}
    return {name: [task.task_name for task in group.get_all_tasks()] for name, group in groups.items()}


def _add_to_results(
    results: dict[str, Any], values: Mapping[DocumentKey, float], members: Mapping[str, list[str]], info: dict[str, Any]
) -> None:
    """One more metric per task and group, and one more value per sample."""
    names = [name for name in results["results"] if name not in members]
    for name, tasks in {**{name: [name] for name in names}, **members}.items():
        found = mean_and_error(value for key, value in values.items() if key.task in tasks)
        if not found["n"]:
            continue
        metric = {"coupling,none": found["mean"], "coupling_stderr,none": found["stderr"]}
        if found["n"] < 2:
            metric["coupling_stderr,none"] = "N/A"
        for column in ("results", "groups"):
            if name in results.get(column, {}):
                results[column][name].update(metric)
        results.setdefault("higher_is_better", {}).setdefault(name, {})["coupling"] = True
    for task, samples in (results.get("samples") or {}).items():
        for sample in samples:
            value = values.get(DocumentKey(task, sample["doc_hash"], sample["prompt_hash"]), math.nan)
            sample["coupling"] = None if math.isnan(value) else value


def _reasons(rows: Iterable[Mapping[str, Any]]) -> str:
    return "; ".join(sorted({row["reason"] for row in rows if row["reason"]})) or "no prompt"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
