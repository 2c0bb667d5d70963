"""Command ``lm-eval-coupling check``: exactness and cost of a model on this machine."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rich.table import Table

from lm_eval_coupling.check.costs import Cost, costs
from lm_eval_coupling.check.free_memory import require_room
from lm_eval_coupling.check.oracle import BlockCheck, check_blocks
from lm_eval_coupling.console import terminal_console
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.harness.lm import CouplingLM
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.numerics.devices import device_named
from lm_eval_coupling.runs.provenance import about_software
from lm_eval_coupling.saved.strict_json import strict

RANKS = (10, 30, 50)
TEXT = (
    "The river rises in the hills behind the town and is at first no wider than a road. Further "
    "down it is joined by three streams, and where the last of them comes in there stands a mill "
    "that has not turned for sixty years."
)
_REQUESTS = (
    (TEXT, " The miller keeps bees."),
    (TEXT[:80], TEXT[80:120]),
    ("Two and two are", " four"),
    ("", "The"),
)


@dataclasses.dataclass(frozen=True)
class Checked:
    """Results of the check for one dtype of the weights."""

    dtype: str
    blocks: list[BlockCheck]
    scores_equal: bool
    costs: list[Cost]

    @property
    def ok(self) -> bool:
        """True if all blocks are exact, scores equal those of ``hf``, and prompts are measured."""
        return (
            self.scores_equal
            and all(block.ok for block in self.blocks)
            and not any(cost.reason for cost in self.costs)
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the results as JSON-able values."""
        return {
            "ok": self.ok,
            "blocks": [dataclasses.asdict(block) | {"ok": block.ok} for block in self.blocks],
            "scores_equal": self.scores_equal,
            "costs": [dataclasses.asdict(cost) for cost in self.costs],
        }


def check(
    model: str,
    *,
    device: str | None = None,
    dtypes: Sequence[str] = ("auto",),
    out: Path | None = None,
    tokens: int = 32,
) -> bool:
    """Check ``model`` and print a table.

    Args:
        model: a transformers folder, or a name on the hub.
        device: such as ``cuda`` or ``cpu``; by default the best device of this machine.
        dtypes: dtypes of the weights, each checked; ``auto`` is the dtype of the saved weights.
        out: JSON file for the results.
        tokens: number of tokens of the prompt.

    Returns:
        True if every check passed.

    Raises:
        CouplingError: for an absent or full device, an unknown dtype, or a model that cannot be
            loaded or measured.
    """
    torch_device = device_named(device)
    for dtype in dtypes:
        torch_dtype = getattr(torch, dtype, None)
        is_float = isinstance(torch_dtype, torch.dtype) and torch_dtype.is_floating_point
        if dtype != "auto" and not is_float:
            raise CouplingError(f"got dtype={dtype!r}, expected auto, float32, bfloat16 or float16")
    results = [_check_dtype(model, torch_device, dtype, tokens) for dtype in dtypes]
    is_cuda = torch_device.type == "cuda"
    name = torch.cuda.get_device_name(torch_device) if is_cuda else str(torch_device)
    summary = {
        "model": model,
        "device": name,
        "software": about_software(),
        "ok": all(result.ok for result in results),
        "dtypes": {result.dtype: result.as_dict() for result in results},
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(strict(summary), indent=1) + "\n", encoding="utf-8")
    _show(model, name, results)
    return bool(summary["ok"])


def _check_dtype(name: str, device: torch.device, dtype: str, tokens: int) -> Checked:
    with tempfile.TemporaryDirectory() as folder:
        coupling_lm = CouplingLM(
            pretrained=name,
            device=str(device),
            dtype=dtype,
            coupling_store=f"{folder}/store.sqlite",
            coupling_ranks="1",
        )
        assert coupling_lm.session is not None  # Its limit is not 0.
        model = coupling_lm.session.trained.model
        settings = Settings(tuple(k for k in RANKS if k <= model.d_model) or (1,))
        prompt = (coupling_lm.tok_encode(TEXT) * tokens)[:tokens]
        require_room(model, rank=settings.ranks[-1], seq=tokens)
        blocks = check_blocks(model, coupling_lm.model, prompt)
        prompt_costs = costs(model, prompt, settings)
        hf_lm = HFLM(pretrained=coupling_lm.model, tokenizer=coupling_lm.tokenizer, batch_size=1)
        # Scored after measuring, which must not have changed the model.
        equal = _scores(coupling_lm) == _scores(hf_lm)
        dtype_name = str(coupling_lm.model.dtype).removeprefix("torch.")
        return Checked(dtype_name, blocks, equal, prompt_costs)


def _scores(lm: HFLM) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(_REQUESTS)]
    return [tuple(answer) for answer in lm.loglikelihood(requests, disable_tqdm=True)]


def _show(model: str, device: str, results: Sequence[Checked]) -> None:
    table = Table(title=f"{model} on {device}", title_justify="left")
    for heading in ("weights", "what", "level", "certificate", "against autodiff", ""):
        table.add_column(heading, overflow="fold")
    for result in results:
        for block in result.blocks:
            against = block.problem or f"{block.error:.1e} ({block.rows} rows)"
            level = block.level + (f" ({block.why})" if block.why else "")
            what = f"{block.blocks} × {block.kind}"
            table.add_row(
                result.dtype, what, level, f"{block.certificate:.1e}", against, _word(block.ok)
            )
        scores = "equal" if result.scores_equal else "differ"
        table.add_row(
            result.dtype, "scores, against hf", "", "", scores, _word(result.scores_equal)
        )
        for cost in result.costs:
            alone = cost.together == 1
            what = "a prompt alone" if alone else f"a prompt of {cost.together} together"
            memory = f"{cost.announced / 1e6:.0f} MB announced"
            memory += "" if cost.measured is None else f", {cost.measured / 1e6:.0f} MB measured"
            table.add_row(
                result.dtype,
                what,
                "",
                f"{cost.seconds:.2g} s",
                cost.reason or memory,
                _word(cost.reason is None),
            )
    terminal_console().print(table)


def _word(ok: bool) -> str:
    return "ok" if ok else "[bold]FAILED[/bold]"
