"""YAML as recipes and flags have it."""

import datetime
import re
from typing import Any

import yaml

MAX_LENGTH = 500_000
"""Most characters of a text."""
MAX_DEPTH = 50
"""Most lists and mappings inside each other."""
MAX_NODES = 20_000
"""Most values, those of each alias counted again where it stands."""
MAX_DIGITS = 300
"""Most digits of a number; Python itself refuses to show one of more than 4,300."""


class RecipeLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads `1e-3` as a number, as YAML 1.2 does, and refuses what is a trap or takes much memory.

    Refused are a key that comes twice, a value inside itself, aliases that multiply, numbers of very many digits, and
    what YAML 1.1 takes for a number in base 60 or 8, such as `1:30` and `0777`.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.num_read = 0
        self.num_nodes: dict[int, int] = {}
        self.open_anchors: set[str] = set()

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One value, and of lists and mappings all in it; counts them."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) and event.anchor in self.open_anchors:
            raise _fault(f"&{event.anchor} is inside itself", event.start_mark)
        anchor = None if isinstance(event, yaml.AliasEvent) else event.anchor
        if anchor in self.anchors:
            raise _fault(f"&{anchor} comes twice", event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise _fault(f"more than {MAX_DEPTH} lists and mappings are inside each other", event.start_mark)
        self.depth += 1
        if anchor is not None:
            self.open_anchors.add(anchor)
        node = super().compose_node(parent, index)
        if anchor is not None:
            self.open_anchors.discard(anchor)
        self.depth -= 1
        if id(node) not in self.num_nodes:  # an alias is the node that it stands for
            self.num_nodes[id(node)] = self._count(node)
        self.num_read += 1
        if max(self.num_read, self.num_nodes[id(node)]) > MAX_NODES:
            raise _fault(f"more than {MAX_NODES:,} values, those of aliases counted", event.start_mark)
        return node

    def _count(self, node: Any) -> int:
        """How many values a node makes; what is in it is counted already."""
        if isinstance(node, yaml.SequenceNode):
            return 1 + sum(self.num_nodes[id(item)] for item in node.value)
        if isinstance(node, yaml.MappingNode):
            return 1 + sum(self.num_nodes[id(part)] for pair in node.value for part in pair)
        return 1

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = set()
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        for key, _ in pairs:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in names:
                    raise _fault(f"{_shorten(key.value)} comes twice", key.start_mark)
                names.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> Any:
        """A whole or other number in base 10, or as `0x1F` in base 16."""
        text = self.construct_scalar(node)
        digits = text.replace("_", "").lstrip("+-")
        if len(digits) > MAX_DIGITS:
            raise _fault(f"a number of {len(digits):,} digits", node.start_mark)
        if ":" in text or re.fullmatch("0[0-7]+", digits):
            base = 60 if ":" in text else 8
            raise _fault(
                f"{text!r} is a number in base {base} in YAML; put it in quotes, or write it in base 10",
                node.start_mark,
            )
        try:
            is_int = node.tag == "tag:yaml.org,2002:int"
            return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)
        except ValueError:
            raise _fault(f"{text!r} is no number", node.start_mark) from None

    def construct_date(self, node: Any) -> datetime.date:
        """A date or time."""
        try:
            date: datetime.date = self.construct_yaml_timestamp(node)
        except (ValueError, OverflowError):
            raise _fault(f"{node.value!r} is no date; put text in quotes", node.start_mark) from None
        return date


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), [*"-+.0123456789"]
)
RecipeLoader.add_constructor("tag:yaml.org,2002:int", RecipeLoader.construct_number)
RecipeLoader.add_constructor("tag:yaml.org,2002:float", RecipeLoader.construct_number)
RecipeLoader.add_constructor("tag:yaml.org,2002:timestamp", RecipeLoader.construct_date)


def _fault(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, mark)


def _shorten(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}…"


def parse_yaml(text: str) -> Any:
    """What a text in YAML stands for.

    Raises:
        yaml.YAMLError: if it is none, or one that is too long or too deep. A `MarkedYAMLError` has the line.
    """
    if len(text) > MAX_LENGTH:
        raise yaml.YAMLError(f"{len(text):,} characters, expected at most {MAX_LENGTH:,}")
    try:
        return yaml.load(text, RecipeLoader)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        # Of tags that do not fit what stands behind them, such as `!!int x`.
        raise yaml.YAMLError(f"a value that does not fit its tag: {error}") from None


def dump_yaml(value: Any) -> str:
    """A value of plain JSON types as YAML, in the order it has."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100))
