"""The recipes that come with the package, named by their file without `.yaml`."""

from pathlib import Path

from being_vl.errors import ConfigError

FOLDER = Path(__file__).parent


def find_recipe(name: str | Path) -> Path:
    """A recipe's file: a path, or the name of a shipped one.

    Raises:
        ConfigError: if there is neither; names the shipped ones.
    """
    for path in (Path(name), FOLDER / f"{name}.yaml"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
    raise ConfigError(f"{name}: no such recipe; expected a file, or one of {shipped}")
