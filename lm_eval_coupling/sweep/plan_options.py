"""Coupling settings and lm-eval's options of a plan, held to their types before any work."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.safe_text import one_line
from lm_eval_coupling.saved.fact_types import is_name
from lm_eval_coupling.sweep.fields import Fields, is_whole
from lm_eval_coupling.sweep.units import Unit

_PREFIX = "coupling_"
# Switches of lm-eval. YAML 1.2 reads `no` as a text, which Python takes for true.
_SWITCHES = (
    *("log_samples", "write_out", "check_integrity", "show_config", "trust_remote_code"),
    *("confirm_run_unsafe_code", "fewshot_as_multiturn"),
)
_LONGEST = 1000  # characters of a sentence, which may quote a value of any length
_SEEDS = 4  # for Python, NumPy, torch and the examples of few-shot prompts


def check_coupling(coupling: Mapping[str, Any], units: Sequence[Unit], problems: list[str]) -> None:
    """Note every coupling setting that a run would refuse.

    Args:
        coupling: the settings of the plan, named without their prefix.
        units: the units, whose arguments may have settings of their own.
        problems: the list that sentences are added to.
    """
    from lm_eval_coupling.runs.options import Options  # here, because it loads NumPy

    accepted = [*inspect.signature(Options.parse).parameters]
    Fields(coupling, "coupling", accepted, problems)
    shared = {name: value for name, value in coupling.items() if name in accepted}
    shared_refused = [*_refused(shared)]
    problems += shared_refused
    checked: set[str] = set()
    for unit in units:
        own = {n: value for n, value in unit.arguments.items() if n.startswith(_PREFIX)}
        if not own or repr(own) in checked:  # units of one model have the same
            continue
        checked.add(repr(own))
        place = f"args of {unit.model}"
        Fields(own, place, [f"{_PREFIX}{name}" for name in accepted], problems)
        own = {name.removeprefix(_PREFIX): value for name, value in own.items()}
        own = {name: value for name, value in own.items() if name in accepted}
        # Settings of the plan that are wrong by themselves have been noted.
        refused = [*_refused(own)] or [*_refused(own if shared_refused else shared | own)]
        problems += [f"{place}: {problem}" for problem in refused]


def check_lm_eval(options: Mapping[str, Any], problems: list[str]) -> None:
    """Note every number and switch among lm-eval's options that is of another type.

    Args:
        options: of lm-eval, by name.
        problems: the list that sentences are added to.
    """
    fields = Fields(options, "lm_eval", [*options], problems)
    fields.number("limit")
    fields.whole("num_fewshot", low=0)
    fields.whole("max_batch_size")
    fields.take("batch_size", _is_batch_size, "a whole number of 1 or more, or auto")
    fields.take("seed", _are_seeds, f"a whole number of 0 or more, or {_SEEDS} of them")
    for name in _SWITCHES:
        fields.flag(name)
    fields.take(
        "apply_chat_template",
        lambda value: isinstance(value, bool) or (is_name(value) and not _is_word(value)),
        "true, false or the name of a template",
    )


def _refused(arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with each argument alone, or else with all of them together."""
    from lm_eval_coupling.runs.options import Options

    is_refused = False
    for given in (*({name: value} for name, value in arguments.items()), arguments):
        if given is arguments and is_refused:
            return
        try:
            Options.parse(**given)
        except (CouplingError, TypeError) as error:
            is_refused = True
            yield one_line(error)[:_LONGEST]


def _is_batch_size(value: Any) -> bool:
    if isinstance(value, str):
        return bool(re.fullmatch(r"auto(:[1-9][0-9]{0,4})?", value))
    return is_whole(value) and 1 <= value <= 10**9


def _are_seeds(value: Any) -> bool:
    seeds = value if isinstance(value, list) else [value]
    # NumPy takes seeds below 2**32. lm-eval completes three seeds by its own fourth.
    are_right = all(seed is None or (is_whole(seed) and 0 <= seed < 2**32) for seed in seeds)
    return are_right and len(seeds) in (1, _SEEDS - 1, _SEEDS)


def _is_word(value: str) -> bool:
    return value.strip().lower() in ("yes", "no", "on", "off", "true", "false", "none")
