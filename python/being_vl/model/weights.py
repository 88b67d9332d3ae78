"""The weights of a causal LM on disk: read tensor by tensor, written shard by shard."""

from collections.abc import Callable, KeysView
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from being_vl.errors import ModelError
from being_vl.files import write_json

GGUF = ".gguf"
SHARD_SIZE = 2 * 10**9
"""Largest file written, in bytes; with the embedding, it is what expanding keeps in memory."""


class CausalLM(NamedTuple):
    """A causal LM whose weights are read when they are asked for.

    Args:
        config: Its configuration.
        tokenizer: Its tokenizer.
        names: Names of all tensors, as the model's own state dict has them; tied ones once.
        tensor: Reads a tensor by its name.
        embedding: Name of the embedding, (rows, hidden).
        head: Name of the output head, (rows, hidden); the embedding's where they are tied.
        bias: Name of the head's bias, (rows,), if it has one.
    """

    config: Any
    tokenizer: Any
    names: list[str]
    tensor: Callable[[str], Tensor]
    embedding: str
    head: str
    bias: str | None


def load_config(llm: str) -> Any:
    """The configuration of a causal LM.

    Raises:
        ModelError: if there is none, or it is of another kind of model, or of a quantized one.
    """
    place, how = _place(llm)
    try:
        config = AutoConfig.from_pretrained(place, **how)
    except (OSError, ValueError, KeyError) as error:
        raise _no_llm(llm, error) from error
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is None or kind.__name__ not in (config.architectures or [kind.__name__]):
        found = ", ".join(config.architectures or [type(config).__name__])
        raise ModelError(f"{llm}: is a {found}; expected a causal LM")
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"{llm}: its weights are quantized; expected the model before it was quantized, or a GGUF file"
        )
    return config


def load_causal_lm(folder: Path, dtype: torch.dtype | str, attention: str | None = None) -> Any:
    """A causal LM of a folder, whole, as transformers loads it.

    Args:
        folder: A folder of a causal LM.
        dtype: Of its weights; `"auto"` for that of the checkpoint.
        attention: Kernel of the attention, as transformers names it; its own choice by default.

    Raises:
        ModelError: if it is no causal LM or is damaged.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"{folder}: cannot be loaded: {_first_line(error)}") from error


def open_llm(llm: str) -> CausalLM:
    """Open a causal LM without reading its weights, where they are safetensors named as the model's class names them.

    Any other checkpoint (GGUF, PyTorch's own format, names of other versions) is loaded by transformers, once.

    Args:
        llm: Folder, name on the hub, or GGUF file.

    Raises:
        ModelError: if it is missing, damaged, incomplete, or no causal LM with a tokenizer.
    """
    config = load_config(llm)
    place, how = _place(llm)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{llm}: {type(model).__name__} has no output head that can be enlarged")
    parameters = _distinct(model)
    try:
        tensor = _streamed(llm, model) or _loaded(llm, parameters.keys())
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise _no_llm(llm, error) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **how)
    except Exception as error:  # tokenizers raise plain Exception on damaged files
        raise ModelError(f"{llm}: its tokenizer cannot be loaded: {_first_line(error)}") from error
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    config.architectures = [type(model).__name__]
    bias = getattr(head, "bias", None)
    return CausalLM(
        config,
        tokenizer,
        list(parameters),
        tensor,
        name_of[id(model.get_input_embeddings().weight)],
        name_of[id(head.weight)],
        None if bias is None else name_of[id(bias)],
    )


def find_file(llm: str, name: str) -> str | None:
    """Where a file of a folder or hub name lies on this disk; None if it has none."""
    if llm.endswith(GGUF):
        return None
    path: str | None = cached_file(llm, name, _raise_exceptions_for_missing_entries=False)
    return path


def save_weights(folder: Path, llm: CausalLM, more: dict[str, Tensor]) -> None:
    """Write the weights as safetensors that the Auto classes load, holding one file's tensors at a time.

    Args:
        folder: Gets one file of at most `SHARD_SIZE` bytes, or several and their index.
        llm: What is written, each tensor in its own dtype.
        more: Rows to append, by the tensor's name.
    """

    def tensor(name: str) -> Tensor:
        old = llm.tensor(name)
        return torch.cat([old, more[name].to(old.dtype)]) if name in more else old

    planned = {}
    for name in llm.names:
        old = llm.tensor(name)
        rows = (len(old) + len(more[name]),) if name in more else old.shape[:1]
        planned[name] = torch.empty((*rows, *old.shape[1:]), dtype=old.dtype, device="meta")
    split = split_torch_state_dict_into_shards(planned, max_shard_size=SHARD_SIZE)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensor(name).contiguous() for name in names}, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _place(llm: str) -> tuple[str, dict[str, str]]:
    """Folder or hub name, and what transformers is to be told besides."""
    if llm.endswith(GGUF):
        import accelerate  # noqa: F401  transformers needs both to read GGUF
        import gguf  # noqa: F401

        return str(Path(llm).parent), {"gguf_file": Path(llm).name}
    return llm, {}


def _distinct(model: Any) -> dict[str, Tensor]:
    """The state dict, with tied tensors under their first name alone."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _streamed(llm: str, model: Any) -> Callable[[str], Tensor] | None:
    """Reads tensors from safetensors; None if the files do not hold just what the model's state dict names."""
    index = find_file(llm, "model.safetensors.index.json")
    single = find_file(llm, "model.safetensors")
    if single is None and index is None:
        return None
    files = [single] if single else get_checkpoint_shard_files(llm, index)[0]
    file_of: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt") as shard:
            file_of |= dict.fromkeys(shard.keys(), file)

    def tensor(name: str) -> Tensor:
        with safe_open(file_of[name], "pt") as shard:
            value: Tensor = shard.get_tensor(name)  # maps the file; what is not looked at is not read
        return value

    wanted = _distinct(model)
    tied = model.state_dict().keys() - wanted.keys()
    if tied & file_of.keys() or not wanted.keys() <= file_of.keys():
        return None
    return tensor if all(tensor(name).shape == value.shape for name, value in wanted.items()) else None


def _loaded(llm: str, names: KeysView[str]) -> Callable[[str], Tensor]:
    """Tensors of the model as transformers loads it."""
    place, how = _place(llm)
    model, loading = AutoModelForCausalLM.from_pretrained(
        place, dtype="auto", output_loading_info=True, **how
    )
    if loading["missing_keys"]:
        some = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ModelError(f"{llm}: {len(loading['missing_keys'])} weights are missing: {some}")
    tensors = {name: tensor.detach() for name, tensor in _distinct(model).items()}
    if tensors.keys() != names:
        raise ModelError(
            f"{llm}: tie_word_embeddings is {model.config.tie_word_embeddings} in its config.json, but embedding and "
            "output head of its checkpoint differ; set it to false"
        )
    return tensors.__getitem__


def _no_llm(llm: str, error: Exception) -> ModelError:
    return ModelError(f"{llm}: cannot be loaded as a causal LM of Hugging Face: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
