"""Fields of a plan, taken one by one; every problem with them is noted as a sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lm_eval_coupling.errors import nearest, shown
from lm_eval_coupling.saved.fact_types import is_name, is_number

Check = Callable[[Any], bool]
_MAX_UNKNOWN = 10  # unknown keys named one by one; each is compared with all known keys
_MAX_NUMBER = 10**9


class Fields:
    """Fields of one mapping. A wrong field adds a sentence to ``problems`` and has its default."""

    def __init__(self, value: Any, where: str, keys: list[str], problems: list[str]) -> None:
        """Note unknown keys, each with the nearest of ``keys``.

        Args:
            value: the value in the plan, expected to be a mapping.
            where: its place there, such as ``models[0]``; empty for the whole plan.
            keys: the keys that it may have.
            problems: the list that sentences are added to.
        """
        self.where, self.problems = where, problems
        self.values: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
        if not isinstance(value, Mapping):
            place, expected = where or "the plan", ", ".join(keys)
            problems.append(f"got {shown(value)} for {place}, expected a mapping with {expected}")
        unknown = [key for key in self.values if key not in keys]
        for key in unknown[:_MAX_UNKNOWN]:
            meant = nearest(str(key), keys)
            problems.append(f"got unknown key {self.at(key)}, did you mean {meant}?")
        if len(unknown) > _MAX_UNKNOWN:
            place = where or "the plan"
            problems.append(f"got {len(unknown) - _MAX_UNKNOWN} more unknown keys in {place}")

    def at(self, key: Any) -> str:
        """Return a field's full name, such as ``models[0].args``."""
        key = "".join(character if character.isprintable() else "?" for character in str(key)[:80])
        return f"{self.where}.{key}" if self.where else key

    def refuse(self, key: str, expected: str) -> None:
        """Note that a field is not as expected."""
        self.problems.append(
            f"got {self.at(key)}: {shown(self.values.get(key))}, expected {expected}"
        )

    def take(self, key: str, check: Check, expected: str, default: Any = None) -> Any:
        """Return a field if ``check`` holds for it, else note a problem and return the default."""
        value = self.values.get(key)
        if value is None:
            return default
        if check(value):
            return value
        self.refuse(key, expected)
        return default

    def need(self, key: str, check: Check, expected: str) -> Any:
        """Return a field as :meth:`take` does, and note a problem if it is missing."""
        if self.values.get(key) is None:
            self.problems.append(f"got no {self.at(key)}, expected {expected}")
            return None
        return self.take(key, check, expected)

    def name(self, key: str) -> Any:
        """Return a text of one line, or None."""
        return self.take(key, is_name, "a text of one line")

    def whole(self, key: str, default: int | None = None, low: int = 1) -> Any:
        """Return a whole number from ``low`` to a billion."""
        expected = f"a whole number of {low} or more"
        return self.take(key, lambda v: is_whole(v) and low <= v <= _MAX_NUMBER, expected, default)

    def number(self, key: str, default: float | None = None) -> Any:
        """Return a number above zero, up to a billion, as a float."""
        value = self.take(
            key, lambda v: is_number(v) and 0 < v <= _MAX_NUMBER, "a number above 0", default
        )
        return None if value is None else float(value)

    def flag(self, key: str, default: bool | None = None) -> Any:
        """Return True or False."""
        return self.take(key, lambda v: isinstance(v, bool), "true or false", default)

    def items(self, key: str, expected: str) -> list[Any]:
        """Return a list that must be there and hold something; one name may stand for itself."""
        value = self.need(key, lambda v: is_name(v) or (isinstance(v, list) and bool(v)), expected)
        return [value] if is_name(value) else value or []

    def mapping(self, key: str) -> dict[str, Any]:
        """Return a mapping whose keys are texts of one line; empty if it is missing."""
        return dict(self.take(key, is_mapping, "a mapping of names to values", {}))

    def texts(self, key: str) -> list[str]:
        """Return a list of texts; a single one may stand without brackets."""
        value = self.take(key, _is_texts, "a list of texts", [])
        return [value] if isinstance(value, str) else list(value)


def is_text(value: Any) -> bool:
    """Return whether a value is a text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_mapping(value: Any) -> bool:
    """Return whether a value is a mapping whose keys are texts of one line."""
    return isinstance(value, Mapping) and all(map(is_name, value))


def _is_texts(value: Any) -> bool:
    return is_text(value) or (isinstance(value, list) and all(map(is_text, value)))
