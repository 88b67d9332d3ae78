"""Checkpoints to resume from: complete or not there, and of this recipe or refused."""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from being_vl.files import remove, write_json

log = logging.getLogger(__name__)
COMPLETE = "complete.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder of one stage after one optimizer step."""

    folder: Path
    stage: str
    step: int


def aside_tag(stage: str, step: int) -> str:
    """Name of the folder that the ranks write together, before it counts."""
    return f"{stage}-{step:08d}.tmp"


def publish(root: Path, stage: str, step: int, keep: int) -> None:
    """Make the folder that all ranks have finished writing the newest checkpoint; call on one rank.

    Records the size of every file in it, renames it, and removes all but the last `keep` of the stage.
    """
    aside = root / aside_tag(stage, step)
    sizes = {str(f.relative_to(aside)): f.stat().st_size for f in sorted(aside.rglob("*")) if f.is_file()}
    write_json(aside / COMPLETE, {"stage": stage, "step": step, "files": sizes})
    final = aside.with_suffix("")
    remove(final)
    aside.rename(final)
    for old in _found(root, stage)[:-keep]:
        remove(old)


def newest(root: Path, stage: str) -> Checkpoint | None:
    """The newest complete checkpoint of a stage; a damaged one is passed over with a warning."""
    for folder in reversed(_found(root, stage)):
        problem = _problem(folder)
        if problem is None:
            return Checkpoint(folder, stage, int(folder.name.rpartition("-")[2]))
        log.warning("checkpoint %s is damaged (%s); looking for the one before it", folder, problem)
    return None


def _found(root: Path, stage: str) -> list[Path]:
    pattern = re.compile(re.escape(stage) + r"-\d{8}")
    return sorted(f for f in root.glob(f"{stage}-*") if pattern.fullmatch(f.name)) if root.is_dir() else []


def _problem(folder: Path) -> str | None:
    try:
        sizes = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{COMPLETE}: {error}"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or not {size} bytes long"
    return None
