"""What the losses of a training depend on, to be compared when it goes on."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import distributed as dist

from being_vl.contents import hash_files
from being_vl.data.options import RecordFile
from being_vl.errors import ConfigError, ManifestError
from being_vl.files import MANIFEST, check_replaceable, read_manifest, remove
from being_vl.fingerprints import FINGERPRINT
from being_vl.images.record_files import find_record_files
from being_vl.model.weights import list_files
from being_vl.options import StrPath, fixed_options
from being_vl.outputs import check_apart, check_folder, check_only_files, is_empty, read_json
from being_vl.training.log import LOG_FILE
from being_vl.training.options import TrainOptions
from being_vl.training.schedule import count_rows_of_step

KIND = "training"
"""How the fingerprint in an output folder names this job."""
OUTPUTS = (LOG_FILE, "checkpoints", "tensorboard", "wandb", FINGERPRINT)
"""What a training writes besides its stages' folders; `prepared` has a fingerprint of its own."""


_CONTENTS = {
    "checkpoints": r".+-\d{8}(\.tmp)?|latest_universal",
    "tensorboard": r"events\.out\.tfevents\..*",
    "wandb": r"(offline-)?run-.*|latest-run|debug.*|settings",
}
"""Patterns of the names in the folders that a training writes besides its stages."""


def training_fingerprint(options: TrainOptions, ranks: int) -> dict[str, Any]:
    """All options that the losses of a training depend on; `hash_inputs` gives the rest.

    A stage's accumulation counts by the size of its batches.

    Args:
        options: Of the training.
        ranks: Number of ranks of the first start, by which the batches were made.
    """
    fields = fixed_options(options)
    fields["stages"] = {}
    for number, stage in enumerate(options.stages):
        stage_fields = fixed_options(stage)
        del stage_fields["accumulation"]
        stage_fields["batch_size"] = count_rows_of_step(stage, options.batches, ranks)
        fields["stages"][str(number)] = stage_fields
    categories = [file.category for file in options.records]
    return fields | {"kind": KIND, "ranks": ranks, "records_categories": categories}


def hash_inputs(model: StrPath, records: Sequence[RecordFile], grids: Sequence[StrPath]) -> dict[str, Any]:
    """SHA-256 of the files of model, records and grids: by name as `model_sha256`, as lists under `records_sha256` …

    The order of the folders of grids does not count.
    """
    files = {
        "model_sha256": [
            path for path in list_files(os.fspath(model)) if path.name not in (MANIFEST, FINGERPRINT)
        ],
        "records_sha256": [path for file in records for path in _list_record_files(file.path)],
        "grids_sha256": [Path(folder) / MANIFEST for folder in grids],
    }
    hashes = hash_files(path for paths in files.values() for path in paths)
    return {
        "model_sha256": {path.name: hashes[path] for path in files["model_sha256"]},
        "records_sha256": [hashes[path] for path in files["records_sha256"]],
        "grids_sha256": sorted(hashes[path] for path in files["grids_sha256"]),
    }


def _list_record_files(path: Path) -> list[Path]:
    """What tells records from others: of a folder that was prepared its manifest, else the files themselves."""
    manifest = path / MANIFEST
    return [manifest] if manifest.is_file() else find_record_files(path)


def hash_inputs_of_nodes(
    model: StrPath, records: Sequence[RecordFile], grids: Sequence[StrPath]
) -> dict[str, Any]:
    """`hash_inputs` by one rank on each node, since local copies may differ; all ranks call it.

    Raises:
        ConfigError: if they do differ.
    """
    is_first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
    hashes = hash_inputs(model, records, grids) if is_first_of_node else None
    hashes_of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes_of_ranks, hashes)
    hashes_of_nodes = list(filter(None, hashes_of_ranks))
    names = [name for name in hashes_of_nodes[0] if len({str(node[name]) for node in hashes_of_nodes}) > 1]
    # Nodes with copies of their own may hold others.
    if names:
        inputs = " and ".join(name.removesuffix("_sha256") for name in names)
        raise ConfigError(f"{inputs}: not the same files on all nodes; copy them again")
    return dict(hashes_of_nodes[0])


def read_fields(out: StrPath) -> dict[str, Any]:
    """The fields of the fingerprint in a folder; empty if there is none, or it is damaged."""
    path = Path(out) / FINGERPRINT
    try:
        fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        fields = {}
    return fields if isinstance(fields, dict) else {}


def check_output(options: TrainOptions) -> None:
    """Refuse a folder as that of a training unless it is new, empty, or holds a training.

    Raises:
        OutputError: if it is refused.
    """
    inputs = [options.model, *options.grids, *(file.path for file in options.records)]
    # A damaged fingerprint beside finished stages is told by what compares it.
    is_damaged = (options.out / FINGERPRINT).is_file() and not read_fields(options.out)
    if is_damaged and any(is_stage(folder) for folder in options.out.iterdir()):
        check_apart(options.out, inputs)
    else:
        check_folder(options.out, KIND, inputs=inputs, is_own=_is_part)


def _is_part(path: Path) -> bool:
    """Whether something in a folder is what a training, or its launch, leaves there before its fingerprint."""
    if path.is_dir():
        is_preparation = is_empty(path) or read_json(path / FINGERPRINT).get("kind") == "sequences"
        return (path.name == "prepared" and is_preparation) or is_stage(path)
    if path.name == "job.sbatch":
        return path.read_bytes().startswith(b"#!/bin/bash\n#SBATCH --job-name=being-vl-")
    return path.name == "deepspeed_env" or (path.name == "options.json" and "stages" in read_json(path))


def is_stage(folder: StrPath) -> bool:
    """Whether a folder is the finished output of a stage."""
    try:
        read_manifest(Path(folder), "stage")
    except ManifestError:
        return False
    return True


def find_outputs(out: StrPath) -> list[Path]:
    """What trainings have written into a folder; nothing if it holds the output of another kind of job."""
    out = Path(out)
    fields = read_fields(out)
    if fields and "stages" not in fields:
        return []
    stages = [folder for folder in sorted(out.iterdir()) if folder.is_dir() and is_stage(folder)]
    # The fingerprint last: a removal that is interrupted before can be done again.
    return [*stages, *(out / name for name in OUTPUTS if (out / name).exists())]


def remove_outputs(out: StrPath) -> None:
    """Remove what trainings have written into a folder.

    Raises:
        OutputError: if there is something else in the folders that would go; nothing is removed then.
    """
    out = Path(out)
    outputs = find_outputs(out)
    for path in outputs:
        if path.name in _CONTENTS:
            check_only_files(path, _CONTENTS[path.name])
        elif path.is_dir():
            check_replaceable(path, "stage")
    for path in outputs:
        remove(path)
