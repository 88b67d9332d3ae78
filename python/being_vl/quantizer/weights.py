"""The files of a published VQ model: its weights, and what stands beside them in a folder or hub repository."""

import json
import os
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from being_vl.errors import ManifestError, QuantizerError
from being_vl.files import MANIFEST, read_manifest
from being_vl.options import StrPath
from being_vl.yaml_text import parse_yaml

CODEBOOK = "quantize.embedding.weight"
VQ_PREFIXES = ("encoder.", "decoder.", "quantize.embedding.", "quant_conv.", "post_quant_conv.")
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")

TensorReader = tuple[list[str], Callable[[str], Tensor]]
"""Names of a file's tensors, and the function that reads one of them."""


class WeightFiles:
    """Tensors of a VQ model, under the names they were published with, and the files beside them.

    Args:
        name: A folder, a file of weights, or a name on the hub: `owner/repository` or `owner/repository/file`. Of a hub
            repository only the configuration and the files that hold the VQ model are downloaded.

    Raises:
        QuantizerError: if there is no such folder, file or repository.
    """

    def __init__(self, name: StrPath) -> None:
        self.path = Path(name)
        if not self.path.exists():
            self.path = _download(os.fspath(name))
        self.folder = self.path if self.path.is_dir() else self.path.parent
        # A repository's own name: the folder that it is downloaded to is named by a revision.
        self._default_name = Path(name).resolve().name if self.path.is_dir() else self.path.stem

    @property
    def name(self) -> str:
        """The name that it was saved with, or that of the folder, repository or file."""
        return str(self.manifest["name"]) if self.manifest else self._default_name

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What our `save_pretrained` wrote beside the weights; empty for what others published."""
        if not (self.folder / MANIFEST).is_file():
            return {}
        try:
            return read_manifest(self.folder, "quantizer")
        except ManifestError as error:
            raise QuantizerError(f"{error}; expected 'builtin' or a folder of a quantizer") from None

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`; empty if there is none."""
        return _read_json(self.folder / "config.json")

    @property
    def model_type(self) -> str:
        """transformers' name of the family, or an empty string."""
        return str(self.config.get("model_type", ""))

    @cached_property
    def image_processor(self) -> dict[str, Any]:
        """transformers' options of the image processor; empty if there are none."""
        files = (self.folder / name for name in ("preprocessor_config.json", "processor_config.json"))
        options = next(filter(None, map(_read_json, files)), {})
        return dict(options.get("image_processor", options))

    @cached_property
    def resolution(self) -> int | None:
        """Side of the training images that a taming YAML says, in pixels."""
        folders = [self.folder, self.folder.parent / "configs"] if self.path.is_file() else [self.folder]
        for path in (path for folder in folders for path in sorted(folder.rglob("*.yaml"))):
            try:
                fields = parse_yaml(path.read_text(encoding="utf-8"))
                return int(fields["model"]["params"]["ddconfig"]["resolution"])
            except (KeyError, TypeError, ValueError, yaml.YAMLError):
                continue
        return None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Encoder, codebook and, where there is one, decoder; without the prefix that they have in a larger model.

        Where safetensors hold no decoder, as transformers' Chameleon, it is taken from a `.ckpt` beside them.

        Raises:
            QuantizerError: if there are no weights or no codebook of the usual name, or a `.ckpt` beside has another.
        """
        tensors = _read_tensors(self._weight_files())
        if CODEBOOK not in tensors:
            raise QuantizerError(f"{self.path}: no tensor is named …{CODEBOOK}; expected a VQ model")
        if not any(name.startswith("decoder.") for name in tensors):
            for path in sorted(self.folder.glob("*.ckpt")):
                original_tensors = _read_tensors([path])
                if not _have_same_codebook(original_tensors, tensors):
                    raise QuantizerError(
                        f"{path}: its codebook is not that of the weights beside it, so its decoder does not belong "
                        "to them; remove it or put the right one there"
                    )
                tensors = original_tensors | tensors
        return tensors

    def _weight_files(self) -> list[Path]:
        """The file itself, or a folder's safetensors, or where there are none the pickles below it."""
        if self.path.is_file():
            return [self.path]
        files = sorted(self.path.glob("*.safetensors"))
        files = files or [path for path in sorted(self.path.rglob("*")) if path.suffix in PICKLE_SUFFIXES]
        if not files:
            raise QuantizerError(
                f"{self.path}: holds no weights; expected .safetensors, {', '.join(PICKLE_SUFFIXES)}"
            )
        return files


def rename_tensors(tensors: dict[str, Tensor], patterns: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Tensors under other names: each pattern (regular expression, replacement) applied, one after the other."""
    translation = {}
    for name, tensor in tensors.items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        translation[name] = tensor
    return translation


def _have_same_codebook(tensors: dict[str, Tensor], references: dict[str, Tensor]) -> bool:
    codebook, reference = tensors.get(CODEBOOK), references[CODEBOOK]
    return codebook is not None and torch.equal(codebook.to(reference.dtype), reference)


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """The VQ model's tensors of files that together hold one model, possibly a larger one."""
    readers = [
        _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path) for path in files
    ]
    prefix = _model_prefix(name for names, _ in readers for name in names)
    vq_names = tuple(prefix + part for part in VQ_PREFIXES)
    return {
        name.removeprefix(prefix): read(name)
        for names, read in readers
        for name in names
        if name.startswith(vq_names)
    }


def _model_prefix(names: Iterable[str]) -> str:
    """What stands before the VQ model's names in a larger model, `model.vqmodel.` for one."""
    prefixes = (name.removesuffix(CODEBOOK) for name in names if name.endswith(CODEBOOK))
    return min(prefixes, key=len, default="")


def _open_safetensors(path: Path) -> TensorReader:
    file = safe_open(path, "pt")
    return list(file.keys()), file.get_tensor


class _InertObject:
    """Takes the place of every class in a pickle that is not a tensor's, so that none of their code runs."""

    def __init__(self, *_: Any) -> None:
        pass


def _open_pickle(path: Path) -> TensorReader:
    """A file of `torch.save`: tensors under `state_dict` (Lightning), `ema` or `model` (LlamaGen), or plain."""
    try:
        try:
            classes, mmap = torch.serialization.get_unsafe_globals_in_checkpoint(path), True
        except ValueError:  # written before torch 1.6
            classes, mmap = [], False
        with torch.serialization.safe_globals([(_InertObject, name) for name in classes]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # of many kinds; their texts recommend what could run a stranger's code
        raise QuantizerError(f"{path}: damaged, or no weights that torch.save wrote") from error
    content = content if isinstance(content, dict) else {}  # training_args.bin and the like
    state = next((content[key] for key in ("ema", "model", "state_dict") if key in content), content)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return list(tensors), tensors.__getitem__


def _download(name: str) -> Path:
    """Download a hub repository's configuration and VQ model, or take them from the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    expectation = (
        "expected 'builtin', a folder or file of a quantizer, or a name on the Hugging Face hub such as "
        "zawnpn/being-vq-8k"
    )
    if not owner or owner.startswith(".") or not repository:
        raise QuantizerError(f"{name}: there is no such folder; {expectation}")
    repository = f"{owner}/{repository}"
    try:
        # The configuration first: an index says which files of a large model hold its VQ model.
        folder = Path(snapshot_download(repository, allow_patterns=["*.json", "*.yaml"]))
        attempts = [_vq_files_of_index(folder) or ["*.safetensors", "*.ckpt"], ["*.bin"]]
        for patterns in [[file]] if file else attempts:
            snapshot_download(repository, allow_patterns=patterns)
            if any(list(folder.glob(pattern)) for pattern in patterns):
                break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise QuantizerError(f"{name}: neither here nor on the hub ({reason}); {expectation}") from error
    return folder / file if file else folder


def _vq_files_of_index(folder: Path) -> list[str]:
    """The files of a large model that hold its VQ model."""
    for path in folder.glob("*.index.json"):
        files = _read_json(path)["weight_map"]
        prefix = _model_prefix(files)
        vq_names = tuple(prefix + part for part in VQ_PREFIXES)
        return sorted({file for name, file in files.items() if name.startswith(vq_names)})
    return []
