"""Every option of every command with values out of range: one line that names the option, before any work."""

from collections.abc import Iterator
from pathlib import Path
from types import NoneType

import pytest

from being_vl.commands import COMMANDS, load
from being_vl.devices import find_device
from being_vl.errors import ConfigError, QuantizerError
from being_vl.flags import REST, list_alternatives, read_flags
from being_vl.quantizer.base import load_quantizer
from being_vl.recipes.recipe import make_options
from being_vl.schema import NO_DEFAULT, Option, read_options, walk
from helpers.commands import being_vl, expect_refusal

INTEGERS = "-1", str(2**63), "1" + "0" * 30, "9" * 5000, "1.5", ".nan", ".inf", "x", "", "1:30", "0777"
NUMBERS = "-1", ".nan", "nan", ".inf", "-.inf", "1e999", "9" * 5000, "x", ""
DEVICES = "foo", "", "cuda:x", "cuda:-1", "cuda:", "cpu:0", "cuda:99999999", "gpu", "x" * 5000


def odd_values(name: str, option: Option) -> tuple[str, ...]:
    """Words that this option does not take."""
    kinds = [kind for kind in list_alternatives(option.hint) if kind is not NoneType]
    if name.rpartition(".")[2] == "device":
        return DEVICES
    if int in kinds:
        return INTEGERS if float not in kinds else NUMBERS
    if float in kinds:
        return NUMBERS
    if str in kinds or Path in kinds:
        return ("",)
    return ()


def required_words(name: str) -> list[str]:
    """Words for the options of a command without which it does nothing."""
    command = COMMANDS[name]
    words = ["qwen3-1.7b"] if command.positional_option == "recipe" else []
    for option_name, option in read_options(load(command.options)).items():
        if option.options is None and option.default is NO_DEFAULT and option_name != "recipe":
            value = "3" if int in list_alternatives(option.hint) else "x"
            words += [value] if option_name == command.positional_option else [f"--{option_name}={value}"]
    return words


def odd_flags(name: str) -> Iterator[tuple[str, str]]:
    """Flags of a command, each with words that it does not take."""
    command = COMMANDS[name]
    for option_name, option in walk(read_options(load(command.options))):
        if option_name not in (REST, command.positional_option):
            for value in odd_values(option_name, option):
                yield option_name, value


@pytest.mark.parametrize("name", COMMANDS)
def test_values_out_of_range_name_the_option(name: str) -> None:
    words, kind = required_words(name), load(COMMANDS[name].options)
    options = read_options(kind)
    parser = COMMANDS[name].parser(name, options)
    problems = []
    for option_name, value in odd_flags(name):
        try:
            flags = read_flags(parser, options, [*words, f"--{option_name}={value}"])
            make_options(kind, None, {key: flags[key] for key in flags if key in options})
            problems.append((option_name, value[:50], "was taken"))
        except ConfigError as error:
            message = str(error)
            if option_name.rpartition(".")[2] not in message or "\n" in message or len(message) > 500:
                problems.append((option_name, value[:50], message[:500]))
    assert not problems


@pytest.mark.parametrize("name", [name for name in COMMANDS if any(True for _ in odd_flags(name))])
def test_the_command_line_answers_in_a_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    option_name, value = next(odd_flags(name))
    line = expect_refusal(capsys, being_vl(*name.split(), *required_words(name), f"--{option_name}={value}"))
    assert option_name in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "qwen3-1.7b", "--records", '{"a": -5}'], "records.a: expected at least 0, found -5"),
        (["plan", "qwen3-1.7b", "--records", '{"a": .nan}'], "records.a: expected a whole number"),
        (["plan", "qwen3-1.7b", "--records", "{a: &a [*a]}"], "--records"),
        (["demo", "--seed", "-1"], "seed: expected at least 0, found -1"),
        (
            ["demo", "--seed", str(2**63)],
            "seed: expected 0 to 9223372036854775807, found 9223372036854775808",
        ),
        (["vocab", "train", "g", "--out", "o", "--num_threads", ""], "num_threads: expected a whole number"),
        (["quantize", "x", "--out", "o", "--device", "foo"], "device: expected auto, cpu, cuda or a GPU"),
    ],
)
def test_some_that_people_tried(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = expect_refusal(capsys, being_vl(*words))
    assert message in line


@pytest.mark.parametrize("device", ["foo", "cuda:99", "cuda:999", ""])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(ConfigError, match=r"^device: ") as error:
        find_device(device)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin@0", "expected a size of 1 to 8192 pixels, found 0"),
        ("builtin@99999992", "expected a size of 1 to 8192 pixels, found 99999992"),
        ("builtin@12", "expected a positive multiple of 8"),
        ("builtin@" + "9" * 5000, "expected NAME@SIZE"),
        ("builtin@-8", "expected NAME@SIZE"),
        ("builtin@1.5", "expected NAME@SIZE"),
        ("builtin@", "expected NAME@SIZE"),
        ("builtin@٨", "expected NAME@SIZE"),
        ("@8", "expected NAME@SIZE"),
    ],
)
def test_sizes_of_quantizers_out_of_range(name: str, message: str) -> None:
    with pytest.raises(QuantizerError, match=message) as error:
        load_quantizer(name, "cpu")
    assert len(str(error.value)) < 300
