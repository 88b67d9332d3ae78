"""Datasets of the Hugging Face hub, and those in memory of the package `datasets`, as folders on this machine."""

import hashlib
import json
import os
import re
import sys
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from being_vl.errors import ConfigError
from being_vl.files import file_version, write_aside
from being_vl.names import show_name

HUB = "hf://datasets/"
"""What names of datasets on the hub begin with."""

ROWS = 100
"""Rows of a dataset that are written, and later read, at a time."""

_HUB_NAME = re.compile(
    r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)(?:@(?P<revision>refs/\w+/[^/]+|[^/]+))?(?:/+(?P<place>.+))?"
)


def is_hub_name(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the name of a dataset on the hub; `Path` has taken one of its slashes away."""
    return bool(re.match("hf:(/|$)", os.fspath(path)))


def local_path(path: Any) -> Path:
    """A path as it is, or for a dataset on the hub where its files are on this machine, to which they are downloaded.

    Args:
        path: A path, or `hf://datasets/OWNER/NAME`, with `@REVISION` and `/FOLDER` or `/FILE` behind it if wanted; or a
            `datasets.Dataset`.

    Raises:
        ConfigError: if the hub has no such dataset, or cannot be reached and the dataset is not in its cache.
    """
    place_or_name = to_path(path)
    if not is_hub_name(place_or_name):
        return place_or_name
    name = re.sub("^hf:/*", "hf://", os.fspath(place_or_name))
    match = _HUB_NAME.fullmatch(name)
    if match is None or "/../" in f"{name}/":
        raise ConfigError(
            f"{show_name(name)}: expected {HUB}OWNER/NAME, {HUB}OWNER/NAME@REVISION/FOLDER or the like"
        )
    place = (match["place"] or "").rstrip("/")
    folder = _download(name, match["repository"], match["revision"] and unquote(match["revision"]), place)
    if not (folder / place).exists():
        raise ConfigError(f"{show_name(name)}: the dataset holds no {show_name(place)}")
    return folder / place


def find_blobs(path: str) -> str | None:
    """The folder of the hub's cache to which the files of a dataset are links; None if a real path is not in it."""
    parts = Path(path).parts
    if "snapshots" not in parts:
        return None
    blobs = Path(*parts[: len(parts) - 1 - parts[::-1].index("snapshots")], "blobs")
    return f"{blobs}{os.sep}" if blobs.is_dir() else None


def _download(name: str, repository: str, revision: str | None, place: str) -> Path:
    """The folder of a dataset in the hub's cache, with all of its files or those of one place."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                repository,
                repo_type="dataset",
                revision=revision,
                allow_patterns=[place, f"{place}/*"] if place else None,
            )
        )
    except GatedRepoError:
        reason = "the hub wants you to accept its terms; do so on its page, then run `hf auth login`"
    except RepositoryNotFoundError:
        reason = "the hub has no such dataset, or it is private: run `hf auth login`"
    except RevisionNotFoundError:
        reason = f"the dataset has no revision {show_name(revision)}"
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached, and the dataset is not in its cache"
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = show_name(str(error).splitlines()[0] if str(error) else type(error).__name__)
    raise ConfigError(f"{show_name(name)}: cannot be downloaded ({reason})") from None


def is_dataset(value: Any) -> bool:
    """Whether a value is a dataset of the package `datasets`, of any kind."""
    datasets = sys.modules.get("datasets")  # who has a dataset has imported it
    names = ("Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict")
    return datasets is not None and isinstance(value, tuple(getattr(datasets, name) for name in names))


def to_path(value: Any) -> Path:
    """A path of a path, or the folder of a `datasets.Dataset`, which is written for it.

    Raises:
        ConfigError: if the value is neither.
    """
    if isinstance(value, str | os.PathLike):
        return Path(value)
    if not is_dataset(value):
        raise ConfigError(
            f"a value of the type {type(value).__name__}; expected a path or a datasets.Dataset"
        )
    if isinstance(value, dict):
        raise ConfigError(
            f"a {type(value).__name__} of the splits {', '.join(map(str, value))}; expected one of them"
        )
    if not hasattr(value, "with_transform"):
        raise ConfigError("an IterableDataset; expected a Dataset, that is one loaded without streaming")
    return _write_dataset(value)


def _write_dataset(dataset: Any) -> Path:
    """The folder, in the cache of `datasets`, that holds a dataset with its images; written once."""
    import datasets
    import pyarrow as pa
    from datasets.table import embed_table_storage

    if dataset.format["type"] == "custom":
        raise ConfigError(
            "a Dataset with a transform, which is applied as its rows are read; expected one without: use `map`"
        )
    if not len(dataset):
        raise ConfigError("a Dataset without rows")
    content = json.dumps([dataset._fingerprint, _find_outer_files(dataset.data.table)])
    name = hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "being_vl" / name
    path = folder / "data.arrow"
    if path.is_file():
        return folder
    # Images that are files elsewhere are written into the rows, as `push_to_hub` does.
    rows = dataset.with_format("arrow").iter(ROWS)
    part_path = folder.with_name(f"{name}-{os.getpid()}.arrow")
    try:
        with write_aside(part_path) as part:
            tables = map(embed_table_storage, rows)
            first_table = next(tables)
            with pa.ipc.new_file(str(part), first_table.schema) as writer:
                for table in chain([first_table], tables):
                    writer.write_table(table.combine_chunks())
    except OSError as error:
        raise ConfigError(f"a Dataset that cannot be written to {folder} ({show_name(error)})") from error
    folder.mkdir(parents=True, exist_ok=True)
    part_path.replace(path)
    return folder


def _find_outer_files(table: Any) -> list[list[Any]]:
    """Path, size and time of change of each image that a dataset names and does not hold."""
    import pyarrow as pa
    import pyarrow.compute as pc

    paths: set[str] = set()
    for column in table.columns:
        while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            column = pc.list_flatten(column)
        if pa.types.is_struct(column.type) and {"bytes", "path"} <= {field.name for field in column.type}:
            is_outer = pc.is_null(pc.struct_field(column, "bytes"))
            paths |= set(pc.struct_field(column, "path").filter(is_outer).to_pylist())
    return [[path, *file_version(path)] for path in sorted(paths - {None})]
