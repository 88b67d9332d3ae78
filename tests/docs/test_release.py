"""Files that a release stands on agree with each other."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / ".github/workflows"


@pytest.fixture(scope="module")
def version() -> str:
    """The version in pyproject.toml."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_citation_names_the_version_and_both_papers(version: str) -> None:
    citation = read_yaml(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == version
    assert {paper["url"][-10:] for paper in citation["references"]} == {"2410.02155", "2506.23639"}


def test_changelog_has_an_entry_of_the_version_on_one_screen(version: str) -> None:
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith(f"## {version} - ") for line in lines)
    assert len(lines) <= 30


def test_nothing_is_published_before_wheels_and_docs_are_built() -> None:
    release = read_yaml(WORKFLOWS / "release.yml")
    workflow = release["jobs"]["wheels"]["uses"]
    assert (ROOT / workflow).is_file()
    assert "workflow_call" in read_yaml(ROOT / workflow)[True]  # YAML's `on` is a truth value
    assert release["jobs"]["publish-wheels"]["needs"] == ["wheels", "docs"]
    assert release["jobs"]["publish-docs"]["needs"] == ["publish-wheels"]


def test_tests_of_the_wheels_are_there() -> None:
    names = re.search(
        r"tests/tokenizer/test_\{(.*?)\}\.py", (WORKFLOWS / "wheels.yml").read_text(encoding="utf-8")
    )
    assert names
    for name in names[1].split(","):
        assert (ROOT / "tests/tokenizer" / f"test_{name}.py").is_file()
