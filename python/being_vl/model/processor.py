"""Images and chat messages in, ids out: the model's processor, as transformers knows them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, BatchEncoding

from being_vl.data.records import PLACEHOLDER, Turn
from being_vl.data.sequences import SequenceBuilder
from being_vl.errors import ModelError, QuantizerError, RecordError
from being_vl.files import write_json
from being_vl.images.decode import read_image
from being_vl.layout import VocabularyLayout
from being_vl.quantize.base import Quantizer, load_quantizer
from being_vl.tokenizer import VisualBPE

VOCABULARY_FILE = "visual_vocabulary.json"
QUANTIZER_FOLDER = "quantizer"
PROCESSOR_FILE = "processor_config.json"

Picture = Image.Image | NDArray[np.integer[Any]]
"""An image, or its grid of ids (height, width)."""
Message = Mapping[str, Any]
"""`role`, and as `content` a text or parts: `{"type": "text", "text": …}`, `{"type": "image", "image": …}`."""


class BeingVLProcessor:
    """Writes chats with images as an expanded model reads them: with its own chat template, as its training data.

    `AutoProcessor.from_pretrained` finds it once this module is imported.

    Args:
        tokenizer: The expanded model's Hugging Face tokenizer, which has an entry for each visual token.
        layout: The shared vocabulary.
        bpe: The visual BPE.
        quantizer: The quantizer that they were made for.

    Raises:
        QuantizerError, ModelError: if these do not belong together, as `SequenceBuilder` has it.
    """

    def __init__(
        self, tokenizer: Any, layout: VocabularyLayout, bpe: VisualBPE, quantizer: Quantizer
    ) -> None:
        self.tokenizer = tokenizer
        self.quantizer = quantizer
        self.builder = SequenceBuilder(tokenizer, layout, bpe)

    def __call__(self, messages: Sequence[Message] | Sequence[Sequence[Message]]) -> BatchEncoding:
        """One chat or several, up to where the answer to the last question begins.

        An image comes where its part is; images that open the first question come directly behind BOS, as in training.
        `image` is a PIL image, a file's path, or a grid of the model's quantizer.

        Args:
            messages: A chat, of which user and assistant take turns, the user first and last, behind a system message
                if there is one; or a list of chats.

        Returns:
            `input_ids` and `attention_mask`, int64 tensors (chats, length), padded on the left: what `generate` takes.

        Raises:
            RecordError: if a message has another role or part than those, or they do not alternate.
            ImageError: if a file cannot be read.
            GridError: if a grid has ids outside the codebook.
        """
        if not messages:
            raise RecordError("no messages; expected a chat or a list of chats")
        chats: Any = [messages] if isinstance(messages[0], Mapping) else messages
        turns, pictures = zip(*map(_turns, chats), strict=True)
        return self.pad(self.prompts(turns, pictures))

    def prompts(
        self, chats: Sequence[str | Sequence[Turn]], images: Sequence[Sequence[Picture]]
    ) -> list[NDArray[np.int64]]:
        """Ids of questions, or of dialogues that end with one, up to where the answer begins.

        Args:
            chats: Where a question holds no `<image>`, its images come in front.
            images: The images of each, in order, as pictures or as grids of the model's quantizer.

        Returns:
            int64, (length,) each.

        Raises:
            RecordError: if placeholders and images differ in number, or turns do not alternate.
            GridError: if a grid has ids outside the codebook.
        """
        flat = [picture for several in images for picture in several]
        pictures = [picture for picture in flat if not isinstance(picture, np.ndarray)]
        grids_of_pictures = iter(self.quantizer.encode(pictures) if pictures else [])
        grids = [picture if isinstance(picture, np.ndarray) else next(grids_of_pictures) for picture in flat]
        bpe = self.builder.bpe
        assert bpe is not None
        tokens = iter(bpe.encode_batch(grids) if grids else ())
        return [
            self.builder.prompt(
                (Turn("user", chat),) if isinstance(chat, str) else chat, [next(tokens) for _ in several]
            )
            for chat, several in zip(chats, images, strict=True)
        ]

    def pad(self, ids: Sequence[NDArray[np.int64]]) -> BatchEncoding:
        """Sequences of ids as a batch, padded on the left: `input_ids` and `attention_mask`."""
        width = max(map(len, ids))
        batch = torch.full((len(ids), width), self.builder.pad_id)
        mask = torch.zeros_like(batch)
        for row, sequence in enumerate(ids):
            batch[row, width - len(sequence) :] = torch.from_numpy(sequence)
            mask[row, width - len(sequence) :] = 1
        return BatchEncoding({"input_ids": batch, "attention_mask": mask})

    def decode(self, ids: Any, **options: Any) -> Any:
        """`tokenizer.decode`; of a batch, a list. Visual tokens are special ones, for `skip_special_tokens`."""
        return self.tokenizer.decode(ids, **options)

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        """`tokenizer.batch_decode`."""
        texts: list[str] = self.tokenizer.batch_decode(ids, **options)
        return texts

    def save_pretrained(self, folder: Path | str) -> None:
        """Write tokenizer, layout, visual BPE and quantizer into a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        assert self.builder.layout is not None
        assert self.builder.bpe is not None
        self.builder.layout.save(folder)
        self.builder.bpe.save(folder / VOCABULARY_FILE)
        self.quantizer.save_pretrained(folder / QUANTIZER_FOLDER)
        write_json(folder / PROCESSOR_FILE, {"processor_class": type(self).__name__})

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: str = "cpu", **_: Any) -> Self:
        """Read what `save_pretrained`, `being-vl expand` or `being-vl train` wrote.

        Args:
            folder: The model's folder.
            device: Where the quantizer runs.
            _: What `AutoProcessor` hands on besides.

        Raises:
            ModelError: if the folder is not one of an expanded model.
            VocabularyError, QuantizerError: if its vocabulary or quantizer is damaged or of another model.
        """
        folder = Path(folder)
        layout = VocabularyLayout.load(folder)
        bpe = VisualBPE.load(folder / VOCABULARY_FILE)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{folder}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}"
            ) from error
        quantizer = load_quantizer(folder / QUANTIZER_FOLDER, device)
        if quantizer.fingerprint != layout.quantizer_fingerprint:
            raise QuantizerError(
                f"{folder / QUANTIZER_FOLDER}: is quantizer {quantizer.name!r} ({quantizer.fingerprint[:12]}), "
                f"the model was made for {layout.quantizer_name!r} ({layout.quantizer_fingerprint[:12]})"
            )
        return cls(tokenizer, layout, bpe, quantizer)


AutoProcessor.register(BeingVLProcessor.__name__, BeingVLProcessor, exist_ok=True)


def _turns(messages: Sequence[Message]) -> tuple[list[Turn], list[Picture]]:
    """Turns with placeholders, and the images that these stand for."""
    turns, pictures = [], []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RecordError(
                f"message {number} is {message!r:.80}; expected an object with 'role' and 'content'"
            )
        role, content, text = message.get("role"), message.get("content"), ""
        if role not in ("system", "user", "assistant"):
            raise RecordError(f"message {number}: role is {role!r}; expected 'system', 'user' or 'assistant'")
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
            kind = part.get("type")
            if kind == "image" and role == "user" and "image" in part:
                given = part["image"]
                pictures.append(read_image(Path(given)) if isinstance(given, str | Path) else given)
                text += PLACEHOLDER
            elif kind == "text" and PLACEHOLDER not in part["text"]:
                text += part["text"]
            else:
                raise RecordError(
                    f"message {number}: a part of type {kind!r} of the {role}'s; expected 'text' without "
                    f"{PLACEHOLDER}, or in the user's message 'image' with an image"
                )
        turns.append(Turn(role, text))
    return turns, pictures
