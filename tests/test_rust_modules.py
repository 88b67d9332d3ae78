"""The modules of the Rust core use each other in one direction: there is no circle."""

import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "rust" / "core" / "src"


def modules():
    """The name of each module, such as `train::shard`, and its source without comments and tests."""
    sources = {}
    for path in SOURCES.rglob("*.rs"):
        parts = path.relative_to(SOURCES).with_suffix("").parts
        name = "::".join(part for part in parts if part not in ("mod", "lib"))
        text = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
        sources[name] = text.partition("#[cfg(test)]")[0]
    return sources


def used_modules(name, text, names):
    """The modules of the crate that a module's `use` names, and those that it calls by `crate::` or `super::`."""
    is_folder = (SOURCES / Path(*name.split("::")) / "mod.rs").exists() or not name
    folder = name.split("::") if is_folder and name else name.split("::")[:-1]
    paths = re.findall(r"\b((?:crate|super|self)(?:::\w+)+)", text)
    paths += [f"self::{path}" for path in re.findall(r"\buse (\w+)::", text)]
    for path in paths:
        start, *parts = path.split("::")
        base = [] if start == "crate" else folder
        if start == "super" and is_folder:
            base = folder[:-1]
        while parts:
            candidate = "::".join([*base, *parts])
            if candidate in names and candidate != name:
                yield candidate
                break
            parts.pop()


def test_use_points_one_way():
    sources = modules()
    modules_of_files = {name: set(used_modules(name, text, sources)) for name, text in sources.items()}
    assert {"limits", "error"} <= modules_of_files["grid"]
    assert "train::merge" in modules_of_files["train::shard"]
    assert "encode" in modules_of_files["train::shard"]
    assert "train::learner" in modules_of_files["train"]
    try:
        order = list(TopologicalSorter(modules_of_files).static_order())
    except CycleError as error:
        pytest.fail(" uses ".join(reversed(error.args[1])))
    assert order.index("limits") < order.index("grid") < order.index("encode") < order.index("train")
