"""What the tokenizer needs, numpy alone, and in which direction the package's modules import each other."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import being_vl

PACKAGE = Path(being_vl.__file__).parent

SCRIPT = """
import sys

ALLOWED = sys.stdlib_module_names | {"numpy", "being_vl"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ImportError(f"{name} is not to be imported here")

sys.meta_path.insert(0, Refuse())
try:
    import torch
except ImportError:
    pass
else:
    sys.exit("the test does not refuse anything")

import numpy as np
from being_vl import EncodedBatch, VisualBPE
import being_vl.errors

grids = np.arange(64).reshape(4, 4, 4) % 3
bpe = VisualBPE.train(grids, 3, 10, merge_mode="oriented")
bpe.save(sys.argv[1])
bpe = VisualBPE.load(sys.argv[1])
assert isinstance(bpe.encode_batch(grids), EncodedBatch)
assert (bpe.decode(bpe.encode(grids[0]), 4, 4) == grids[0]).all()
extra = {name.partition(".")[0] for name in sys.modules} - ALLOWED
print(sorted(name for name in extra if not name.startswith("_")))
"""


def test_numpy_is_all_that_the_tokenizer_needs(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "vocab.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


# From the face down to the compiled core. A room imports from its own line and from the lines below.
ROOMS = """
    being_vl __main__
    cli
    completion
    commands
    run demo
    launch estimate
    recipes
    training
    model
    data
    quantizer
    tokenizer
    images shards
    flags
    schema
    contents
    layout options outputs fingerprints devices progress quantizer_names
    hub
    files lazy version extras yaml_text account names
    errors
    _core
"""
LEVEL = {room: level for level, line in enumerate(ROOMS.split("\n")) for room in line.split()}


def list_imports() -> dict[str, set[str]]:
    """Each module of the package → the modules of the package that it imports, also within functions."""
    trees = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(["being_vl", *path.relative_to(PACKAGE).with_suffix("").parts])
        trees[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    modules = trees.keys() | {"being_vl._core"}
    imports: dict[str, set[str]] = {"being_vl._core": set()}
    for name, tree in trees.items():
        targets = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name}: a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                targets |= {target if target in modules else str(node.module) for target in names}
        imports[name] = {target for target in targets if target.split(".")[0] == "being_vl"}
    return imports


def find_room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_every_room_has_its_place() -> None:
    assert {find_room(module) for module in list_imports()} == LEVEL.keys()


def test_rooms_import_downwards_only() -> None:
    upward_imports = [
        f"{module} imports {target}"
        for module, targets in list_imports().items()
        for target in sorted(targets)
        if LEVEL[find_room(target)] < LEVEL[find_room(module)]
    ]
    assert not upward_imports, "\n".join(upward_imports)


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter(list_imports()).prepare()  # raises CycleError, which names the circle
