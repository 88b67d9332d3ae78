"""What all options dataclasses have in common."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from being_vl.errors import ConfigError
from being_vl.files import to_jsonable
from being_vl.hub import is_dataset, to_path

StrPath = str | os.PathLike[str]
"""What every public function takes for a path."""

MAY_CHANGE = {"may_change": True}
"""Metadata of an option that does not decide the output: it may be another one when a job goes on."""
SHORTHAND = {"shorthand": True}
"""Metadata of a field of an options dataclass: a value alone in place of the options is that of this field."""


RANGES = {
    "batch_size": (1, 2**20),
    "codebook_size": (1, 2**24),
    "commitment": (0, 1e6),
    "crop": (1, 2**16),
    "dim": (1, 2**16),
    "dropout": (0, 1),
    "ema_decay": (0, 1),
    "gpus_per_node": (1, 1024),
    "gradient_clipping": (0, math.inf),
    "layers": (0, 1024),
    "max_new_tokens": (1, 2**24),
    "merges": (0, 2**24),
    "micro_batch_size": (1, 2**20),
    "min_frequency": (1, 2**63 - 1),
    "new_rows": (0, 2**31 - 1),
    "nodes": (1, 2**16),
    "num_merges": (0, 2**24),
    "num_threads": (1, 1024),
    "pad_to": (1, 2**20),
    "port": (1, 65_535),
    "rank": (1, 2**16),
    "ranks": (1, 2**16),
    "reserved_share": (0, 1),
    "seed": (0, 2**63 - 1),
    "side": (1, 2**16),
    "size": (1, 2**24),
    "tile": (1, 1024),
    "token": (0, 2**24),
    "top_p": (0, 1),
    "width": (1, 2**16),
    "workers": (0, 1024),
}
"""Name of an option → least and largest number that it may be, in whatever dataclass it is."""
MAX_INTEGER = 10**12
"""The largest number that any other option for a whole number may be. No number is negative."""
DEVICE = re.compile(r"(auto|cpu|mps|(cuda|xpu|npu)(:\d{1,3})?)")
"""What an option `device` may be."""


@dataclasses.dataclass
class Options:
    """Base of the options dataclasses: paths may be strings or any `PathLike`, and a list of one path that path.

    Numbers are checked against `RANGES`, devices against `DEVICE`, and text must not be empty.

    A list of options with a `SHORTHAND` also takes what they are made of, the value of that field or a mapping; and a
    list of one of them that one. Images and records may be a `datasets.Dataset`, which is written to a folder then.
    """

    def __post_init__(self) -> None:
        """Convert paths; a subclass that checks its values calls this first."""
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            _check_value(name, value, kind)
            if kind in (Path, Path | None) and value is not None:
                setattr(self, name, _convert(name, value))
            elif kind == list[Path]:
                items = [value] if isinstance(value, str | os.PathLike) or is_dataset(value) else value
                setattr(self, name, [_convert(name, item) for item in items])
            elif get_origin(kind) is list and find_shorthand(get_args(kind)[0]):
                item_kind = get_args(kind)[0]
                is_item = isinstance(value, str | os.PathLike | Mapping | item_kind) or is_dataset(value)
                setattr(self, name, [_make(item_kind, item) for item in ([value] if is_item else value)])


def _check_value(name: str, value: Any, kind: Any) -> None:
    """Raise a `ConfigError` that names an option if its value cannot be one, whatever else it depends on."""
    kinds = {kind, *get_args(kind)} if get_origin(kind) in (Union, UnionType) else {kind}
    if isinstance(value, str):
        if name == "device" and not DEVICE.fullmatch(value):
            raise ConfigError(
                f"device: expected auto, cpu, cuda or a GPU such as cuda:1, found {_show(value)}"
            )
        if str in kinds and not value:
            raise ConfigError(f"{name}: expected text, found ''")
        if "\0" in value:
            raise ConfigError(f"{name}: expected text without a NUL character, found {_show(value)}")
    elif isinstance(value, int | float) and not isinstance(value, bool) and kinds & {int, float}:
        least, largest = RANGES.get(name, (0, MAX_INTEGER if isinstance(value, int) else math.inf))
        if not least <= value <= largest:
            text = _show(value)
            bounds = f"at least {least}" if value < least or largest == math.inf else f"{least} to {largest}"
            raise ConfigError(f"{name}: expected {bounds}, found {text}")


def _show(value: Any) -> str:
    """A value in a message, shortened."""
    if isinstance(value, int) and abs(value) >= 10**50:
        return "a number of more than 50 digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def find_shorthand(kind: Any) -> str | None:
    """The name of a dataclass's field that a value alone stands for; None if it has none."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return next((field.name for field in fields if field.metadata.get("shorthand")), None)


def _make(kind: Any, item: Any) -> Any:
    """Options of a dataclass that has a `SHORTHAND`, of what a list of them may hold."""
    if isinstance(item, kind):
        return item
    return kind(**item) if isinstance(item, Mapping) and not is_dataset(item) else kind(item)


def _convert(name: str, value: Any) -> Path:
    """The path that an option's value stands for."""
    try:
        return to_path(value)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def check_minimum(name: str, value: float | None, minimum: float) -> None:
    """Raise a `ConfigError` that names an option if its value is below the least one; None is no value."""
    if value is not None and value < minimum:
        raise ConfigError(f"{name}: expected at least {minimum}, found {value}")


def check_share(name: str, value: float) -> None:
    """Raise a `ConfigError` that names an option if its value is no share, 0 to 1."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}: expected a share, 0 to 1, found {value}")


def fixed_options(options: Any) -> dict[str, Any]:
    """The options that decide an output, nested ones too: all but those marked `MAY_CHANGE`.

    Args:
        options: A dataclass.

    Returns:
        Name → value, in plain JSON types.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        if field.metadata.get("may_change"):
            continue
        value = getattr(options, field.name)
        is_nested = dataclasses.is_dataclass(value) and not isinstance(value, type)
        values[field.name] = fixed_options(value) if is_nested else to_jsonable(value)
    return values
