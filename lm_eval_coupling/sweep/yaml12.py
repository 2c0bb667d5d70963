"""Bounded reader of YAML 1.2, in which `on` is a word, 300e9 a number and 0001 a name."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, NoReturn

import yaml

from lm_eval_coupling.errors import shown

_MAX_CHARACTERS = 300_000
_MAX_NODES = 8_000  # Aliases count as often as they are used. PyYAML reads 20,000 a second.
_MAX_DEPTH = 30
_MAX_DIGITS = 40

# PyYAML reads YAML 1.1, in which `on:` is the key True, 300e9 a text and 0001 the number 1.
_SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
    "tag:yaml.org,2002:timestamp": (r"[0-9]{4}-[0-9]{2}-[0-9]{2}", "0123456789"),
}
_NODES: dict[str, type[yaml.Node]] = {
    **dict.fromkeys([*_SCALARS, "tag:yaml.org,2002:str"], yaml.ScalarNode),
    "tag:yaml.org,2002:seq": yaml.SequenceNode,
    "tag:yaml.org,2002:map": yaml.MappingNode,
}


class _Loader(yaml.SafeLoader):
    """Loader that counts nodes and levels while it composes them, before anything is built."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0
        self._sizes: dict[str, int] = {}  # nodes below an anchor, once it is complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        anchor: Any = getattr(event, "anchor", None)
        before = self._count
        if isinstance(event, yaml.AliasEvent):
            if anchor in self.anchors and anchor not in self._sizes:
                _refuse(f"the anchor {anchor!r} contains itself", event)
            self._count += self._sizes.get(anchor, 0)
        self._count += 1
        self._depth += 1
        if self._count > _MAX_NODES:
            _refuse(f"it has more than {_MAX_NODES} values", event)
        if self._depth > _MAX_DEPTH:
            _refuse(f"it is nested more than {_MAX_DEPTH} levels deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if anchor is not None and not isinstance(event, yaml.AliasEvent):
            self._sizes[anchor] = self._count - before
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag not in _NODES:
            _refuse(f"the tag {node.tag!r} is not allowed", node)
        if not isinstance(node, kind := _NODES[node.tag]):
            _refuse(f"got a {node.id} after the tag {node.tag!r}, expected a {kind.id}", node)
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node)
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # such as the 45th of a month
            _refuse(str(error), node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                _refuse("a list or mapping stands as a key", key_node)
            if key in keys:
                _refuse(f"the key {key!r} stands twice", key_node)
            keys.add(key)
        return super().construct_mapping(node, deep)


def _check_scalar(node: yaml.ScalarNode) -> None:
    pattern, _ = _SCALARS.get(node.tag, (".*", ""))
    if not re.fullmatch(pattern, node.value, re.DOTALL):  # Only a written tag can be wrong.
        _refuse(f"got {shown(node.value)} after the tag {node.tag!r}, of another type", node)
    is_number = node.tag.endswith((":int", ":float"))
    if is_number and len(node.value) > _MAX_DIGITS:
        _refuse(f"a number has {len(node.value)} digits, at most {_MAX_DIGITS} are allowed", node)
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in node.value):
        _refuse("a text holds a null character or half of a character", node)


def _refuse(problem: str, place: Any) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


for _tag, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(
        _tag,
        re.compile(f"^(?:{_pattern})$"),
        [*_first.replace("\0", ""), *([""] * ("\0" in _first))],
    )


def load(text: str) -> Any:
    """Return the content of a YAML document, read in bounded time by the rules of YAML 1.2.

    Raises:
        yaml.YAMLError: if it is too long.
        yaml.MarkedYAMLError: if it is no YAML, has a key twice, holds itself, or is too large or
            deep. Also if a value is not of the type of its tag.
    """
    if len(text) > _MAX_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text)} characters, at most {_MAX_CHARACTERS} are read")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except (ValueError, OverflowError, RecursionError) as error:  # such as the character \Uffffffff
        raise yaml.MarkedYAMLError(problem=str(error), problem_mark=loader.get_mark()) from None
    finally:
        loader.dispose()
