"""Every Python block and every command of the documentation runs as printed.

A page's blocks run in their order, in one folder with the files that `world` makes, so a page goes on with what its
earlier blocks wrote. A block under the comment `<!-- not run: REASON -->` does not run; of its `being-vl` commands the
flags are checked all the same. A block whose first line is `# NAME`, such as `# mine.yaml`, is that file, on all pages.
"""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml

from being_vl.cli import find_command
from being_vl.commands import COMMANDS
from helpers.commands import being_vl

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>[^>]+?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.DOTALL | re.MULTILINE,
)
SHELL = ("sh", "bash", "console")


class Block(NamedTuple):
    """A block of code of a page; `reason` says why it is not run."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def name(self) -> str:
        """What a failure is reported under."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def file(self) -> str | None:
        """Name of the file that the block shows."""
        match = re.match(r"# ([\w-]+(\.ya?ml)?)\n", self.code)
        return match[1] if match and self.language in ("yaml", "text") else None

    def commands(self) -> Iterator[list[str]]:
        """Words of each command of a block of shell lines; of those with a prompt only these are commands."""
        text = self.code.replace("\\\n", " ")
        lines = text.splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        for command in (command for line in lines for command in line.split(" && ")):
            words = shlex.split(command, comments=True)
            if words:
                yield words[:-1] if words[-1] == "&" else words

    def output(self) -> list[str]:
        """What a block with prompts shows below its last command."""
        lines = self.code.splitlines()
        prompts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
        return lines[prompts[-1] + 1 :] if prompts else []


def parse(words: list[str]) -> None:
    """Check the flags of a command of `being-vl`, and the recipe that it names; run nothing."""
    name = find_command(words)
    assert name, words
    COMMANDS[name].parse(name, words[len(name.split()) :]).values()


def blocks(page: Path) -> list[Block]:
    """All blocks of a page."""
    text = page.read_text(encoding="utf-8")
    page_blocks = []
    for match in FENCE.finditer(text):
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        line = text.count("\n", 0, match.start("language")) + 1
        page_blocks.append(Block(page, line, match["language"], code, match["reason"]))
    return page_blocks


BLOCKS = {page: blocks(page) for page in PAGES}
RUN = [page for page in PAGES if any(b.language in (*SHELL, "python") and not b.reason for b in BLOCKS[page])]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages' commands find: images, records, an LLM, grids, a vocabulary, an expanded model, recipes."""
    from being_vl.demo import shapesworld
    from helpers import tiny

    folder = tmp_path_factory.mktemp("world")
    shapesworld.generate(folder / "data", 20, seed=1)
    records = json.loads((folder / "data/train.json").read_text(encoding="utf-8"))[:24]
    for name in ("data/train.json", "train.json"):
        (folder / name).write_text(json.dumps(records), encoding="utf-8")
    (folder / "dialogues.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tiny.llm(folder / "path/to/an/llm", hidden=16)
    (folder / "tests").symlink_to(ROOT / "tests")
    photographs = sorted((ROOT / "python/being_vl/demo/photographs").glob("*.jpg"))
    for name in ("photos/a.png", "a.png", "b.png", "photo.png", "new.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "data/images/train-00000.png", folder / name)
    for photograph in photographs:
        shutil.copy(photograph, folder / "photos" / photograph.name)
    grids = np.load(ROOT / "tests/helpers/photo_grids.npz")["grids"]
    np.savez(folder / "grids.npz", grids=grids)

    llm, model_folder = folder / "path/to/an/llm", folder / "runs/me"
    steps = (
        ["quantize", folder / "data/images", "--out", model_folder / "grids"],
        [
            "vocab",
            "train",
            model_folder / "grids",
            "--out",
            model_folder / "vocabulary.json",
            "--num_merges",
            40,
        ],
        [
            "expand",
            "--llm",
            llm,
            "--vocabulary",
            model_folder / "vocabulary.json",
            "--out",
            model_folder / "expanded",
        ],
    )
    for words in steps:
        assert being_vl(*words) == 0
    shutil.copy(model_folder / "vocabulary.json", folder / "vocabulary.json")
    shutil.copytree(model_folder / "expanded", folder / "trained")
    write_files(folder)
    return folder


def write_files(folder: Path) -> None:
    """Write the files that the pages show."""
    for block in (block for page in PAGES for block in BLOCKS[page]):
        if name := block.file():
            (folder / name).write_text(block.code, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run_as_printed(
    page: Path,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(world, tmp_path, symlinks=True, dirs_exist_ok=True)
    if page.name != "model.md":
        (tmp_path / "vocabulary.json").unlink()
    monkeypatch.chdir(tmp_path)
    variables: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCKS[page]:
        if block.reason:
            continue
        if block.language == "python":
            exec(compile(block.code, block.name(), "exec"), variables)
        elif block.language in SHELL:
            capsys.readouterr()
            caplog.clear()
            for words in block.commands():
                assert words[0] == "being-vl", (
                    f"{block.name()}: runs only being-vl; mark it by <!-- not run: … -->"
                )
                assert being_vl(*words[1:]) == 0, f"{block.name()}: {capsys.readouterr().err}"
            if block.output():
                output_text = "\n".join([capsys.readouterr().out, *caplog.messages])
                assert missing_lines(block.output(), output_text) == [], block.name()


def missing_lines(expected: list[str], output_text: str) -> list[str]:
    """Lines that a page shows and a command did not print, seconds aside."""
    seconds = re.compile(r"\d+(\.\d+)? s\b")
    lines = {seconds.sub("0 s", line).rstrip() for line in output_text.splitlines()}
    return [line for line in expected if seconds.sub("0 s", line).rstrip() not in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_of_blocks_that_do_not_run_exist(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for block in BLOCKS[page]:
        if block.reason and block.language in SHELL:
            for words in block.commands():
                if "being-vl" in words:
                    parse(words[words.index("being-vl") + 1 :])


def test_shown_recipes_have_no_unknown_keys(tmp_path: Path) -> None:
    for block in (block for page in PAGES for block in BLOCKS[page]):
        if block.language != "yaml":
            continue
        content = yaml.safe_load(block.code)
        if isinstance(content, list):
            content = {"stages": content}
        recipe = tmp_path / "recipe.yaml"
        for stage in content.get("stages", []):
            for key, value in {"unfreeze": 0, "learning_rate": 1e-3}.items():
                stage.setdefault(key, value)
        recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
        parse(["run" if "llm" in content else "train", "--recipe", str(recipe)])


def test_every_shell_line_is_in_a_block_that_says_so() -> None:
    for block in (block for page in PAGES for block in BLOCKS[page]):
        if not block.language:
            assert not re.search(r"^(being-vl|pip|python|torchrun) ", block.code, re.MULTILINE), block.name()
