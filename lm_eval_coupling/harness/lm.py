"""`coupling-hf`: lm-eval's HFLM around one measuring :class:`Session`. Scoring is left to HFLM, untouched."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.harness import plugin
from lm_eval_coupling.harness.documents import Document, Requested
from lm_eval_coupling.harness.identity import prompt_identity
from lm_eval_coupling.harness.prompts import Prompt, document_prompts
from lm_eval_coupling.harness.ranks import Part, Ranks
from lm_eval_coupling.harness.tokenizers import told_apart
from lm_eval_coupling.numerics.devices import device_named
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.residual.untrained import untrained_twin
from lm_eval_coupling.runs.options import Options, has_revisions
from lm_eval_coupling.runs.provenance import about_measurement, about_model, about_software
from lm_eval_coupling.runs.results import CouplingInfo, add_to_results, with_logged_ids
from lm_eval_coupling.runs.rows import DocumentKey, Row, reasons
from lm_eval_coupling.runs.sampling import choose
from lm_eval_coupling.runs.session import Measured, Session, Subject
from lm_eval_coupling.runs.store import MeasurementStore, default_store_path
from lm_eval_coupling.saved.prompting import encoding
from lm_eval_coupling.saved.tables import TRAINED, UNTRAINED

logger = logging.getLogger(
    "lm_eval.coupling"
)  # below lm-eval's own, so that its verbosity and handler apply


_UNLESS_GIVEN = "cuda:0"  # lm-eval's command says so where no device is given; HFLM takes the CPU if there is no GPU


def _device_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The device that HFLM loads the model on: as it was given, if this machine has it, else the best there is."""
    device = arguments.get("device")
    if not isinstance(arguments["pretrained"], str) or (
        device == _UNLESS_GIVEN and not torch.cuda.is_available()
    ):
        return {}
    if device is None or str(device).split(":")[0] in (
        "cuda",
        "mps",
    ):  # HFLM would end in an error of torch's
        return {"device": str(device_named(device))}
    return {}


@register_model("coupling-hf")
class CouplingLM(HFLM):
    """Scores exactly as `hf` does, and measures block coupling of a sample of the evaluated documents afterwards."""

    _rank: int
    _world_size: int

    def __init__(self, pretrained: Any = None, **kwargs: Any) -> None:
        """Load the model as HFLM does and boot the measuring twin on its weights.

        Args:
            pretrained: as for `hf`.
            **kwargs: everything `hf` takes, and the ``coupling_`` arguments.

        Raises:
            CouplingError: for a wrong ``coupling_`` argument, before any work, or a model that cannot be measured.
        """
        plugin.install()
        arguments = {"pretrained": pretrained, **kwargs}
        options = self.coupling_options = Options.take_from(arguments)
        store = (
            MeasurementStore(options.store or default_store_path())
            if options.measures_anything
            else None
        )
        super().__init__(**arguments | _device_of(arguments))
        self.encoding = encoding(arguments | {"tokenizer": told_apart(arguments, self._model)})
        self._split_data_without_gpus()
        self.coupling_info = CouplingInfo({})
        self.session = self._open_session(store) if store is not None else None
        if options.dry_run:
            for scoring in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                setattr(self, scoring, self._stop_before_scoring)

    def _get_config(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what the configuration already rules out, before the weights are loaded."""
        try:
            super()._get_config(*args, **kwargs)
        except (OSError, ValueError) as error:
            what = f"model {args[0] if args else kwargs.get('pretrained')!r}, revision {kwargs.get('revision', 'main')!r}"
            raise CouplingError(
                f"got {what}, which transformers cannot load: {' '.join(str(error).split())}"
            ) from error
        config = self._config.get_text_config()
        d_model, n_layers = (
            getattr(config, "hidden_size", None),
            getattr(config, "num_hidden_layers", None),
        )
        if self.coupling_options.measures_anything and d_model and n_layers:
            self.coupling_options.settings.check_shape(d_model, n_layers)

    def _split_data_without_gpus(self) -> None:
        """HFLM shares the documents among processes only where it sees several GPUs."""
        accelerator = getattr(self, "accelerator", None)
        if self._world_size == 1 and accelerator is not None and accelerator.num_processes > 1:
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def _open_session(self, store: MeasurementStore) -> Session:
        options = self.coupling_options
        if self.backend != "causal":
            raise CouplingError(
                f"got a {self.backend} model, expected a decoder-only one; use --model hf or coupling_limit=0"
            )
        if self._device.type == "mps" and options.settings.dtype == "float64":
            raise CouplingError(
                "got coupling_dtype=float64 on MPS, which has no float64; use float32 or device=cpu"
            )
        trained = ResidualModel.wrap(self._model, self.tokenizer)
        options.settings.check_shape(trained.d_model, trained.n_layers)
        subjects = [Subject(TRAINED, trained)]
        if options.untrained is not None:
            twin = untrained_twin(self._model, options.untrained)
            subjects.append(Subject(UNTRAINED, ResidualModel.wrap(twin, self.tokenizer)))
        return Session(
            subjects=subjects,
            settings=options.settings,
            position=options.position,
            store=store,
            quiet=self.rank != 0,
        )

    def _follow_the_weights(self) -> None:
        """A model that is trained, adapted or reloaded between two evaluations is another one, and measured as such."""
        assert self.session is not None  # whoever measures nothing has returned
        if (change := self.session.trained.model.describe_change()) is not None:
            logger.info(
                "coupling: %s has changed since the model was last looked at; it is taken as another model",
                change,
            )
            self.session = self._open_session(self.session.store)

    def get_model_info(self) -> dict[str, Any]:
        """Facts about the model for ``config`` in the results, with ``coupling`` beside HFLM's own."""
        return super().get_model_info() | ({"coupling": self.coupling_info} if self.session else {})

    def record_coupling(
        self,
        task_dict: Mapping[str, Any],
        results: dict[str, Any] | None,
        how: Mapping[str, Any] | None = None,
    ) -> None:
        """Measure the chosen documents of an evaluation that has just been scored, and add the values to its results.

        Every process must call this; process 0 gathers and gets ``results``.

        Args:
            task_dict: the tasks, as `lm_eval.evaluate` took them.
            results: what it returned.
            how: all arguments that it was called with.

        Raises:
            CouplingError: in every process, if one of them cannot list its documents.
        """
        if self.session is None:
            return
        plugin.interrupted.clear()
        requested = Requested.of(task_dict)
        with Ranks(self.rank, self.world_size) as ranks:
            chosen, mine = self._chosen(ranks, requested)
            if self.coupling_options.dry_run:
                self._end_dry_run(chosen, mine)
            parts = ranks.at_first(lambda: self.measure(self._with_prompts(mine)))
        if parts is None or results is None:
            return
        info = self.coupling_info = self._info(parts, requested, results, how or {})
        add_to_results(results, info, requested.members)
        if info["interrupted"]:
            plugin.interrupted.set()
        elif chosen and not info["measured"]:
            logger.error(
                "coupling: none of %d documents could be measured: %s",
                len(chosen),
                reasons(info.rows),
            )
        elif info["failed"]:
            logger.warning(
                "coupling: %d documents were not measured: %s", info["failed"], reasons(info.rows)
            )

    def _chosen(
        self, ranks: Ranks, requested: Requested
    ) -> tuple[set[DocumentKey], list[Document]]:
        """All documents that are to be measured, and those of this process."""
        documents: list[Document] = []

        def keys() -> list[DocumentKey]:
            self._follow_the_weights()
            documents.extend(requested.documents())
            return [document.key for document in documents]

        by_rank = ranks.everywhere(keys)
        chosen = choose(
            chain(*by_rank),
            requested.roots,
            self.coupling_options.limit,
            self.coupling_options.seed,
        )
        elsewhere = set(chain(*by_rank[: self.rank]))
        return chosen, [d for d in documents if d.key in chosen and d.key not in elsewhere]

    def _stop_before_scoring(self, requests: Any, **_: Any) -> Any:
        """Stands for every way to score in a dry run: by then lm-eval has built all requests."""
        raise plugin.DryRun

    def _end_dry_run(self, chosen: Collection[Any], documents: list[Document]) -> None:
        """Say what measuring would cost, and end well."""
        prompts = [prompt.tokens for _, _, prompt in self._with_prompts(documents)]
        told = self.session.try_one(prompts) if prompts and self.session is not None else []
        if self.rank == 0:
            print(
                "\n".join(
                    [f"Dry run: {len(chosen)} documents would be measured; on this process", *told]
                )
            )
        raise SystemExit(0)

    def measure(
        self, prompts: Sequence[tuple[Document, int, Prompt]]
    ) -> tuple[list[Row], dict[str, Any]]:
        """Measure prompts, each with its document and its number there.

        Returns:
            Rows, those of the trained weights first, and what to count: ``reused`` ones, and whether it was ``interrupted``.
        """
        rows: list[Row] = []
        interrupted = False
        assert self.session is not None
        for session in self.session.at_every_place():
            asked = [one for one in prompts if session.has(one[2].tokens)]
            measured = session.measure([prompt.tokens for _, _, prompt in asked])
            rows += [
                self._row(document, index, prompt, subject.weights, measured, session.place)
                for subject in session.subjects
                for document, index, prompt in asked
                if prompt.tokens in measured.of(subject.weights)
            ]
            if interrupted := measured.interrupted:
                break
        rows.sort(key=lambda row: row.weights != TRAINED)  # stable: places in their order
        reused = sum(row.reused for row in rows if row.weights == TRAINED and row.place == 0)
        return rows, {"reused": reused, "interrupted": interrupted}

    def _with_prompts(self, documents: Sequence[Document]) -> list[tuple[Document, int, Prompt]]:
        return [
            (document, index, prompt)
            for document in documents
            for index, prompt in enumerate(self._prompts(document))
        ]

    def _prompts(self, document: Document) -> list[Prompt]:
        try:
            return document_prompts(
                self, document.requests, document.target, self.coupling_options.prompt
            )
        except Exception as error:
            logger.warning(
                "coupling: no prompt for document %s of %s: %s",
                document.doc_id,
                document.key.task,
                error,
            )
            return []

    def _row(
        self,
        document: Document,
        index: int,
        prompt: Prompt,
        weights: str,
        measured: Measured,
        place: int,
    ) -> Row:
        return Row(
            document=document.key,
            doc_id=document.doc_id,
            prompt_index=index,
            kind=prompt.kind,
            text=self.tokenizer.decode(list(prompt.tokens)),
            weights=weights,
            measured=measured.of(weights)[prompt.tokens],
            reused=prompt.tokens in measured.reused.get(weights, ()),
            place=place,
        )

    def _info(
        self,
        parts: list[Part],
        requested: Requested,
        results: Mapping[str, Any],
        how: Mapping[str, Any],
    ) -> CouplingInfo:
        """What all processes found, with how it came about."""
        for rank, part in enumerate(parts):
            if part.error:
                logger.error(
                    "coupling: process %d failed, its documents are not measured: %s",
                    rank,
                    part.error,
                )
        found = [part.found for part in parts if part.error is None]
        samples = how.get("samples") or {}
        rows = with_logged_ids([row for rows, _ in found for row in rows], results, samples)
        facts = self.about_run(rows, requested.tasks, [counts for _, counts in found])
        tasks = requested.tasks.items()
        facts["prompts"] = {
            name: prompt_identity(self, task, samples.get(name), how) for name, task in tasks
        }
        return CouplingInfo(facts, rows, self.coupling_options.out)

    @property
    def _revision(self) -> str:
        """That of the weights; a model that was given as one is of the revision that it is said to be."""
        named = not isinstance(self.pretrained, str) or has_revisions(
            self.pretrained, self.peft, self.delta
        )
        return self.revision if named else "main"

    def about_run(
        self, rows: Sequence[Row], tasks: Iterable[str], counts: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """What results and tables say of these rows and of how they came about; ``counts`` are those of every process."""
        options = self.coupling_options
        facts = about_software() | {
            "settings": options.as_dict(),
            "model": str(getattr(self.pretrained, "name_or_path", self.pretrained)),
            "revision": self._revision,
        }
        assert self.session is not None
        facts |= about_model(self.session, self.model.config) | about_measurement(
            rows, tasks, options.settings.ranks
        )
        if UNTRAINED in facts:
            facts[UNTRAINED]["seed"] = options.untrained
        return facts | {
            "reused": sum(count["reused"] for count in counts),
            "interrupted": any(count["interrupted"] for count in counts),
        }
