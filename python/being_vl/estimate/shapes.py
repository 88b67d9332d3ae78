"""Models without their weights: what a config says, built of tensors that have shapes and hold nothing."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from being_vl.errors import ModelError
from being_vl.options import StrPath
from being_vl.recipes.recipe import FOLDER
from being_vl.training.options import TrainOptions
from being_vl.training.split import TwoPartLM

SHAPES = FOLDER / "shapes"
"""The shapes that come with the package: a config.json each, named by the model."""
UNMASKED_ATTENTION = "unmasked"
"""Name of the attention of models without memory."""


@dataclass(frozen=True)
class Shape:
    """A model without its weights.

    Args:
        config: Of transformers, with as many rows as the expanded model has.
        text_size: Rows that are text; the others are new.
    """

    config: Any
    text_size: int


def find_shape(name: StrPath, new_rows: int | None) -> Shape:
    """The model of a folder, a config.json, a shipped shape, or a hub name.

    Args:
        name: Where it is; of a hub name, the shipped shape of its last part is taken if there is one.
        new_rows: Rows that expanding adds; None if the model is expanded, or is not to be.

    Raises:
        ModelError: if there is none.
    """
    from transformers import AutoConfig

    from being_vl.layout import LAYOUT_FILE, VocabularyLayout

    path = Path(name)
    shipped_file = SHAPES / f"{path.name}.json"
    try:
        if path.is_file() or (path / "config.json").is_file():
            config = AutoConfig.from_pretrained(path)
        elif shipped_file.is_file():
            config = AutoConfig.from_pretrained(shipped_file)
        else:
            config = AutoConfig.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        names = ", ".join(sorted(file.stem for file in SHAPES.glob("*.json")))
        raise ModelError(
            f"{name}: no model's config.json there ({str(error).splitlines()[0]}); "
            f"give shape: a folder, a config.json, or one of {names}"
        ) from None
    text = config.get_text_config()
    if (path / LAYOUT_FILE).is_file():
        return Shape(text, VocabularyLayout.load(path).text_size)
    text_size = text.vocab_size
    text.vocab_size += new_rows or 0
    return Shape(text, text_size)


@contextmanager
def without_memory() -> Iterator[None]:
    """Tensors that are made in here have shapes and dtypes and hold nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # SDPA, but without looking at ids to find out that no mask is needed: here there are none.
    ALL_ATTENTION_FUNCTIONS[UNMASKED_ATTENTION] = sdpa_attention_forward
    try:
        with FakeTensorMode():
            yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[UNMASKED_ATTENTION]


def build_model(shape: Shape, options: TrainOptions, dtype: torch.dtype) -> TwoPartLM:
    """The model as training has it; call within `without_memory`."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(shape.config), dtype=dtype)
    lm.tie_weights()
    if lm.config._attn_implementation == "sdpa":
        lm.set_attn_implementation(UNMASKED_ATTENTION)
    model = TwoPartLM(lm, shape.text_size, options.loss_chunk)
    model.train()
    return model
