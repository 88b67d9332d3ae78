"""The command line around the commands: help, versions, completion, messages, and how quickly it answers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from being_vl.commands import COMMANDS, GROUPS, Command, build_parser, load, show
from being_vl.completion import CompletionOptions, completion
from being_vl.schema import read_options
from helpers.commands import being_vl, expect_refusal


def process(*words: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    return subprocess.run(words, capture_output=True, text=True, timeout=120, **settings)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("words", [[], ["vocab"], ["--help"], ["vocab", "-h"]])
def test_without_a_command_help_is_shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert being_vl(*words) == 0
    out = capsys.readouterr().out
    assert "vocab merge-stats" in out
    assert ("quantize " in out) == (words[:1] != ["vocab"])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        being_vl(*name.split(), "--help")
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: being-vl {name} ")
    for word in ("Args:", "Raises:", "Returns:", "YAML file of these options, or"):
        assert word not in out or (word.startswith("YAML") and name == "run")
    if name in ("run", "launch", "plan"):
        assert "RECIPE" in out
    assert "-q, --quiet" in out


def test_every_command_calls_something_that_is_there() -> None:
    for command in COMMANDS.values():
        assert callable(load(command.function))
        assert command.dry_run is None or callable(load(command.dry_run))
        assert command.positional_option is None or command.positional_option in {
            *read_options(load(command.options)),
            "recipe",
        }
    assert {name.rpartition(" ")[0] for name in COMMANDS} == {*GROUPS, ""}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "there is no command 'nothing'; `being-vl --help` lists them"),
        (["vocab", "trian"], "there is no command 'vocab trian'; did you mean `vocab train`?"),
        (["trian"], "there is no command 'trian'; did you mean `train`?"),
        (["quantize", "images"], "out: is required"),
        (["quantize", "a", "b", "--out", "o"], "'b': nothing was expected here"),
        (
            ["vocab", "train", "g", "--out", "o", "--merge_mode", "x"],
            "--merge_mode: expected one of pair, oriented",
        ),
        (["train", "--recipe", "qwen3-1.7b"], "is a recipe for `being-vl run`"),
        (["prepare", "--recipe", "qwen3-1.7b"], "is a recipe for `being-vl run`"),
        (["check", "--recipe", "qwen3-1.7b"], "is a recipe for `being-vl run`"),
    ],
)
def test_wrong_words_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in expect_refusal(capsys, being_vl(*words))


def test_reports_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show("a report")
    show(text for text in ("one", "two"))
    show(Path("not this"))
    show(None)
    assert capsys.readouterr().out == "a report\none\ntwo\n"


BLOCKER = """
import sys
sys.modules[sys.argv[1]] = None
from being_vl.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("module", "words", "extra"),
    [
        ("pyarrow", ["grids", "info", "folder"], "data"),
        ("torch", ["quantize", "images", "--out", "o"], "data"),
        ("torch", ["generate", "--model", "m", "--prompt", "p"], "infer"),
        ("transformers", ["expand", "--llm", "l", "--vocabulary", "v", "--out", "o"], "infer"),
        ("torch", ["train", "--model", "m", "--records", "r", "--out", "o"], "train"),
    ],
)
def test_a_missing_package_names_the_extra_that_brings_it(module: str, words: list[str], extra: str) -> None:
    run = process(sys.executable, "-c", BLOCKER, module, *words)
    assert run.returncode == 1, run.stderr
    assert run.stderr.count("\n") == 1
    assert (
        f"needs the package {module}, which is not installed; from a clone: pip install '.[{extra}]'"
        in run.stderr
    )


def test_help_and_version_need_no_large_package() -> None:
    script = "import sys; from being_vl.cli import main; main(sys.argv[1:]); print('loaded:', *sys.modules)"
    for words in (["--version"], ["--help"], ["vocab"]):
        run = process(sys.executable, "-c", script, *words)
        assert not run.stderr
        modules = run.stdout.partition("loaded: ")[2].split()
        assert not {"torch", "transformers", "pyarrow", "PIL", "shtab"} & {*modules}


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The printed script of completion."""
    path = tmp_path_factory.mktemp("completion") / "script"
    path.write_text(completion(CompletionOptions("bash")))
    return path


def complete(script: Path, line: str, folder: Path) -> list[str]:
    """What a real bash offers at the end of a line, in a folder."""
    words = line.split(" ")
    bash = f"""
source {script}
COMP_WORDS=({" ".join(f"'{word}'" for word in words)}) COMP_CWORD={len(words) - 1}
COMP_LINE='{line}' COMP_POINT={len(line)}
"$(complete -p being-vl | sed 's/.*-F \\([^ ]*\\).*/\\1/')"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    run = process("bash", "-c", bash, cwd=folder)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("being-vl qua", {"quantize", "quantizer"}),
        ("being-vl vocab ", {"train", "show", "merge-stats"}),
        ("being-vl train --chec", {"--checkpoint.every", "--checkpoint.keep"}),
        ("being-vl run --train.opt", {"--train.optimizer.betas"}),
        ("being-vl train --zero ", {"0", "1", "2", "3"}),
        ("being-vl vocab train --merge_mode o", {"oriented"}),
        ("being-vl run --train.z", {"--train.zero"}),
    ],
)
def test_completion_in_bash(line: str, offers: set[str], bash_script: Path, tmp_path: Path) -> None:
    assert offers <= {*complete(bash_script, line, tmp_path)}


def test_completion_of_files_in_bash(bash_script: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    assert "mine.yaml" in complete(bash_script, "being-vl train --recipe mi", tmp_path)
    assert "mine.yaml" in complete(bash_script, "being-vl run mi", tmp_path)


def test_completion_in_zsh(tmp_path: Path) -> None:
    if not shutil.which("zsh"):
        pytest.skip("zsh is not installed")
    (tmp_path / "_being-vl").write_text(completion(CompletionOptions("zsh")))
    setup = f"fpath=({tmp_path} $fpath); autoload -U compinit; compinit -D -u; print $_comps[being-vl]"
    run = process("zsh", "-f", "-c", f"{setup}; autoload +X _being-vl")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["_being-vl"]


def test_all_commands_are_in_one_parser() -> None:
    help_text = build_parser().format_help()
    assert all(name.split()[0] in help_text for name in COMMANDS)
    assert Command.__annotations__.keys() >= {"function", "options", "text"}
