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
from being_vl.options import StrPath

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
    location, arguments = _locate(llm)
    try:
        config = AutoConfig.from_pretrained(location, **arguments)
    except (OSError, ValueError, KeyError) as error:
        raise _loading_error(llm, error) from error
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is None or kind.__name__ not in (config.architectures or [kind.__name__]):
        architectures = ", ".join(config.architectures or [type(config).__name__])
        raise ModelError(f"{llm}: is a {architectures}; expected a causal LM")
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"{llm}: its weights are quantized; expected the model before it was quantized, or a GGUF file"
        )
    return config


def load_causal_lm(folder: StrPath, dtype: torch.dtype | str, attention: str | None = None) -> Any:
    """A causal LM of a folder, as transformers loads it.

    Args:
        folder: A folder of a causal LM.
        dtype: Of its weights; `"auto"` for that of the files.
        attention: Kernel of the attention, as transformers names it; its own choice by default.

    Raises:
        ModelError: if it is no causal LM or is damaged.
    """
    folder = Path(folder)
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"{folder}: cannot be loaded: {_first_line(error)}") from error


def open_llm(llm: str) -> CausalLM:
    """Open a causal LM without reading its weights, where they are safetensors named as the model's class names them.

    Weights in any other form (GGUF, PyTorch's own format, names of other versions) are loaded by transformers, once.

    Args:
        llm: Folder, name on the hub, or GGUF file.

    Raises:
        ModelError: if it is missing, damaged, incomplete, or no causal LM with a tokenizer.
    """
    # The model's class says what its tensors are called, and which of them are embedding and head.
    config = load_config(llm)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{llm}: {type(model).__name__} has no output head that can be enlarged")
    parameters = _distinct_tensors(model)

    # Read tensor by tensor where the files allow it, else all at once.
    try:
        tensor = _stream_tensors(llm, model) or _load_tensors(llm, parameters.keys())
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise _loading_error(llm, error) from error
    location, arguments = _locate(llm)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **arguments)
    except Exception as error:  # tokenizers raise plain Exception on damaged files
        raise ModelError(f"{llm}: its tokenizer cannot be loaded: {_first_line(error)}") from error

    names_of_parameters = {id(parameter): name for name, parameter in parameters.items()}
    config.architectures = [type(model).__name__]
    bias = getattr(head, "bias", None)
    return CausalLM(
        config,
        tokenizer,
        list(parameters),
        tensor,
        names_of_parameters[id(model.get_input_embeddings().weight)],
        names_of_parameters[id(head.weight)],
        None if bias is None else names_of_parameters[id(bias)],
    )


def list_files(llm: str) -> list[Path]:
    """The files that a causal LM is read from: of a folder, a hub name's copy on this disk, or a GGUF file."""
    if llm.endswith(GGUF):
        return [Path(llm)]
    folder = Path(find_file(llm, "config.json") or llm).parent
    suffixes = (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt")
    return sorted(
        path for path in folder.iterdir() if path.suffix in suffixes and not path.name.startswith(".")
    )


def find_file(llm: str, name: str) -> str | None:
    """The path on this disk of a file of a folder or hub name; None if it has none."""
    if llm.endswith(GGUF):
        return None
    path: str | None = cached_file(llm, name, _raise_exceptions_for_missing_entries=False)
    return path


def save_weights(folder: StrPath, llm: CausalLM, new_rows: dict[str, Tensor]) -> None:
    """Write the weights as safetensors that the Auto classes load, holding one file's tensors at a time.

    Args:
        folder: Gets one file of at most `SHARD_SIZE` bytes, or several and their index.
        llm: The model to write, each tensor in its own dtype.
        new_rows: Rows to append, by the tensor's name.
    """

    folder = Path(folder)

    def enlarge(name: str) -> Tensor:
        tensor = llm.tensor(name)
        return torch.cat([tensor, new_rows[name].to(tensor.dtype)]) if name in new_rows else tensor

    # Share the tensors out over files by their sizes alone.
    shapes = {}
    for name in llm.names:
        tensor = llm.tensor(name)
        rows = (len(tensor) + len(new_rows[name]),) if name in new_rows else tensor.shape[:1]
        shapes[name] = torch.empty((*rows, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD_SIZE)

    # Write file by file.
    for file, names in split.filename_to_tensors.items():
        save_file({name: enlarge(name).contiguous() for name in names}, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _locate(llm: str) -> tuple[str, dict[str, str]]:
    """Folder or hub name, and the arguments that transformers needs besides."""
    if llm.endswith(GGUF):
        import accelerate  # noqa: F401  transformers needs both to read GGUF
        import gguf  # noqa: F401

        return str(Path(llm).parent), {"gguf_file": Path(llm).name}
    return llm, {}


def _distinct_tensors(model: Any) -> dict[str, Tensor]:
    """The state dict, with tied tensors under their first name alone."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors.setdefault(id(tensor), (name, tensor))
    return dict(tensors.values())


def _stream_tensors(llm: str, model: Any) -> Callable[[str], Tensor] | None:
    """Reads tensors from safetensors; None if the files do not hold just what the model's state dict names."""
    index = find_file(llm, "model.safetensors.index.json")
    single_file = find_file(llm, "model.safetensors")
    if single_file is None and index is None:
        return None

    # Which file holds which tensor.
    files = [single_file] if single_file else get_checkpoint_shard_files(llm, index)[0]
    files_of_tensors: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt") as shard:
            files_of_tensors |= dict.fromkeys(shard.keys(), file)

    def tensor(name: str) -> Tensor:
        with safe_open(files_of_tensors[name], "pt") as shard:
            value: Tensor = shard.get_tensor(name)  # maps the file; what is not looked at is not read
        return value

    # The files must hold the parameters, by their names and shapes, and no tied tensor twice.
    parameters = _distinct_tensors(model)
    tied_names = model.state_dict().keys() - parameters.keys()
    if tied_names & files_of_tensors.keys() or not parameters.keys() <= files_of_tensors.keys():
        return None
    has_same_shapes = all(tensor(name).shape == value.shape for name, value in parameters.items())
    return tensor if has_same_shapes else None


def _load_tensors(llm: str, names: KeysView[str]) -> Callable[[str], Tensor]:
    """Tensors of the model as transformers loads it."""
    location, arguments = _locate(llm)
    model, loading = AutoModelForCausalLM.from_pretrained(
        location, dtype="auto", output_loading_info=True, **arguments
    )
    if loading["missing_keys"]:
        names_of_some = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ModelError(f"{llm}: {len(loading['missing_keys'])} weights are missing: {names_of_some}")
    tensors = {name: tensor.detach() for name, tensor in _distinct_tensors(model).items()}
    if tensors.keys() != names:
        raise ModelError(
            f"{llm}: tie_word_embeddings is {model.config.tie_word_embeddings} in its config.json, but embedding and "
            "output head in its files differ; set it to false"
        )
    return tensors.__getitem__


def _loading_error(llm: str, error: Exception) -> ModelError:
    return ModelError(f"{llm}: cannot be loaded as a causal LM of Hugging Face: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
