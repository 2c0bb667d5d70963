"""`coupling-hf`: lm-eval's HFLM, which scores untouched, with a measuring run after the scoring."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from lm_eval_coupling.versions import require_versions

require_versions("lm-eval", "transformer-lens", "transformers")  # Before the imports below fail.

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from lm_eval_coupling.errors import CouplingError, Reason, reason_of
from lm_eval_coupling.harness import hooks, plugin
from lm_eval_coupling.harness.documents import Document, Requested
from lm_eval_coupling.harness.identity import named_tokenizer, prompt_identity
from lm_eval_coupling.harness.lm_eval_internals import wrap_generation, wrap_reading_of_config
from lm_eval_coupling.harness.prompts import Prompt, document_prompts
from lm_eval_coupling.harness.ranks import Part, Ranks
from lm_eval_coupling.harness.responses import continued_prompts
from lm_eval_coupling.measures.formulas.choices import PROMPT_PART, choices_by_part
from lm_eval_coupling.numerics.devices import device_named
from lm_eval_coupling.runs.announcement import announce
from lm_eval_coupling.runs.model_arguments import has_revisions
from lm_eval_coupling.runs.options import Options
from lm_eval_coupling.runs.results import CouplingInfo, add_to_results, with_logged_ids
from lm_eval_coupling.runs.rows import DocumentKey, DocumentPrompt
from lm_eval_coupling.runs.run import (
    Run,
    ScoredModel,
    describe,
    dry_run_lines,
    measure_documents,
    open_session,
    open_store,
    warn_of_failures,
)
from lm_eval_coupling.runs.sampling import choose
from lm_eval_coupling.runs.session import Session
from lm_eval_coupling.runs.store import MeasurementStore
from lm_eval_coupling.saved.prompting import describe_documents, encoding

# Below lm-eval's own logger, so that its verbosity and handler apply.
logger = logging.getLogger("lm_eval.coupling")


def _device_argument(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the device to load on, or nothing if HFLM's own choice is right.

    An accelerator that this machine does not have would end in an error of torch's.
    """
    device = arguments.get("device")
    if not isinstance(arguments["pretrained"], str) or (
        device == hooks.DEFAULT_DEVICE and not torch.cuda.is_available()
    ):
        return {}
    if device is None or str(device).split(":")[0] in ("cuda", "mps"):
        return {"device": str(device_named(device))}
    return {}


@register_model("coupling-hf")
class CouplingLM(HFLM):
    """lm-eval's `hf`, which also measures block coupling of a sample of the evaluated documents."""

    def __init__(self, pretrained: Any = None, **kwargs: Any) -> None:
        """Load the model as HFLM does, and wrap a twin on its weights for measuring.

        Args:
            pretrained: as for `hf`.
            **kwargs: everything that `hf` takes, and the ``coupling_`` arguments.

        Raises:
            CouplingError: for a wrong ``coupling_`` argument, before any work, or a model that
                cannot be measured.
        """
        plugin.install()
        arguments = {"pretrained": pretrained, **kwargs}
        hooks.require_device(kwargs.get("device"))
        options = self.coupling_options = Options.take_from(arguments)
        self.argument_names = set(arguments)
        store = open_store(options) if options.measures_anything else None
        wrap_reading_of_config(self, self._read_and_check_config)
        super().__init__(**arguments | _device_argument(arguments))
        tokenizer = named_tokenizer(arguments, self.model)
        self.encoding = encoding(arguments | {"tokenizer": tokenizer})
        self.coupling_info = CouplingInfo({})
        self.responses_with_reasoning: dict[tuple[int, ...], str] = {}
        self.session = self._open_session(store) if store is not None else None
        if self.session is not None and isinstance(self.think_end_token, str):
            wrap_generation(self, self._generate_and_keep_reasoning)
        if options.dry_run:
            for scoring in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                setattr(self, scoring, self._stop_before_scoring)

    def _read_and_check_config(self, read: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Refuse what the configuration already rules out, before the weights are loaded."""
        try:
            read(*args, **kwargs)
        except (OSError, ValueError) as error:
            name = args[0] if args else kwargs.get("pretrained")
            raise CouplingError(
                f"got model {name!r}, revision {kwargs.get('revision', 'main')!r}, "
                f"which transformers cannot load: {' '.join(str(error).split())}"
            ) from error
        config = self.config.get_text_config()
        d_model = getattr(config, "hidden_size", None)
        n_layers = getattr(config, "num_hidden_layers", None)
        if self.coupling_options.measures_anything and d_model and n_layers:
            self.coupling_options.settings.check_shape(d_model, n_layers)

    @property
    def _shares_on_cpus(self) -> bool:
        accelerator = getattr(self, "accelerator", None)
        return super().world_size == 1 and accelerator is not None and accelerator.num_processes > 1

    @property
    def rank(self) -> int:
        """Index of this process; HFLM shares documents among processes only on GPUs."""
        return self.accelerator.process_index if self._shares_on_cpus else super().rank

    @property
    def world_size(self) -> int:
        """Number of processes that share the documents."""
        return self.accelerator.num_processes if self._shares_on_cpus else super().world_size

    def _open_session(self, store: MeasurementStore) -> Session:
        if self.backend != "causal":
            raise CouplingError(
                f"got a {self.backend} model, expected a decoder-only one; "
                "use --model hf or coupling_limit=0"
            )
        session = open_session(
            self.coupling_options, self.model, store, self.tokenizer, quiet=self.rank != 0
        )
        for subject in session.subjects:
            subject.model.scored.follow_scoring(in_batches=self.batch_size != 1)
        return session

    def _follow_the_weights(self) -> None:
        """Wrap the model anew if it was trained, adapted or reloaded since the last evaluation."""
        assert self.session is not None  # record_coupling has returned otherwise
        if (change := self.session.trained.model.describe_change()) is not None:
            logger.info(
                "coupling: %s has changed since the model was last looked at; "
                "it is taken as another model",
                change,
            )
            self.session = self._open_session(self.session.store)

    def get_model_info(self) -> dict[str, Any]:
        """Return HFLM's facts for ``config`` in the results, with ``coupling`` beside them."""
        return super().get_model_info() | ({"coupling": self.coupling_info} if self.session else {})

    def announce_coupling(self, task_dict: Mapping[str, Any], call: Mapping[str, Any]) -> None:
        """Log what will be measured, before the scoring begins.

        Args:
            task_dict: the tasks, as `lm_eval.evaluate` takes them.
            call: all arguments of that call by name.
        """
        if self.session is None:
            return
        try:
            documents = Requested.of(task_dict).count(call.get("limit"), call.get("samples") or {})
            announce(self.session, self.coupling_options, self._model_name, documents)
        except Exception:  # an announcement must not cost an evaluation
            logger.debug("coupling: nothing was announced", exc_info=True)

    @property
    def _model_name(self) -> str:
        return str(getattr(self.pretrained, "name_or_path", self.pretrained))

    def record_coupling(
        self,
        task_dict: Mapping[str, Any],
        results: dict[str, Any] | None,
        call: Mapping[str, Any] | None = None,
    ) -> None:
        """Measure chosen documents of a scored evaluation and add the values to its results.

        Every process must call this; process 0 gathers and gets ``results``.

        Args:
            task_dict: the tasks, as `lm_eval.evaluate` took them.
            results: what it returned.
            call: all arguments of that call by name.

        Raises:
            CouplingError: in every process, if one of them cannot list its documents.
        """
        if self.session is None:
            return
        requested = Requested.of(task_dict)
        with Ranks(self.rank, self.world_size) as ranks:
            chosen, own, documents = self._choose(ranks, requested)
            if self.coupling_options.dry_run:
                self._end_dry_run(len(chosen), own)
            session = self.session
            parts = ranks.at_first(lambda: measure_documents(session, self._with_prompts(own)))
        if parts is None or results is None:
            return
        prompts = self._prompt_facts(requested, documents, call or {})
        info = self.coupling_info = self._info(parts, requested, results, call or {}, prompts)
        add_to_results(results, info, requested.members)
        warn_of_failures(info, len(chosen))

    def _choose(
        self, ranks: Ranks, requested: Requested
    ) -> tuple[set[DocumentKey], list[Document], set[DocumentKey]]:
        """Choose the documents to measure.

        Returns:
            The keys of all chosen ones, this process's chosen documents, and the keys of all
            documents that were evaluated.
        """
        documents: list[Document] = []

        def keys() -> list[DocumentKey]:
            self._follow_the_weights()
            documents.extend(requested.documents())
            return [document.key for document in documents]

        by_rank = ranks.everywhere(keys)
        options = self.coupling_options
        chosen = choose(chain(*by_rank), requested.roots, options.limit, options.seed)
        elsewhere = set(chain(*by_rank[: self.rank]))
        own = [d for d in documents if d.key in chosen and d.key not in elsewhere]
        return chosen, own, set(chain(*by_rank))

    def _generate_and_keep_reasoning(
        self, generate: Callable[..., Any], context: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Keep the reasoning that HFLM removes from responses."""
        generated = generate(context, *args, **kwargs)
        mask = kwargs["attention_mask"].bool()
        for prompt, kept, tokens in zip(context, mask, generated, strict=True):
            response = self.tok_decode(tokens[len(prompt) :].tolist())
            self.responses_with_reasoning[tuple(prompt[kept].tolist())] = response
        return generated

    def _stop_before_scoring(self, requests: Any, **_: Any) -> Any:
        """Replace every way to score in a dry run; by then lm-eval has built all requests."""
        raise hooks.DryRun

    def _end_dry_run(self, n_chosen: int, documents: Sequence[Document]) -> None:
        """Print what measuring would cost, and exit with code 0."""
        assert self.session is not None
        lines = dry_run_lines(self.session, self._with_prompts(documents))
        if self.rank == 0:
            heading = f"Dry run: {n_chosen} documents would be measured; on this process"
            print("\n".join([heading, *lines]))
        raise SystemExit(0)

    def _with_prompts(self, documents: Sequence[Document]) -> list[DocumentPrompt]:
        return [prompt for document in documents for prompt in self.prompts_of(document)]

    def prompts_of(self, document: Document) -> list[DocumentPrompt]:
        """Return what is measured of a document: its prompts, or texts that go on after them."""
        options = self.coupling_options
        # Nothing is generated in a dry run.
        parts = [PROMPT_PART] if options.dry_run else list(choices_by_part(options.position))
        requests, target = document.requests, document.target
        prompts: list[Prompt] = []
        try:
            if PROMPT_PART in parts:
                prompts = document_prompts(self, requests, target, options.prompt)
                prompts = prompts or [Prompt((), "context")]
            following = [part for part in parts if part != PROMPT_PART]
            prompts += continued_prompts(self, requests, target, following)
        except Exception as error:  # tasks and tokenizers raise anything
            problem = Reason("error", f"no prompt: {reason_of(error).words}")
            logger.warning(
                "coupling: %s of %s: %s", document.doc_id, document.key.task, problem.words
            )
            prompts = [Prompt((), "context", problem=problem)]
        numbers = Counter[str]()
        return [self._document_prompt(document, numbers, prompt) for prompt in prompts]

    def _document_prompt(
        self, document: Document, numbers: Counter[str], prompt: Prompt
    ) -> DocumentPrompt:
        """Number a prompt within its document and kind, and decode it."""
        numbers[prompt.kind] += 1
        decode = self.tokenizer.decode
        return DocumentPrompt(
            document=document.key,
            doc_id=document.doc_id,
            index=numbers[prompt.kind] - 1,
            kind=prompt.kind,
            tokens=prompt.tokens,
            text=decode(list(prompt.tokens)),
            problem=prompt.problem,
            span=prompt.span,
            token_texts=tuple(decode([prompt.tokens[i]]) for i in prompt.span or ()),
        )

    def _info(
        self,
        parts: Sequence[Part],
        requested: Requested,
        results: Mapping[str, Any],
        call: Mapping[str, Any],
        prompts: Mapping[str, Any],
    ) -> CouplingInfo:
        """Describe what all processes measured."""
        for rank, part in enumerate(parts):
            if part.error:
                logger.error(
                    "coupling: process %d failed, its documents are not measured: %s",
                    *(rank, part.error),
                )
        joined = Run.join(part.value for part in parts if part.error is None)
        rows = with_logged_ids(joined.rows, results, call.get("samples") or {})
        run = replace(joined, rows=rows)
        return self.describe(run, list(requested.tasks), prompts)

    def _prompt_facts(
        self, requested: Requested, documents: Iterable[DocumentKey], call: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return by task what decides its prompts, and number and digest of its documents.

        Args:
            requested: the tasks.
            documents: those evaluated, of any tasks.
            call: arguments that `lm_eval.evaluate` was called with.
        """
        hashes: dict[str, list[str]] = {}
        for key in documents:
            hashes.setdefault(key.task, []).append(key.doc_hash)
        samples = call.get("samples") or {}
        return {
            name: prompt_identity(self, task, samples.get(name), call)
            | {"documents": describe_documents(hashes.get(name, ()))}
            for name, task in requested.tasks.items()
        }

    def describe(
        self, run: Run, tasks: Sequence[str], prompts: Mapping[str, Any], **further: Any
    ) -> CouplingInfo:
        """Return what results and tables record of a run of this model.

        Args:
            run: the measured rows.
            tasks: names of the evaluated tasks.
            prompts: by task, what made its prompts.
            **further: facts that only one kind of run has.
        """
        assert self.session is not None
        named = not isinstance(self.pretrained, str) or has_revisions(
            self.pretrained, self.peft, self.delta
        )
        model = ScoredModel(
            name=self._model_name,
            revision=self.revision if named else "main",
            config=self.model.config,
        )
        options = self.coupling_options
        return describe(run, self.session, options, model, tasks, prompts=dict(prompts), **further)
