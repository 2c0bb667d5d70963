"""`lm-eval-coupling check`: is this model measured exactly here, and what does it cost? One table, one exit code."""

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
from rich.console import Console
from rich.table import Table

from lm_eval_coupling.check.costs import Cost, costs
from lm_eval_coupling.check.free_memory import require_room
from lm_eval_coupling.check.oracle import BlockCheck, check_blocks
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.harness.lm import CouplingLM
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.numerics.devices import device_named
from lm_eval_coupling.runs.provenance import about_software
from lm_eval_coupling.saved.strict_json import strict

RANKS = (10, 30, 50)
TEXT = (
    "The river rises in the hills behind the town and is at first no wider than a road. Further down it is joined by three "
    "streams, and where the last of them comes in there stands a mill that has not turned for sixty years."
)
_REQUESTS = (
    (TEXT, " The miller keeps bees."),
    (TEXT[:80], TEXT[80:120]),
    ("Two and two are", " four"),
    ("", "The"),
)


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was found of one dtype."""

    dtype: str
    blocks: list[BlockCheck]
    scores_equal: bool
    costs: list[Cost]

    @property
    def ok(self) -> bool:
        """Whether every kind of block is exact, scores are those of ``hf``, and prompts can be measured."""
        return (
            self.scores_equal
            and all(b.ok for b in self.blocks)
            and not any(cost.reason for cost in self.costs)
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
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
        device: such as ``cuda`` or ``cpu``; by default the best there is.
        dtypes: of the weights, each a check of its own; ``auto`` is that they were saved in.
        out: a JSON file that all of it is written to.
        tokens: of the prompt.

    Returns:
        Whether every check passed.

    Raises:
        CouplingError: for a device that is not there or has no room, a dtype that does not exist, or a model that cannot be
            loaded or measured.
    """
    where = device_named(device)
    for dtype in dtypes:
        known = getattr(torch, dtype, None)
        if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
            raise CouplingError(f"got dtype={dtype!r}, expected auto, float32, bfloat16 or float16")
    found = [_checked(model, where, dtype, tokens) for dtype in dtypes]
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else str(where)
    everything = {
        "model": model,
        "device": name,
        "software": about_software(),
        "ok": all(one.ok for one in found),
        "dtypes": {one.dtype: one.as_dict() for one in found},
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(strict(everything), indent=1) + "\n", encoding="utf-8")
    _show(model, name, found)
    return bool(everything["ok"])


def _checked(name: str, device: torch.device, dtype: str, tokens: int) -> Checked:
    with tempfile.TemporaryDirectory() as folder:
        ours = CouplingLM(
            pretrained=name,
            device=str(device),
            dtype=dtype,
            coupling_store=f"{folder}/store.sqlite",
            coupling_ranks="1",
        )
        assert ours.session is not None  # it measures
        model = ours.session.trained.model
        settings = Settings(tuple(k for k in RANKS if k <= model.d_model) or (1,))
        prompt = (ours.tok_encode(TEXT) * tokens)[:tokens]
        require_room(model, rank=settings.ranks[-1], seq=tokens)
        blocks = check_blocks(model, ours.model, prompt)
        taken = costs(model, prompt, settings)
        theirs = HFLM(pretrained=ours.model, tokenizer=ours.tokenizer, batch_size=1)
        equal = _scores(ours) == _scores(
            theirs
        )  # after measuring: it must have left the model as it was
        return Checked(str(ours.model.dtype).removeprefix("torch."), blocks, equal, taken)


def _scores(lm: HFLM) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(_REQUESTS)]
    return [tuple(answer) for answer in lm.loglikelihood(requests, disable_tqdm=True)]


def _show(model: str, device: str, found: Sequence[Checked]) -> None:
    table = Table(title=f"{model} on {device}", title_justify="left")
    for heading in ("weights", "what", "level", "certificate", "against autodiff", ""):
        table.add_column(heading, overflow="fold")
    for one in found:
        for block in one.blocks:
            against = block.problem or f"{block.error:.1e} ({block.rows} rows)"
            level = block.level + (f" ({block.why})" if block.why else "")
            what = f"{block.blocks} × {block.kind}"
            table.add_row(
                one.dtype, what, level, f"{block.certificate:.1e}", against, _word(block.ok)
            )
        scores = "equal" if one.scores_equal else "differ"
        table.add_row(one.dtype, "scores, against hf", "", "", scores, _word(one.scores_equal))
        for cost in one.costs:
            what = (
                "a prompt alone" if cost.together == 1 else f"a prompt of {cost.together} together"
            )
            memory = f"{cost.announced / 1e6:.0f} MB announced"
            memory += "" if cost.measured is None else f", {cost.measured / 1e6:.0f} MB measured"
            table.add_row(
                one.dtype,
                what,
                "",
                f"{cost.seconds:.2g} s",
                cost.reason or memory,
                _word(cost.reason is None),
            )
    Console().print(table)


def _word(ok: bool) -> str:
    return "ok" if ok else "[bold]FAILED[/bold]"
