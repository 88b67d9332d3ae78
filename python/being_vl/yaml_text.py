"""YAML as recipes and flags have it."""

import re
from typing import Any

import yaml


class RecipeLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads `1e-3` as a number, as YAML 1.2 does, and refuses a key that comes twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in names:
                    raise yaml.MarkedYAMLError(None, None, f"{key.value!r} comes twice", key.start_mark)
                names.add(key.value)
        return super().construct_mapping(node, deep)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), [*"-+.0123456789"]
)


def parse_yaml(text: str) -> Any:
    """What a text in YAML stands for.

    Raises:
        yaml.YAMLError: if it is none.
    """
    return yaml.load(text, RecipeLoader)


def dump_yaml(value: Any) -> str:
    """A value of plain JSON types as YAML, in the order it has."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100))
