"""Fingerprints: what an output follows from, kept beside it, so that a job goes on with its own output and no other."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from being_vl.errors import FingerprintError
from being_vl.files import to_jsonable, write_json
from being_vl.options import StrPath

FINGERPRINT = "fingerprint.json"
"""Name of the file in a job's output folder that holds its fingerprint."""


def compute_fingerprint(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def check_fingerprint(path: StrPath, fields: Mapping[str, Any], output: str | None = None) -> bool:
    """Compare the fingerprint that an output is to have with the one that is written at `path`.

    Args:
        path: The file that holds the fields of an earlier job, if there was one.
        fields: Name → value of the options and inputs that decide the output.
        output: What to call the output in an error; its folder by default.

    Returns:
        Whether there is an output of this very job, finished or not.

    Raises:
        FingerprintError: if there is one of another job, naming every field that differs; or the file is damaged.
    """
    path = Path(path)
    if not path.is_file():
        return False
    try:
        stored_fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored_fields, dict):
            raise ValueError("expected a JSON object")
    except ValueError as error:
        raise FingerprintError(
            f"{path}: cannot be read ({error}), so it is not known what the output follows from; give --overwrite to "
            "replace it, or another output"
        ) from None
    changes = "; ".join(differences(stored_fields, to_jsonable(dict(fields))))
    if changes:
        raise FingerprintError(
            f"{output or path.parent}: was made with other options or inputs ({changes}); give the earlier ones to go "
            "on with it, --overwrite to replace it, or another output"
        )
    return True


def write_fingerprint(path: StrPath, fields: Mapping[str, Any]) -> None:
    """Write what an output follows from, before the output itself."""
    write_json(path, dict(fields))


def differences(stored_value: Any, value: Any, name: str = "") -> Iterator[str]:
    """`name was …, is …` for each field that differs, those of nested mappings under `outer.inner`."""
    if isinstance(stored_value, dict) and isinstance(value, dict):
        for key in sorted(stored_value.keys() | value.keys()):
            full_name = f"{name}.{key}" if name else key
            yield from differences(stored_value.get(key), value.get(key), full_name)
    elif stored_value != value:
        yield f"{name} was {_shorten(stored_value)}, is {_shorten(value)}"


def _shorten(value: Any) -> str:
    """A value for a message; of a SHA-256 the first digits."""
    text = repr(value)
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", text)
