"""Options of expanding and asking a model; importable without torch."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class ExpandOptions:
    """Options of `being-vl expand`.

    Args:
        llm: Folder of a Hugging Face causal LM, or its name on the hub.
        vocabulary: File of the visual BPE.
        out: Folder for the expanded model.
        quantizer: The one that the vocabulary was made for; named as for `being-vl quantize`.
        seed: Seed of the new rows.
    """

    llm: str
    vocabulary: Path
    out: Path
    quantizer: str = "builtin"
    seed: int = 0


@dataclass
class GenerateOptions:
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
        device: Such as `cpu` or `cuda`; a GPU if there is one by default.
    """

    model: Path
    prompt: list[str]
    image: list[Path] = field(default_factory=list)
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 16
    device: str | None = None
