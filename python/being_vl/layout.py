"""Which rows of an expanded model are text, and which are images."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from being_vl.errors import ModelError
from being_vl.files import write_json
from being_vl.options import StrPath

LAYOUT_FILE = "being_vl.json"
"""The shared vocabulary's layout, in the folder of an expanded model."""
VOCABULARY_FILE = "visual_vocabulary.json"
"""The visual BPE, in the folder of an expanded model."""
TOKEN_PREFIX = "<|visual_"
"""What the strings of all tokens that expanding adds begin with."""
_FORMAT = {"format": "being-vl/layout", "format_version": 1}


@dataclass(frozen=True)
class VocabularyLayout:
    """The shared vocabulary: text rows, then BOI, EOI, the codebook's ids, and the merges of the visual BPE.

    Args:
        text_size: Rows of the language model's embedding before it was expanded (not the tokenizer's length).
        codebook_size: Ids of the quantizer.
        num_merges: Tokens that the visual BPE adds to them.
        quantizer_name: Name of the quantizer.
        quantizer_fingerprint: Hex SHA-256 of its codebook and preprocessing.
        padding: Rows without meaning behind them.
    """

    text_size: int
    codebook_size: int
    num_merges: int
    quantizer_name: str
    quantizer_fingerprint: str
    padding: int = 0

    @property
    def boi(self) -> int:
        """Id that opens an image."""
        return self.text_size

    @property
    def eoi(self) -> int:
        """Id that closes an image."""
        return self.text_size + 1

    @property
    def first_visual(self) -> int:
        """Id of the visual BPE's token 0."""
        return self.text_size + 2

    @property
    def num_new(self) -> int:
        """Tokens that expanding adds."""
        return 2 + self.codebook_size + self.num_merges

    @property
    def size(self) -> int:
        """Ids of the shared vocabulary."""
        return self.text_size + self.num_new

    @property
    def rows(self) -> int:
        """Rows of the expanded model."""
        return self.size + self.padding

    def to_model(self, tokens: ArrayLike) -> NDArray[np.int64]:
        """Ids of the visual BPE, of any shape, as ids of the model.

        Raises:
            ModelError: if an id is outside the visual vocabulary, naming the first.
        """
        return _shift(tokens, 0, self.size - self.first_visual, self.first_visual, "visual BPE id")

    def to_visual(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Ids of the model, of any shape, as ids of the visual BPE; BOI and EOI are not included.

        Raises:
            ModelError: if an id is not a visual one, naming the first.
        """
        return _shift(ids, self.first_visual, self.size, -self.first_visual, "model id")

    def token_strings(self) -> list[str]:
        """The strings of the ids from `boi` on: `<|visual_start|>`, `<|visual_end|>`, `<|visual_0|>` and so on."""
        names = ["start", "end", *map(str, range(self.size - self.first_visual))]
        return [f"{TOKEN_PREFIX}{name}|>" for name in names]

    def save(self, folder: StrPath) -> None:
        """Write `being_vl.json` into `folder`."""
        write_json(Path(folder) / LAYOUT_FILE, _FORMAT | dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: StrPath) -> "VocabularyLayout":
        """Read `being_vl.json` of an expanded model's folder.

        Raises:
            ModelError: if the file is missing or damaged.
        """
        path = Path(folder) / LAYOUT_FILE
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(
                f"{folder}: no {LAYOUT_FILE}; expected a model that `being-vl expand` or `being-vl train` made"
            ) from None
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read ({error})") from None
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        if not isinstance(content, dict) or {key: content.get(key) for key in _FORMAT} != _FORMAT:
            raise ModelError(
                f"{path}: not a layout of a shared vocabulary, version {_FORMAT['format_version']}"
            )
        for name, kind in types.items():
            value = content.get(name)
            if type(value) is not kind or (isinstance(value, int) and value < 0):
                raise ModelError(f"{path}: {name!r} is {value!r}; expected {kind.__name__}")  # type: ignore[union-attr]
        return cls(**{name: content[name] for name in types})


def num_text_tokens(tokenizer: Any) -> int:
    """Ids of a Hugging Face tokenizer, up to the last, without those that expanding has added."""
    ids: dict[str, int] = tokenizer.get_vocab()
    return 1 + max(ids[token] for token in ids if not token.startswith(TOKEN_PREFIX))


def _shift(ids: ArrayLike, start: int, stop: int, offset: int, noun: str) -> NDArray[np.int64]:
    """`ids` + `offset`; ids that are not in `start` to `stop` - 1 are an error that calls them `noun`."""
    array = np.asarray(ids)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ModelError(f"{noun}s are {array.dtype}; expected integers")
    array = array.astype(np.int64)
    outside_indices = np.flatnonzero((array < start) | (array >= stop))
    if outside_indices.size:
        index = outside_indices[0]
        raise ModelError(f"{noun} {array.flat[index]} at index {index} is outside {start}..{stop - 1}")
    return array + offset
