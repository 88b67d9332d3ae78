"""The command line around the commands: help, versions, completion, messages, and how quickly it answers."""

import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from being_vl.cli import describe_error
from being_vl.commands import COMMANDS, GROUPS, Command, build_parser, load, show
from being_vl.completion import CompletionOptions, completion
from being_vl.errors import ConfigError, RecordError
from being_vl.names import LineFormatter
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


class _Failing(Dataset[int]):
    """Raises an error when it is read, or with a number kills its process by that signal."""

    def __init__(self, error: Exception | int) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        if isinstance(self.error, int):
            os.kill(os.getpid(), self.error)
            raise AssertionError
        raise self.error


NO_FAULTS_OF_THE_PROGRAM = [
    (RecordError("a.json: record 3: odd"), "a.json: record 3: odd"),
    (ConfigError("first line\n  second line\x1b[2J: x"), "first line second line\\x1b[2J: x"),
    (FileNotFoundError(2, "No such file", "b.png"), "[Errno 2] No such file: 'b.png'"),
    (OSError(36, "File name too long", "x" * 90_000), "[Errno 36] File name too long: 'xxx"),
    (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    (MemoryError(), "not enough memory; fewer or smaller images, batches, workers or threads need less"),
    (
        MemoryError("64 GB"),
        "not enough memory; fewer or smaller images, batches, workers or threads need less (64",
    ),
    (RecursionError("maximum recursion depth exceeded"), "something is nested too deeply"),
    (UnicodeEncodeError("utf-8", "a\ud800", 1, 2, "surrogates"), "a text holds what cannot be written"),
]


@pytest.mark.parametrize("in_worker", [False, True])
@pytest.mark.parametrize(("error", "message"), NO_FAULTS_OF_THE_PROGRAM)
def test_an_error_is_one_short_line(
    error: Exception,
    message: str,
    in_worker: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever its text; also one of a process that reads ahead, into whose text torch puts a traceback."""

    def fail(options: object) -> None:
        if in_worker:
            list(DataLoader(_Failing(error), None, num_workers=1, multiprocessing_context="fork"))
        raise error

    monkeypatch.setattr("being_vl.completion.completion", fail)
    line = expect_refusal(capsys, being_vl("completion", "bash"))
    assert line.startswith(f"being-vl: error: {message}")
    assert len(line) < 2100


def test_a_reading_process_that_was_killed_is_one_line() -> None:
    for number in (signal.SIGKILL, signal.SIGSEGV):
        with pytest.raises(RuntimeError) as raised:
            list(DataLoader(_Failing(int(number)), None, num_workers=1, multiprocessing_context="fork"))
        text = describe_error(raised.value)
        assert "a process that reads ahead has died (" in text
        assert "\n" not in text


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        KeyError("k"),
        RuntimeError("Caught by surprise"),
        AssertionError(),
        ValueError("no error of ours"),
    ):

        def fail(options: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("being_vl.completion.completion", fail)
        with pytest.raises(type(error)):
            being_vl("completion", "bash")


def test_log_lines_are_short_and_change_no_terminal() -> None:
    """Lines of a table stay lines; what names bring along is escaped, and cut in the middle."""
    formatter = LineFormatter("%(message)s")

    def format_text(text: str) -> str:
        return formatter.format(logging.LogRecord("being_vl", logging.INFO, "", 0, "%s", (text,), None))

    for text, expected in (
        ("a table\n  of\ttwo lines", "a table\n  of\ttwo lines"),
        ("\x1b[31mred\r\x00", "\\x1b[31mred\\r\\x00"),
        ("Gr\u00fc\u00dfe \u96ea", "Gr\u00fc\u00dfe \u96ea"),
        ("half \ud800", "half \\ud800"),
    ):
        assert format_text(text) == expected
    for text in ("x" * 10**7, "data:image/png;base64," + "A" * 90_000, "\x1b" * 10**5):
        assert len(format_text(text)) <= 1000
    lines = format_text("line\n" * 10**5).splitlines()
    assert len(lines) <= 100
    assert "lines …" in "".join(lines)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_that_cannot_show_a_name_shows_its_codes(encoding: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict"}
    command = (sys.executable, "-m", "being_vl", "run")
    settings: dict[str, Any] = {"env": environment, "encoding": "utf-8", "errors": "replace"}
    run = process(*command, str(tmp_path / "\u96ea\udcff.yaml"), **settings)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert ".yaml: no such recipe" in run.stderr
    recipe = tmp_path / "r.yaml"
    recipe.write_text("llm: 'l\u96ea\U0001f600'", encoding="utf-8")
    run = process(*command, str(recipe), "--print_config", **settings)
    assert run.returncode == 0, run.stderr
