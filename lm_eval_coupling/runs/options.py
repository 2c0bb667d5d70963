"""The ``coupling_`` arguments of a run, parsed from what lm-eval's command line hands over."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError, nearest, one_of, path
from lm_eval_coupling.measures.formulas.choices import (
    PROMPT_PART,
    choices_by_part,
    positions_at_most,
)
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.runs.model_arguments import require_loadable, shape_on_disk
from lm_eval_coupling.saved.atomic import require_writable

PREFIX = "coupling_"
READINGS = ("scored", "rendered")
_DOCUMENTS = "a number of documents, 0 (only score) or all"


@dataclass(frozen=True)
class Options:
    """The checked ``coupling_`` arguments of a run.

    Attributes:
        settings: what is measured of a prompt.
        limit: documents measured per task or group; None for all.
        seed: of the sample of documents.
        position: the measured token, or several as a text.
        prompt: one of `READINGS`.
        untrained: seed of the untrained twin; None for no twin.
        store: file of the store; None for the user's own.
        out: folder of the tables; None for the folder of the results.
        dry_run: True to estimate the cost only.
    """

    settings: Settings
    limit: int | None
    seed: int
    position: int | str
    prompt: str
    untrained: int | None
    store: Path | None
    out: Path | None
    dry_run: bool

    @classmethod
    def parse(
        cls,
        *,
        ranks: Any = "10+30+50",
        limit: Any = 100,
        seed: Any = 0,
        measures: Any = "depth+regularity",
        position: Any = -1,
        prompt: str = "scored",
        dtype: str = "float32",
        method: str = "auto",
        window: Any = None,
        tokens: Any = "last8",
        layers: Any = "spaced4",
        trajectories: Any = False,
        untrained: Any = None,
        untrained_seed: Any = None,
        store: Any = None,
        out: Any = None,
        dry_run: Any = False,
    ) -> Options:
        """Return the options, every argument checked, given without the prefix ``coupling_``.

        Raises:
            CouplingError: naming the argument that is wrong.
        """
        options = cls(
            settings=Settings(
                ranks=tuple(_integer("ranks", k) for k in _parts(ranks)),
                measures=tuple(map(str, _parts(measures))),
                dtype=dtype,
                method=method,
                window=None if window is None else _integer("window", window),
                tokens=_choices(tokens),
                layers=_choices(layers),
                trajectories=_boolean("trajectories", trajectories),
            ),
            limit=None if limit == "all" else _integer("limit", limit, _DOCUMENTS),
            seed=_integer("seed", seed),
            position=_positions(position),
            prompt=one_of(f"{PREFIX}prompt", prompt, READINGS),
            untrained=_untrained_seed(untrained, untrained_seed),
            store=_path("store", store),
            out=_path("out", out),
            dry_run=_boolean("dry_run", dry_run),
        )
        if options.limit is not None and options.limit < 0:
            raise CouplingError(f"got coupling_limit={options.limit}, expected {_DOCUMENTS}")
        if options.dry_run and options.limit == 0:
            raise CouplingError(
                "got coupling_dry_run with coupling_limit=0, which measures nothing; "
                "leave out one of them"
            )
        if options.out is not None:
            require_writable(options.out)
        return options

    @classmethod
    def take_from(cls, arguments: dict[str, Any]) -> Options:
        """Remove the ``coupling_`` arguments from a model's arguments, and check both.

        Args:
            arguments: those of the model; only the ones of lm-eval's ``hf`` are left in it.

        Returns:
            The checked ``coupling_`` arguments.

        Raises:
            CouplingError: naming the argument that is wrong, and the nearest accepted name.
        """
        if numbers := [name for name in arguments if name.strip("[]() ").isdigit()]:
            raise CouplingError(
                f"got {numbers[0]} as an argument, which a comma separates from the others; "
                f"join several numbers by a plus sign, as in {PREFIX}ranks=10+30"
            )
        taken = {
            name: arguments.pop(name) for name in list(arguments) if name.startswith("coupling")
        }
        _refuse_unknown(taken)
        options = cls.parse(**{name.removeprefix(PREFIX): value for name, value in taken.items()})
        require_loadable(arguments)
        if options.store and options.store.is_dir():
            raise CouplingError(
                f"got the folder {options.store} as the store, expected a file; choose one in it"
            )
        if options.measures_anything and (shape := shape_on_disk(arguments)):
            options.settings.check_shape(*shape)
        return options

    def require_positions_in_prompts(self, what: str) -> None:
        """Refuse tokens of responses where nothing follows a prompt.

        Args:
            what: what is measured, for the message.

        Raises:
            CouplingError: if ``position`` names such tokens.
        """
        if set(choices_by_part(self.position)) != {PROMPT_PART}:
            raise CouplingError(
                f"got {PREFIX}position={self.position} for {what}, which nothing follows; "
                "give tokens of the prompt, such as -1"
            )

    @property
    def measures_anything(self) -> bool:
        """False if the run only scores."""
        return self.limit != 0

    def as_dict(self) -> dict[str, Any]:
        """Return every setting that a reader of the results must know."""
        several = positions_at_most(self.position) > 1
        settings = self.settings.as_dict() | {
            "limit": "all" if self.limit is None else self.limit,
            "seed": self.seed,
            # Runs that share their first position are comparable: their values are of that one.
            "position": _first(self.position) if several else self.position,
            "prompt": self.prompt,
        }
        return settings | ({"positions": self.position} if several else {})


def parse_settings(text: str) -> dict[str, str]:
    """Return the settings of ``name=value,name=value``, unchecked, with the prefix ``coupling_``.

    Args:
        text: of the option ``--coupling``; the prefix may be left out.

    Raises:
        CouplingError: if a part has no name or no value.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if wrong := [name for name, equals, value in pairs if not equals or not value]:
        raise CouplingError(
            f"got --coupling with {wrong[0]!r}, "
            "expected name=value,name=value such as ranks=10+30,limit=50"
        )
    return {
        f"{PREFIX}{name.strip().removeprefix(PREFIX)}": value.strip() for name, _, value in pairs
    }


def _refuse_unknown(taken: Mapping[str, Any]) -> None:
    accepted = [f"{PREFIX}{name}" for name in inspect.signature(Options.parse).parameters]
    for name in taken:
        if name not in accepted:
            raise CouplingError(
                f"got unknown argument {name}, did you mean {nearest(name, accepted)}? "
                f"There are {', '.join(accepted)}"
            )


def _parts(value: Any) -> list[Any]:
    if isinstance(value, str):
        separated = value.strip("[]() ").replace("+", ",").split(",")
        return [part.strip() for part in separated if part.strip()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _integer(name: str, value: Any, expected: str = "a whole number") -> int:
    """Parse a whole number; lm-eval's command line hands over -2 as -2.0."""
    try:
        # Not by way of a float where a text has digits alone: it would lose the last of 17.
        is_written_whole = isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d+\s*", value)
        number = int(value) if is_written_whole else value
        number = float(number) if isinstance(number, str) else number
        if not isinstance(value, bool) and int(number) == number:
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise CouplingError(f"got {PREFIX}{name}={value!r}, expected {expected}")


def _untrained_seed(untrained: Any, seed: Any) -> int | None:
    """Parse the twin's seed, given as ``untrained=seed0`` or ``untrained_seed=0``."""
    if untrained is None or str(untrained).lower() in ("none", "false", ""):
        return None if seed is None else _integer("untrained_seed", seed)
    named = re.fullmatch(r"seed(\d+)", str(untrained))
    if named and (seed is None or _integer("untrained_seed", seed) == int(named[1])):
        return int(named[1])
    # A bare number is refused: `untrained=0` reads as "off", and switched the twin on.
    number = re.fullmatch(r"(\d+)(\.0)?", str(untrained))
    example = number[1] if number else "0"
    raise CouplingError(
        f"got {PREFIX}untrained={untrained}, expected the seed of an untrained twin; "
        f"write {PREFIX}untrained_seed={example}, or leave it out for no twin"
    )


def _choices(value: Any) -> str:
    """Join a choice of tokens or layers; lm-eval's command line hands over -1 as -1.0."""
    return "+".join(re.sub(r"^(-?\d+)\.0$", r"\1", str(part)) for part in _parts(value))


def _positions(value: Any) -> int | str:
    """Parse one token as a number, or a text such as ``-1+0+last4`` or ``generated-spread8``."""
    parts = [
        str(part)
        if re.fullmatch(r"[a-z]+(-[a-z0-9]+)?[0-9]*", str(part))
        else _integer("position", part)
        for part in _parts(value)
    ]
    choice = parts[0] if len(parts) == 1 else "+".join(map(str, parts))
    positions_at_most(choice)
    return choice


def _first(choice: int | str) -> int | str:
    first = str(choice).split("+")[0]
    return int(first) if first.lstrip("-").isdigit() else first


def _boolean(name: str, value: Any) -> bool:
    if str(value).lower() in ("true", "1", "1.0"):
        return True
    if str(value).lower() in ("false", "0", "0.0", "none"):
        return False
    raise CouplingError(f"got {PREFIX}{name}={value!r}, expected 1 or 0")


def _path(name: str, value: Any) -> Path | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool | float) or not isinstance(value, str | int | Path):
        raise CouplingError(
            f"got {PREFIX}{name}={value!r}, expected a path; "
            "write one that looks like a number as ./PATH"
        )
    return path(f"{PREFIX}{name}", str(value))
