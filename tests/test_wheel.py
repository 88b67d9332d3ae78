"""The wheel, built in isolation from a copy of the sources, works where nothing but numpy is installed."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from helpers.photos import PHOTOS

ROOT = Path(__file__).parent.parent
SOURCES = ("Cargo.toml", "Cargo.lock", "LICENSE", "README.md", "pyproject.toml", "python", "rust")
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")

SCRIPT = """
import importlib.metadata
import json
import numpy as np
import being_vl
from being_vl import VisualBPE

grids = np.load("grids.npy")
bpe = VisualBPE.train(grids, 1024, 50, "oriented")
bpe.save("vocabulary.json")
bpe = VisualBPE.load("vocabulary.json")
batch = bpe.encode_batch(grids, num_threads=2)
assert all(np.array_equal(bpe.decode(ids, 32, 32), grid) for ids, grid in zip(batch, grids, strict=True))
installed = sorted({package.name for package in importlib.metadata.distributions()} - {"pip", "setuptools"})
print(json.dumps([being_vl.__file__, installed, bpe.merges, batch[0].tolist()]))
"""


def run(*command, **options):
    process = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=1200, **options
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as a user's pip builds it, by a copy of the sources without any compiled module."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "sources").mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "target")
            shutil.copytree(ROOT / name, folder / "sources" / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / "sources" / name)
    # Crates that were compiled already need not be compiled again.
    environment = {"CARGO_TARGET_DIR": str(ROOT / "target")} | os.environ
    run(
        sys.executable, *PIP, "wheel", folder / "sources", "--no-deps", "--wheel-dir", folder, env=environment
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_name_and_contents(wheel):
    """One wheel serves every CPython from 3.11 on, and carries the stub and the type marker."""
    assert "-cp311-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("py.typed", "_core.pyi", "tokenizer/visual_bpe.py", "recipes/demo.yaml"):
        assert f"being_vl/{name}" in names
    assert [name for name in names if name.endswith((".so", ".pyd"))] in (
        ["being_vl/_core.abi3.so"],
        ["being_vl/_core.pyd"],
    )
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "rust/"))]


@pytest.mark.slow
def test_tokenizer_with_numpy_alone(wheel, tmp_path):
    """A new environment with the wheel and numpy trains, saves, loads, encodes, decodes, as this one does."""
    from being_vl import VisualBPE

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    run(python, *PIP, "install", "--no-deps", wheel)
    run(python, *PIP, "install", f"numpy=={np.__version__}")
    np.save(tmp_path / "grids.npy", PHOTOS)
    file, module_path, merges, ids = json.loads(run(python, "-I", "-c", SCRIPT, cwd=tmp_path))
    assert Path(file).is_relative_to(environment)
    assert module_path == ["being-vl", "numpy"]
    bpe = VisualBPE.train(PHOTOS, 1024, 50, "oriented")
    assert [tuple(merge) for merge in merges] == bpe.merges
    assert ids == bpe.encode(PHOTOS[0]).tolist()
