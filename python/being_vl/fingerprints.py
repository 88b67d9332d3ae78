"""Fingerprints: what an output follows from, kept beside it, so that a job goes on with its own output and no other."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from being_vl.errors import FingerprintError
from being_vl.files import to_jsonable, write_json

FINGERPRINT = "fingerprint.json"
"""Name of the file in a job's output folder that holds its fingerprint."""


def compute_fingerprint(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def check_fingerprint(path: Path, fields: Mapping[str, Any], what: str | None = None) -> bool:
    """Compare what an output is to follow from with what `path` says that the one there follows from.

    Args:
        path: The file that holds the fields of an earlier job, if there was one.
        fields: Name → value of the options and inputs that decide the output.
        what: What to call the output in an error; its folder by default.

    Returns:
        Whether there is an output of this very job, finished or not.

    Raises:
        FingerprintError: if there is one of another job, naming every field that differs; or the file is damaged.
    """
    if not path.is_file():
        return False
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(earlier, dict):
            raise ValueError("expected a JSON object")
    except ValueError as error:
        raise FingerprintError(
            f"{path}: cannot be read ({error}), so it is not known what the output follows from; give --overwrite to "
            "replace it, or another output"
        ) from None
    changes = "; ".join(differences(earlier, to_jsonable(dict(fields))))
    if changes:
        raise FingerprintError(
            f"{what or path.parent}: was made with other options or inputs ({changes}); give the earlier ones to go "
            "on with it, --overwrite to replace it, or another output"
        )
    return True


def write_fingerprint(path: Path, fields: Mapping[str, Any]) -> None:
    """Write what an output follows from, before the output itself."""
    write_json(path, dict(fields))


def differences(earlier: Any, now: Any, name: str = "") -> Iterator[str]:
    """`name was …, is …` for each field that differs, those of nested mappings under `outer.inner`."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        for key in sorted(earlier.keys() | now.keys()):
            yield from differences(earlier.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif earlier != now:
        yield f"{name} was {_shorten(earlier)}, is {_shorten(now)}"


def _shorten(value: Any) -> str:
    """A value for a message; of a SHA-256 the first digits."""
    text = repr(value)
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", text)
