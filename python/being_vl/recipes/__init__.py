"""The recipes that come with the package, named by their file without `.yaml`."""

from pathlib import Path
from typing import Any

import yaml

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


def read_recipe(path: Path) -> dict[str, Any]:
    """What a recipe's file holds.

    Raises:
        ConfigError: if it is no YAML of options.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected options, `name: value`, found {type(content).__name__}")
    return content
