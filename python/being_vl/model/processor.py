"""Images and chat messages in, ids out: the model's processor, as transformers knows them."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, BatchEncoding

from being_vl.data.records import PLACEHOLDER, Turn
from being_vl.data.sequences import SequenceBuilder
from being_vl.devices import find_device
from being_vl.errors import ModelError, RecordError
from being_vl.files import write_json
from being_vl.images.decode import decode_image, read_image
from being_vl.images.references import IMAGE_KEYS, IMAGE_PARTS, read_references
from being_vl.layout import VOCABULARY_FILE, VocabularyLayout
from being_vl.options import StrPath
from being_vl.quantizer.base import Quantizer, load_quantizer
from being_vl.quantizer_names import check_same_quantizer
from being_vl.tokenizer.visual_bpe import VisualBPE

QUANTIZER_FOLDER = "quantizer"
PROCESSOR_FILE = "processor_config.json"

ImageInput = Image.Image | NDArray[np.integer[Any]] | StrPath
"""An image, its grid of ids (height, width), or the path of an image file."""
Message = Mapping[str, Any]
"""`role`, and as `content` a text or parts: `{"type": "text", "text": …}`, `{"type": "image", "image": …}`, or
`{"type": "image_url", "image_url": {"url": …}}`.
"""


class BeingVLProcessor:
    """Writes chats with images as an expanded model reads them: with its own chat template, like its training data.

    `AutoProcessor.from_pretrained` finds it once this module is imported.

    Args:
        tokenizer: The expanded model's Hugging Face tokenizer, which has an entry for each visual token.
        layout: The shared vocabulary.
        bpe: The visual BPE.
        quantizer: The quantizer that they were made for.

    Raises:
        QuantizerError, ModelError: if these do not belong together; see `SequenceBuilder`.
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
        An image is a PIL image, a file's path, a data URI or base64, the bytes of an image file, or a grid of the
        model's quantizer.

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
        turns, images = zip(*map(_read_messages, chats), strict=True)
        return self.pad(self.prompts(turns, images))

    def prompts(
        self, chats: Sequence[str | Sequence[Turn]], images: Sequence[Sequence[ImageInput]]
    ) -> list[NDArray[np.int64]]:
        """Ids of questions, or of dialogues that end with one, up to where the answer begins.

        Args:
            chats: Where a question holds no `<image>`, its images come in front.
            images: The images of each, in order, their files, or their grids, made by the model's quantizer.

        Returns:
            int64, (length,) each.

        Raises:
            RecordError: if placeholders and images differ in number, turns do not alternate, or an image is of another
                type.
            ImageError: if a file cannot be read.
            GridError: if a grid has ids outside the codebook.
        """
        # Quantize all images together; those that are grids already stay as they are.
        inputs = [_load_image(image) for chat_images in images for image in chat_images]
        pixel_images = [image for image in inputs if isinstance(image, Image.Image)]
        encoded_grids = iter(self.quantizer.encode(pixel_images) if pixel_images else [])
        grids = [image if isinstance(image, np.ndarray) else next(encoded_grids) for image in inputs]

        # Encode all grids together, and give each chat the tokens of its images.
        bpe = self.builder.bpe
        assert bpe is not None
        tokens = iter(bpe.encode_batch(grids) if grids else ())
        return [
            self.builder.prompt(
                (Turn("user", chat),) if isinstance(chat, str) else chat, [next(tokens) for _ in chat_images]
            )
            for chat, chat_images in zip(chats, images, strict=True)
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

    def save_pretrained(self, folder: StrPath) -> None:
        """Write tokenizer, layout, visual BPE and quantizer into a folder, which is made if it is missing."""
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
    def from_pretrained(cls, folder: StrPath, device: str = "auto", **_: Any) -> Self:
        """Read what `save_pretrained`, `being-vl expand` or `being-vl train` wrote.

        Args:
            folder: The model's folder.
            device: Where the quantizer runs; `auto` is a GPU where there is one.
            _: Further arguments of `AutoProcessor`, not used.

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
        quantizer = load_quantizer(folder / QUANTIZER_FOLDER, find_device(device))
        check_same_quantizer(
            str(folder / QUANTIZER_FOLDER),
            (quantizer.name, quantizer.fingerprint),
            "the model",
            (layout.quantizer_name, layout.quantizer_fingerprint),
        )
        return cls(tokenizer, layout, bpe, quantizer)


AutoProcessor.register(BeingVLProcessor.__name__, BeingVLProcessor, exist_ok=True)


def _load_image(image: ImageInput) -> Image.Image | NDArray[np.integer[Any]]:
    """An image or a grid as it is, or the image in a file."""
    if isinstance(image, Image.Image | np.ndarray):
        return image
    if isinstance(image, str | PathLike):
        return read_image(image)
    raise RecordError(
        f"an image is of the type {type(image).__name__}; expected a PIL image, the path of an image file, or a grid "
        "of ids as a NumPy array"
    )


def _find_image(fields: dict[str, Any], location: str) -> ImageInput:
    """What a part of a message names or holds: an image, its grid, or the path of its file."""
    image = fields.get("image")
    if isinstance(image, Image.Image | np.ndarray | PathLike):
        return image
    references = read_references({"image": fields}, location, "", 0, with_data=True)
    if len(references) != 1:
        raise RecordError(f"{location}: a part with {len(references)} images; expected one")
    (reference,) = references
    return (
        reference.name if reference.data is None else decode_image(reference.data, f"{location}: its image")
    )


def _read_messages(messages: Sequence[Message]) -> tuple[list[Turn], list[ImageInput]]:
    """Turns with placeholders, and the images that these stand for."""
    turns, images = [], []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RecordError(
                f"message {number} is {message!r:.80}; expected an object with 'role' and 'content'"
            )
        role, content, text = message.get("role"), message.get("content"), ""
        if role not in ("system", "user", "assistant"):
            raise RecordError(f"message {number}: role is {role!r}; expected 'system', 'user' or 'assistant'")
        # Text stays text, an image becomes a placeholder.
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
            kind = part.get("type")
            fields = {key: value for key, value in part.items() if key in IMAGE_KEYS and value is not None}
            if kind in IMAGE_PARTS and role == "user" and fields:
                images.append(_find_image(fields, f"message {number}"))
                text += PLACEHOLDER
            elif kind == "text" and PLACEHOLDER not in part["text"]:
                text += part["text"]
            else:
                raise RecordError(
                    f"message {number}: a part of type {kind!r} of the {role}'s; expected 'text' without "
                    f"{PLACEHOLDER}, or in the user's message 'image' with an image"
                )
        turns.append(Turn(role, text))
    return turns, images
