"""The ``coupling_`` arguments of a run, read as lm-eval hands them over: strings, numbers or lists."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.harness import plugin
from lm_eval_coupling.measuring.prompt import Settings
from lm_eval_coupling.measuring.store import default_store_path

PREFIX = "coupling_"


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
        *,
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
        """Check every argument, without its prefix.

        Raises:
            CouplingError: naming the argument that is wrong.
        """
        options = cls(
            settings=Settings(
                ranks=tuple(_whole("ranks", k) for k in _several(ranks)),
                measures=tuple(map(str, _several(measures))),
                dtype=dtype,
                method=method,
                window=None if window is None else _whole("window", window),
                tokens=str(tokens),
                layers=str(layers),
                trajectories=bool(
                    _whole("trajectories", int(trajectories) if isinstance(trajectories, bool) else trajectories)
                ),
            ),
            limit=None if limit == "all" else _whole("limit", limit),
            seed=_whole("seed", seed),
            position=_whole("position", position),
            untrained=None if untrained is None else _whole("untrained", untrained),
            store=Path(store).expanduser() if store else default_store_path(),
            out=Path(out).expanduser() if out else None,
        )
        if options.limit is not None and options.limit < 0:
            raise CouplingError(f"got coupling_limit={limit}, expected a number of documents, 0 (only score) or all")
        if options.out is not None:
            plugin.require_writable(options.out)
        return options

    @classmethod
    def take_from(cls, arguments: dict[str, Any]) -> Options:
        """Remove the ``coupling_`` arguments from those of a model and check them.

        Raises:
            CouplingError: naming the argument that is wrong, and for one that is not known the nearest that is.
        """
        taken = {name: arguments.pop(name) for name in list(arguments) if name.startswith("coupling")}
        _refuse_unknown(taken)
        return cls.parse(**{name.removeprefix(PREFIX): value for name, value in taken.items()})

    @property
    def measures_anything(self) -> bool:
        """False where the run is only to score."""
        return self.limit != 0

    def as_dict(self) -> dict[str, Any]:
        """Every setting that a reader of the results must know."""
        return self.settings.as_dict() | {
            "limit": "all" if self.limit is None else self.limit,
            "seed": self.seed,
            "position": self.position,
        }


def _refuse_unknown(taken: Mapping[str, Any]) -> None:
    known = [f"{PREFIX}{name}" for name in inspect.signature(Options.parse).parameters]
    for name in taken:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise CouplingError(f"got unknown argument {name}, did you mean {nearest}? There are {', '.join(known)}")


def _several(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.strip("[]() ").replace("+", ",").split(",") if part.strip()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _whole(name: str, value: Any) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise CouplingError(f"got {PREFIX}{name}={value!r}, expected a whole number") from None
