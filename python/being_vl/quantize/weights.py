"""What stands in the folder, the file or the hub repository of a published VQ model."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from being_vl.errors import ManifestError, QuantizerError
from being_vl.files import MANIFEST, read_manifest

CODEBOOK = "quantize.embedding.weight"
PARTS = ("encoder.", "decoder.", "quantize.embedding.", "quant_conv.", "post_quant_conv.")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")

Source = tuple[list[str], Callable[[str], Tensor]]
"""Names of a file's tensors, and what reads one of them."""


class Checkpoint:
    """Tensors of a VQ model, under the names they were published with, and the files beside them.

    Args:
        name: A folder, a file of weights, or a name on the hub: `owner/repository` or `owner/repository/file`. Of a hub
            repository only the configuration and the files that hold the VQ model are downloaded.

    Raises:
        QuantizerError: if there is no such thing.
    """

    def __init__(self, name: str | Path) -> None:
        self.path = Path(name)
        if not self.path.exists():
            self.path = _from_hub(str(name))
        self.folder = self.path if self.path.is_dir() else self.path.parent
        named = Path(name) if self.path.is_dir() else self.path
        self._name = named.resolve().name if self.path.is_dir() else self.path.stem

    @property
    def name(self) -> str:
        """The name that it was saved with, or that of the folder, repository or file."""
        return str(self.manifest["name"]) if self.manifest else self._name

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
        return _json(self.folder / "config.json")

    @property
    def model_type(self) -> str:
        """transformers' name of the family, or an empty string."""
        return str(self.config.get("model_type", ""))

    @cached_property
    def image_processor(self) -> dict[str, Any]:
        """transformers' options of the image processor; empty if there are none."""
        options = _json(self.folder / "preprocessor_config.json") or _json(
            self.folder / "processor_config.json"
        )
        return dict(options.get("image_processor", options))

    @cached_property
    def resolution(self) -> int | None:
        """Side of the training images that a taming YAML says, in pixels."""
        places = [self.folder, self.folder.parent / "configs"] if self.path.is_file() else [self.folder]
        for path in (path for place in places for path in sorted(place.rglob("*.yaml"))):
            try:
                fields = yaml.safe_load(path.read_text(encoding="utf-8"))
                return int(fields["model"]["params"]["ddconfig"]["resolution"])
            except (KeyError, TypeError, yaml.YAMLError):
                continue
        return None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Encoder, codebook and, where there is one, decoder; without the prefix that they have in a larger model.

        Where safetensors hold no decoder, as transformers' Chameleon, it is taken from a `.ckpt` beside them.

        Raises:
            QuantizerError: if there are no weights or no codebook of the usual name, or a `.ckpt` beside has another.
        """
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        if not files:
            files = [path for path in sorted(self.path.rglob("*")) if path.suffix in PICKLES]
        if not files:
            raise QuantizerError(
                f"{self.path}: holds no weights; expected .safetensors, {', '.join(PICKLES)}"
            )
        tensors = _read(files)
        if CODEBOOK not in tensors:
            raise QuantizerError(f"{self.path}: no tensor is named …{CODEBOOK}; expected a VQ model")
        if not any(name.startswith("decoder.") for name in tensors):
            for path in sorted(self.folder.glob("*.ckpt")):
                more = _read([path])
                if not _equal(more.get(CODEBOOK), tensors[CODEBOOK]):
                    raise QuantizerError(
                        f"{path}: its codebook is not that of the weights beside it, so its decoder does not belong "
                        "to them; remove it or put the right one there"
                    )
                tensors = more | tensors
        return tensors


def renamed(tensors: dict[str, Tensor], patterns: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Tensors under other names: each pattern (regular expression) replaced, one after the other."""
    others = {}
    for name, tensor in tensors.items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        others[name] = tensor
    return others


def _equal(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and torch.equal(a.to(b.dtype), b)


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _read(files: list[Path]) -> dict[str, Tensor]:
    """The VQ model's tensors of files that together hold one model, possibly a larger one."""
    sources = [_safetensors(path) if path.suffix == ".safetensors" else _pickle(path) for path in files]
    names = [name for source, _ in sources for name in source]
    prefix = _prefix(names)
    return dict(_parts(sources, prefix))


def _parts(sources: list[Source], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for names, read in sources:
        for name in names:
            if name.startswith(tuple(prefix + part for part in PARTS)):
                yield name.removeprefix(prefix), read(name)


def _prefix(names: list[str]) -> str:
    """What stands before the VQ model's names in a larger model, `model.vqmodel.` for one."""
    return min(
        (name.removesuffix(CODEBOOK) for name in names if name.endswith(CODEBOOK)), key=len, default=""
    )


def _safetensors(path: Path) -> Source:
    file = safe_open(path, "pt")
    return list(file.keys()), file.get_tensor


class _Inert:
    """Takes the place of every class in a pickle that is not a tensor's, so that none of their code runs."""

    def __init__(self, *_: Any) -> None:
        pass


def _pickle(path: Path) -> Source:
    """A checkpoint of torch; nested under `state_dict` (Lightning), `ema` or `model` (LlamaGen), or plain."""
    try:
        try:
            others, mmap = torch.serialization.get_unsafe_globals_in_checkpoint(path), True
        except ValueError:  # written before torch 1.6
            others, mmap = [], False
        with torch.serialization.safe_globals([(_Inert, name) for name in others]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # of many kinds; their texts recommend what could run a stranger's code
        raise QuantizerError(f"{path}: damaged, or no checkpoint that torch.save wrote") from error
    content = content if isinstance(content, dict) else {}  # training_args.bin and the like
    nested = next((content[key] for key in ("ema", "model", "state_dict") if key in content), content)
    tensors = {name: value for name, value in nested.items() if isinstance(value, Tensor)}
    return list(tensors), tensors.__getitem__


def _from_hub(name: str) -> Path:
    """Download a hub repository's configuration and VQ model, or take them from the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    expected = (
        "expected 'builtin', a folder or file of a quantizer, or a name on the Hugging Face hub such as "
        "zawnpn/being-vq-8k"
    )
    if not owner or owner.startswith(".") or not repository:
        raise QuantizerError(f"{name}: there is no such folder; {expected}")
    source = f"{owner}/{repository}"
    try:
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.yaml"]))
        for patterns in (
            [[file]] if file else [_files_of_index(folder) or ["*.safetensors", "*.ckpt"], ["*.bin"]]
        ):
            snapshot_download(source, allow_patterns=patterns)
            if any(list(folder.glob(pattern)) for pattern in patterns):
                break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise QuantizerError(f"{name}: neither here nor on the hub ({reason}); {expected}") from error
    return folder / file if file else folder


def _files_of_index(folder: Path) -> list[str]:
    """The files of a large model that hold its VQ model."""
    for path in folder.glob("*.index.json"):
        places = _json(path)["weight_map"]
        prefix = _prefix(list(places))
        parts = tuple(prefix + part for part in PARTS)
        return sorted({file for name, file in places.items() if name.startswith(parts)})
    return []
