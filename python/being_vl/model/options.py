"""Options of expanding and asking a model; importable without torch."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from being_vl.options import MAY_CHANGE, Options, check_minimum

Initialisation = Literal["he", "text", "codebook"]
"""What new rows hold before training; see `being_vl.model.rows`."""


@dataclass
class ExpandOptions(Options):
    """Options of `being-vl expand`.

    Args:
        llm: Folder of a Hugging Face causal LM, its name on the hub, or a GGUF file.
        vocabulary: File of the visual BPE.
        out: Folder for the expanded model.
        quantizer: The one that the vocabulary was made for; named as for `being-vl quantize`.
        init: What the new rows hold: `he` (normal, as the paper), `text` (normal with the text rows' mean and
            covariance), or `codebook` (the quantizer's vectors in the directions of the text rows, merges the mean of
            their parts).
        pad_to: The number of rows becomes a multiple of this, with rows of 0 that no token has.
        seed: Seed of the new rows.
        overwrite: Replace an expanded model that was made with other options or inputs.
    """

    llm: str
    vocabulary: Path = field(metadata=MAY_CHANGE)
    out: Path = field(metadata=MAY_CHANGE)
    quantizer: str = field(default="builtin", metadata=MAY_CHANGE)
    init: Initialisation = "he"
    pad_to: int = 1
    seed: int = 0
    overwrite: bool = field(default=False, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        """Check the values; `llm` and `quantizer` take any path, too."""
        super().__post_init__()
        self.llm, self.quantizer = os.fspath(self.llm), os.fspath(self.quantizer)
        check_minimum("pad_to", self.pad_to, 1)


@dataclass
class GenerateOptions(Options):
    """Options of `being-vl generate`.

    Args:
        model: Folder of an expanded or trained model.
        prompt: Questions; each is asked about each image. A question with several `<image>` placeholders is asked
            once, about as many images.
        image: Image files; none to ask about text alone.
        max_new_tokens: Longest answer in tokens.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        top_p: Draw only from the likeliest tokens that together have this probability.
        seed: Seed of drawing.
        batch_size: Questions answered at a time.
        device: `auto`, a GPU where there is one; or such as `cpu`, `cuda`, `cuda:1`.
    """

    model: Path
    prompt: list[str]
    image: list[Path] = field(default_factory=list)
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 16
    device: str = "auto"
