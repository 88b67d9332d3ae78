"""No function is longer than a reader can hold: 60 lines. Clippy says so of Rust (`clippy.toml`)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 60


@pytest.mark.parametrize("folder", ["python", "tests", "benchmarks", "examples", "docs"])
def test_no_function_is_long(folder: str) -> None:
    lengths = {
        f"{path.relative_to(ROOT)}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}
