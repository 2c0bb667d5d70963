"""YAML as its users mean it: `on` is a word, 300e9 a number, 0001 a name, and a key that stands twice is a mistake."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

# PyYAML reads YAML 1.1, in which `on:` is the key True, 300e9 a text and 0001 the number 1. These are the rules of 1.2.
_SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
    "tag:yaml.org,2002:timestamp": (r"[0-9]{4}-[0-9]{2}-[0-9]{2}", "0123456789"),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        self.flatten_mapping(node)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                mark = node.value[number][0].start_mark
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} stands twice", problem_mark=mark
                )
        return super().construct_mapping(node, deep)


for _tag, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(
        _tag,
        re.compile(f"^(?:{_pattern})$"),
        [*_first.replace("\0", ""), *([""] * ("\0" in _first))],
    )


def load(text: str) -> Any:
    """The content of a YAML document.

    Returns:
        Mappings, lists and plain values, read as YAML 1.2 says.

    Raises:
        yaml.YAMLError: if it is none, or a key stands twice.
    """
    return yaml.load(text, Loader=_Loader)
