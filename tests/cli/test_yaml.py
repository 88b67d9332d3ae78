"""Recipes that are traps: bombs, recursion, numbers that are none, other encodings; each is one line, soon."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from being_vl.errors import ConfigError
from being_vl.recipes.recipe import Recipe
from being_vl.schema import Option, check_values
from being_vl.yaml_text import dump_yaml, parse_yaml

READ = """
import json, resource, sys, time
from pathlib import Path
from being_vl.recipes.recipe import Recipe

limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 2**28
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
results = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    start = time.process_time()
    try:
        Recipe.find(path)
        message = "was read"
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
    results[path.name] = message, time.process_time() - start
print(json.dumps(results))
"""

LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
)
LAUGHING_KEYS = "\n".join(
    ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{b: *a{n - 1}, c: *a{n - 1}, <<: *a{n - 1}}}" for n in range(1, 40)]
)

TRAPS = {
    "laughs": (LAUGHS.encode(), "line 5: no YAML (more than 20,000 values"),
    "laughing keys": (LAUGHING_KEYS.encode(), "more than 20,000 values"),
    "itself": (b"llm: x\nseed: &a [1, *a]\n", "line 2: no YAML (&a is inside itself)"),
    "itself by mapping": (b"seed: &a {b: {c: *a}}\n", "line 1: no YAML (&a is inside itself)"),
    "merged with itself": (b"seed: &a\n  <<: *a\n", "line 2: no YAML (&a is inside itself)"),
    "deep list": (b"seed: " + b"[" * 10_000, "line 1: no YAML (more than 50 lists and mappings"),
    "deep closed list": (b"seed: " + b"[" * 10_000 + b"]" * 10_000, "more than 50 lists and mappings"),
    "deep mapping": (b"seed: " + b"{a: " * 10_000, "more than 50 lists and mappings"),
    "deep blocks": (b"".join(b" " * n + b"a:\n" for n in range(300)), "more than 50 lists and mappings"),
    "deep dashes": (b"seed: \n  " + b"- " * 5000, "more than 50 lists and mappings"),
    "digits": (b"llm: x\n\nseed: " + b"9" * 5000, "line 3: no YAML (a number of 5,000 digits)"),
    "negative digits": (b"seed: -" + b"9" * 5000, "line 1: no YAML (a number of 5,000 digits)"),
    "digits in base 16": (b"seed: 0x" + b"f" * 5000, "a number of 5,002 digits"),
    "digits in base 2": (b"seed: 0b" + b"1" * 5000, "a number of 5,002 digits"),
    "digits in base 60": (b"seed: 1" + b":59" * 5000, "digits)"),
    "digits of a float": (b"seed: 1." + b"9" * 5000, "a number of 5,002 digits"),
    "base 60": (b"llm: x\nseed: 1:30\n", "line 2: no YAML ('1:30' is a number in base 60"),
    "base 60 float": (b"seed: 1:30.5\n", "'1:30.5' is a number in base 60"),
    "base 8": (b"seed: 0777\n", "line 1: no YAML ('0777' is a number in base 8"),
    "no date": (b"seed: 2001-99-99\n", "line 1: no YAML ('2001-99-99' is no date"),
    "twice": (b"seed: 1\nout: x\nseed: 2\n", "line 3: no YAML ('seed' comes twice)"),
    "long twice": (b"a" * 500 + b": 1\n" + b"a" * 500 + b": 1\n", "line 2: no YAML"),
    "tabs": (b"vocab:\n\tseed: 1\n", "line 2: no YAML"),
    "NUL": (b"llm: a\0b\n", "no YAML (it holds the character 0x0"),
    "control": (b"llm: a\x1bb\n", "no YAML (it holds the character 0x1b"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), "save it as UTF-8"),
    "Latin-1": ("llm: ü\n".encode("latin-1"), "save it as UTF-8"),
    "python object": (
        b"llm: x\nseed: !!python/object/apply:os.system [ls]\n",
        "line 2: no YAML (could not determine",
    ),
    "python name": (b"seed: !!python/name:os.system\n", "line 1: no YAML (could not determine"),
    "unknown tag": (b"seed: !x 1\n", "line 1: no YAML (could not determine"),
    "tag of a number": (b"seed: !!int x\n", "line 1: no YAML ('x' is no number"),
    "tag of a list": (b"seed: !!int [1]\n", "line 1: no YAML (expected a scalar"),
    "tag of a mapping": (b"seed: !!map [1]\n", "line 1: no YAML (expected a mapping"),
    "tag of a bool": (b"seed: !!bool perhaps\n", "no YAML"),
    "tag of a date": (b"seed: !!timestamp x\n", "no YAML"),
    "tag of bytes": (b"seed: !!binary '\xc3\xbc'\n", "no YAML"),
    "anchor twice": (b"a: &x 1\nb: &x 2\n", "line 2: no YAML (&x comes twice"),
    "unknown alias": (b"seed: *a\n", "line 1: no YAML (found undefined alias"),
    "list as a key": (b"? [1]\n: 2\n", "line 1: no YAML"),
    "mapping as a key": (b"? {a: 1}\n: 2\n", "line 1: no YAML"),
    "two documents": (b"seed: 1\n---\nseed: 2\n", "line 2: no YAML"),
    "many values": (b"seed:\n" + b"- 1\n" * 100_000, "line 20001: no YAML (more than 20,000 values"),
    "many keys": (b"".join(b"a%d: 1\n" % n for n in range(30_000)), "more than 20,000 values"),
    "large": (b"llm: " + b"x" * 100_000_000, "at most 500,000 bytes, this file 100,000,005"),
    "empty": (b"", "expected options"),
    "text": (b"seed", "expected options"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
def test_traps_are_refused_in_a_line(tmp_path: Path) -> None:
    for name, (content, _) in TRAPS.items():
        (tmp_path / name).write_bytes(content)
    process = subprocess.run(
        [sys.executable, "-c", READ, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr[-2000:]
    results = json.loads(process.stdout)
    (tmp_path / "large").unlink()
    problems = []
    for name, (_, expected) in TRAPS.items():
        message, seconds = results[name]
        is_line = message.startswith(f"ConfigError: {tmp_path / name}: ") and "\n" not in message
        if not (is_line and expected in message and len(message) < 500 and seconds < 10):
            problems.append((name, message[:500], seconds))
    assert not problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("-.5e1", -5.0),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0", 0),
        ("0.1", 0.1),
        ("007.5", 7.5),
        ("'0777'", "0777"),
        ("'1:30'", "1:30"),
        ("a:b", "a:b"),
        ("no", False),
        ("'no'", "no"),
        ("~", None),
        ("{a: &x [1, 2], b: *x, c: *x}", {"a": [1, 2], "b": [1, 2], "c": [1, 2]}),
        ("{a: &x {k: 1}, b: {<<: *x, l: 2}}", {"a": {"k": 1}, "b": {"k": 1, "l": 2}}),
    ],
)
def test_values_of_yaml(text: str, value: object) -> None:
    assert parse_yaml(text) == value
    assert parse_yaml(dump_yaml(value)) == value


def test_byte_order_mark_of_utf8_is_read(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfseed: 1\n")
    assert Recipe.find(tmp_path / "r.yaml").content == {"seed": 1}


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (float, ".nan"),
        (float, ".inf"),
        (float, "-.inf"),
        (float, "1e999"),
        (float, "0x" + "f" * 290),
        (int, ".inf"),
        (int, "1.5"),
        (int, "2001-01-01"),
        (int, "yes"),
        (str, "no"),
        (str, "2001-01-01"),
        (str, "1e-4"),
        (str, '"a\\0b"'),
        (Path, '"a\\0b"'),
        (Path | None, '"a\\0b"'),
        (Path, "''"),
        (list[Path], '["a", "b\\0"]'),
    ],
)
def test_values_of_the_wrong_kind_name_the_option(hint: object, text: str) -> None:
    with pytest.raises(ConfigError, match=r"^rate(\[1\])?: expected .*, found ") as error:
        check_values({"rate": parse_yaml(text)}, {"rate": Option(hint, None, "")})
    assert len(str(error.value)) < 200
