"""Files of records: those that a folder holds, or that a name on the hub stands for."""

import codecs
import logging
from collections import Counter
from pathlib import Path

from being_vl.errors import ImageError, RecordError
from being_vl.hub import local_path
from being_vl.images.files import FolderWalk, is_output, open_file, suffix_of
from being_vl.names import show_name
from being_vl.options import StrPath

log = logging.getLogger(__name__)

_TABLES = (".parquet", ".arrow")
_DATASETS_FILES = ("dataset_info.json", "state.json")
_HEAD = 4096


def find_record_files(path: StrPath, report: bool = False) -> list[Path]:
    """The files of records that a path stands for: the file itself or, of a folder, all in it, sorted by their paths.

    In a folder and its subfolders these are JSON lists, JSON lines, tars and tables. img2dataset's tables beside its
    tars and the caches of `datasets` are none.

    Args:
        path: A file, a folder, or the name of a dataset on the hub, `hf://datasets/OWNER/NAME`.
        report: Log what a folder holds, and by its kinds what is left out.

    Raises:
        RecordError: if a folder holds no file of records.
        ConfigError: if a dataset of the hub cannot be downloaded.
    """
    name, path = path, local_path(path)
    if not path.is_dir():
        return [path]
    if is_output(path):
        raise RecordError(f"{show_name(name)}: the output of a job of being-vl; expected files of records")
    walk = FolderWalk(path)
    try:
        files = {file.name: Path(file.path) for file in walk.files()}
    except ImageError as error:
        raise RecordError(str(error)) from None
    reasons = {file: _reason_to_leave(file, files) for file in files}
    record_files = sorted(file for file, reason in reasons.items() if not reason)
    left_out = Counter(filter(None, reasons.values()))
    for item in walk.left_out:
        left_out[item.reason] += item.count
    account = ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
    if not record_files:
        raise RecordError(
            f"{show_name(name)}: no file of records found in the folder; expected .json, .jsonl, .tar, .parquet or "
            f".arrow{f' ({account})' if account else ''}"
        )
    if report:
        text = f"; left out: {account}" if account else ""
        log.info("%s: %d files of records%s", show_name(name), len(record_files), text)
    return [files[file] for file in record_files]


def _reason_to_leave(name: str, files: dict[str, Path]) -> str:
    """Why a file is no file of records; empty if it is one."""
    suffix, stem = suffix_of(name), name.rpartition(".")[0]
    if suffix == ".jsonl" or (suffix == ".json" and _is_json_list(files[name])):
        return ""
    if suffix == ".tar":
        return ""
    if suffix in _TABLES:
        folder, _, file_name = name.rpartition("/")
        if f"{stem}.tar" in files:
            return "tables beside tars of their name"
        if file_name.startswith("cache-") and any(
            f"{folder}/{n}".lstrip("/") in files for n in _DATASETS_FILES
        ):
            return "caches of datasets"
        return ""
    return f"no records ({show_name(suffix, 12) or 'no suffix'})"


def _is_json_list(path: Path) -> bool:
    try:
        with open_file(path) as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
