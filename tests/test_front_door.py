"""The names of `import being_vl`: imported when used, seen by type checkers, and the same in any order of imports."""

import ast
import inspect
import pkgutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import being_vl

MODULES = {module.name for module in pkgutil.iter_modules(being_vl.__path__)}


def run_python(script: str) -> str:
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_the_package_imports_nothing_else() -> None:
    script = (
        "import sys, being_vl; dir(being_vl); being_vl.__version__;"
        "print(sorted(sys.modules.keys() & {'numpy', 'torch', 'transformers', 'pyarrow', 'tqdm', 'being_vl._core'}))"
    )
    assert run_python(script) == "[]\n"


def test_every_name_is_there() -> None:
    assert set(being_vl.__all__) <= set(dir(being_vl))
    assert sorted(being_vl.__all__) == being_vl.__all__
    for name in being_vl.__all__:
        value = getattr(being_vl, name)
        assert isinstance(value, str) or inspect.isclass(value) or inspect.isfunction(value), name
    assert being_vl.__version__ == version("being-vl")
    with pytest.raises(AttributeError, match="module 'being_vl' has no attribute 'nothing'"):
        being_vl.nothing  # noqa: B018


@pytest.mark.parametrize("package", ["being_vl", "being_vl.data", "being_vl.model"])
def test_type_checkers_see_the_same_names(package: str) -> None:
    """What stands under `if TYPE_CHECKING` is what `__getattr__` imports."""
    face = import_module(package)
    source = Path(str(face.__file__)).read_text()
    block = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    imports = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imports.keys() == set(face.__all__)
    for name, module in imports.items():
        assert module is not None
        assert getattr(face, name) is getattr(import_module(module), name)


def test_an_options_class_is_there_for_every_function_that_takes_one() -> None:
    for name in being_vl.__all__:
        function = getattr(being_vl, name)
        if not inspect.isfunction(function):
            continue
        for annotation in inspect.get_annotations(function, eval_str=True).values():
            kind = getattr(annotation, "__name__", "")
            assert not kind.endswith("Options") or kind in being_vl.__all__, (name, kind)


def test_no_name_is_a_module_too() -> None:
    """Importing a submodule sets an attribute of its package, which would replace the function of that name."""
    assert not MODULES & set(being_vl.__all__)


@pytest.mark.parametrize("order", [1, -1])
def test_functions_stay_functions_in_any_order_of_imports(order: int) -> None:
    imports = [
        "from being_vl import expand, quantize, train",
        "import being_vl.model.expand, being_vl.quantizer.job, being_vl.training.options",
    ]
    run_python(
        f"{'; '.join(imports[::order])}; import being_vl, inspect;"
        "assert all(map(inspect.isfunction, [train, quantize, expand, being_vl.train, being_vl.quantize]))"
    )
