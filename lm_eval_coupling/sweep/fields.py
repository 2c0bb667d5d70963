"""The fields of a plan, taken one by one; whatever is wrong with them is noted and told together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lm_eval_coupling.errors import nearest

Check = Callable[[Any], bool]


class Fields:
    """The fields of one mapping. Each problem becomes a sentence in ``problems``, and the field its default."""

    def __init__(self, value: Any, where: str, known: list[str], problems: list[str]) -> None:
        """Note keys that are not known, with the nearest one that is.

        Args:
            value: what stands in the plan.
            where: its place there, such as ``models[0]``; empty for the whole plan.
            known: the keys that it may have.
            problems: the list that sentences are added to.
        """
        self.where, self.problems = where, problems
        self.values: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
        if not isinstance(value, Mapping):
            problems.append(
                f"got {value!r} for {where or 'the plan'}, expected a mapping with {', '.join(known)}"
            )
        for key in self.values:
            if key not in known:
                problems.append(
                    f"got unknown key {self.at(key)}, did you mean {nearest(str(key), known)}?"
                )

    def at(self, key: Any) -> str:
        """A field's full name."""
        return f"{self.where}.{key}" if self.where else str(key)

    def refuse(self, key: str, expected: str) -> None:
        """Note that a field is not as it should be."""
        self.problems.append(f"got {self.at(key)}: {self.values.get(key)!r}, expected {expected}")

    def take(self, key: str, check: Check, expected: str, default: Any = None) -> Any:
        """The value of a field if ``check`` holds for it, else the default; only a field that is there can be wrong."""
        value = self.values.get(key)
        if value is None:
            return default
        if check(value):
            return value
        self.refuse(key, expected)
        return default

    def need(self, key: str, check: Check, expected: str) -> Any:
        """As :meth:`take`, for a field that must be there."""
        if self.values.get(key) is None:
            self.problems.append(f"got no {self.at(key)}, expected {expected}")
            return None
        return self.take(key, check, expected)

    def text(self, key: str, default: str | None = None) -> Any:
        """A word."""
        return self.take(key, is_text, "a text", default)

    def whole(self, key: str, default: int | None = None, least: int = 1) -> Any:
        """A whole number."""
        return self.take(
            key, lambda v: is_whole(v) and v >= least, f"a whole number of {least} or more", default
        )

    def number(self, key: str, default: float | None = None) -> Any:
        """A number above zero."""
        found = self.take(key, lambda v: is_number(v) and v > 0, "a number above 0", default)
        return None if found is None else float(found)

    def mapping(self, key: str) -> dict[str, Any]:
        """Any mapping whose keys are words."""
        is_mapping: Check = lambda v: isinstance(v, Mapping) and all(map(is_text, v))  # noqa: E731
        return dict(self.take(key, is_mapping, "a mapping of names to values", {}))

    def texts(self, key: str) -> list[str]:
        """A list of words; one alone may stand without brackets."""
        is_texts: Check = lambda v: is_text(v) or (isinstance(v, list) and all(map(is_text, v)))  # noqa: E731
        found = self.take(key, is_texts, "a list of texts", [])
        return [found] if isinstance(found, str) else list(found)


def is_text(value: Any) -> bool:
    """Whether it is a text with something in it."""
    return isinstance(value, str) and bool(value.strip())


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)
