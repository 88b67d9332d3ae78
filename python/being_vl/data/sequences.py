"""Records as sequences of ids with labels: `[BOS][BOI] visual tokens [EOI] text ...`."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from being_vl.data.chat import ChatFormat
from being_vl.data.records import PLACEHOLDER, Record, Turn
from being_vl.errors import GridError, ImageError, ModelError, QuantizerError, RecordError
from being_vl.model.layout import TOKEN_PREFIX, VocabularyLayout, num_text_tokens
from being_vl.tokenizer import VisualBPE

if TYPE_CHECKING:
    from being_vl.quantize.grids import GridStore

NO_LOSS = -100
"""Label of a position that carries no loss, as in PyTorch's cross entropy."""

_CUT = "\udc00"
"""Where a text is cut before it is tokenised; half of a character, so no text holds it."""

_IN_FRONT = re.compile(rf"\s*({PLACEHOLDER}\s*)+")
_BEHIND = re.compile(rf"(\s*\n\s*{PLACEHOLDER})+\s*\Z")


class ImageSpan(NamedTuple):
    """An image in a sequence: `ids[start:stop]` are its visual tokens, BOI and EOI not among them."""

    key: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A record, ready for the model.

    Args:
        ids: int32, shape (length,).
        weights: float32, shape (length,): how much the loss on predicting that id counts, 1 on answers and their
            end-of-turn token, elsewhere 0. Not shifted; the model does that.
        category: The record's category.
        source: Name of its file, without folder and suffix.
        where: The record's place, for messages.
        images: Where its images are in `ids`.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    category: str
    source: str
    where: str
    images: tuple[ImageSpan, ...] = ()

    @property
    def labels(self) -> NDArray[np.int32]:
        """int32, shape (length,): the id where it carries a loss, elsewhere `NO_LOSS`; not shifted."""
        return np.where(self.weights > 0, self.ids, np.int32(NO_LOSS))


class _Image(NamedTuple):
    """Stands for an image of a conversation, by its number there, among pieces of text."""

    number: int


_Piece = tuple[str | _Image, bool]


class SequenceBuilder:
    """Turns records into examples, and questions into prompts, the same way to the id.

    Images without placeholder, and images whose placeholders open the first question or close it on lines of their
    own, come directly behind BOS. Any other placeholder stays where it is. Text is written by the tokenizer's chat
    template, or `being_vl.data.chat.DEFAULT_TEMPLATE`; the labels are exactly the answers with their end-of-turn
    tokens. Strings of special tokens in questions and answers are text like any other and never become special.

    Args:
        tokenizer: The model's Hugging Face tokenizer.
        layout: The shared vocabulary; None for a model that is not expanded, and text alone.
        bpe: The visual BPE that the model was expanded by; None as `layout`.
        grids: The images' grids; None where there are none to build from.
        max_length: Longest example in tokens. Images are never cut.
        drop_too_long: Leave out longer records, to be found in `dropped`, rather than raise an error.

    Attributes:
        dropped: After `build`: places of the records left out for their length, each with that length.
        pad_id: An id to fill up batches with.

    Raises:
        QuantizerError: if layout, visual BPE and grids come of different quantizers.
        ModelError: if the tokenizer has ids beyond the layout's text, or its chat template is of no use.
    """

    def __init__(
        self,
        tokenizer: Any,
        layout: VocabularyLayout | None = None,
        bpe: VisualBPE | None = None,
        grids: "GridStore | None" = None,
        max_length: int = 2048,
        drop_too_long: bool = False,
    ) -> None:
        if (layout is None) != (bpe is None):
            raise ModelError("a layout needs the visual BPE that it was made for, and the other way round")
        if layout is not None and bpe is not None:
            check_vocabulary(layout, bpe)
            text_tokens = num_text_tokens(tokenizer)
            if text_tokens > layout.text_size:
                raise ModelError(
                    f"the tokenizer has {text_tokens} ids, the model {layout.text_size} rows for text"
                )
            if grids is not None and grids.quantizer_fingerprint != layout.quantizer_fingerprint:
                raise QuantizerError(
                    f"the grids were made by quantizer {grids.quantizer_name!r} ({grids.quantizer_fingerprint[:12]}), "
                    f"the model expects {layout.quantizer_name!r} ({layout.quantizer_fingerprint[:12]})"
                )
        self.tokenizer = tokenizer
        self.layout = layout
        self.bpe = bpe
        self.grids = grids
        self.max_length = max_length
        self.drop_too_long = drop_too_long
        self.chat = ChatFormat(tokenizer)
        self._text = _without_visual_tokens(tokenizer)
        names = [name for name in self.chat.specials - {PLACEHOLDER} if not name.startswith(TOKEN_PREFIX)]
        self._specials = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
        self.dropped: list[tuple[str, int]] = []
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(pad for pad in pads if pad is not None)

    def build(self, records: Sequence[Record], bad: list[str] | None = None) -> list[Example]:
        """Build the examples of all records, in their order; everything is checked before this returns.

        Each image is encoded once and each distinct text tokenised once, however many records share it.

        Args:
            records: The records.
            bad: Takes a message for each record that one of the errors below is about, and these are left out; without
                it they are errors.

        Raises:
            ImageError: if images of records have no grid, with the first few and the reason.
            GridError: if a grid holds ids outside the codebook, naming image and record.
            RecordError: if records are longer than `max_length` (unless dropped), or have no label, or name images
                where there is no layout.
        """
        images = self._encode_images(records, bad)
        records = [record for record in records if images.keys() >= set(record.images)]
        written = [self._write(record.turns, len(record.images)) for record in records]
        tokens = self._tokenise({text for pieces in written for text, _ in pieces if isinstance(text, str)})
        examples = []
        for record, pieces in zip(records, written, strict=True):
            parts = [
                images[record.images[p.number]] if isinstance(p, _Image) else tokens[p] for p, _ in pieces
            ]
            ids = np.concatenate([self.chat.bos, *parts]).astype(np.int32)
            weights = np.zeros(len(ids), np.float32)
            spans = []
            start = len(self.chat.bos)
            for part, (piece, learned) in zip(parts, pieces, strict=True):
                stop = start + len(part)
                weights[start:stop] = learned
                if isinstance(piece, _Image):
                    spans.append(ImageSpan(record.images[piece.number], start + 1, stop - 1))
                start = stop
            source = record.source.stem
            examples.append(Example(ids, weights, record.category, source, record.where, tuple(spans)))
        return self._checked(examples, bad)

    def prompt(self, turns: Sequence[Turn], images: Sequence[ArrayLike] = ()) -> NDArray[np.int64]:
        """The ids up to where the answer to the last question begins: what `build` puts in front of that answer.

        Args:
            turns: User and assistant alternate, user first and last.
            images: Ids of the visual BPE, one 1-D array per image.

        Returns:
            int64, shape (length,).

        Raises:
            RecordError: if the turns do not alternate, or placeholders and images differ in number.
            ModelError: if there is an image but no layout, or an id outside the visual vocabulary.
        """
        if [turn.role for turn in turns] != [
            "assistant" if i % 2 else "user" for i in range(len(turns) // 2 * 2 + 1)
        ]:
            raise RecordError(
                "a prompt's turns must alternate between user and assistant, user first and last"
            )
        placeholders = sum(turn.text.count(PLACEHOLDER) for turn in turns if turn.role == "user")
        if placeholders not in (0, len(images)):
            raise RecordError(f"the prompt has {placeholders} {PLACEHOLDER} for {len(images)} images")
        pieces = self._write(turns, len(images))
        tokens = self._tokenise({text for text, _ in pieces if isinstance(text, str)})
        encoded = [self._framed(np.asarray(image)) for image in images]
        parts = [encoded[piece.number] if isinstance(piece, _Image) else tokens[piece] for piece, _ in pieces]
        return np.concatenate([self.chat.bos, *parts]).astype(np.int64)

    def _write(self, turns: Sequence[Turn], num_images: int) -> list[_Piece]:
        """The conversation as pieces of text and images, each with whether it is learned."""
        first, *others = (self._specials.sub(_cut, turn.text.strip()) for turn in turns)
        in_front, first = _take_leading(first, num_images)
        if not in_front and not any(PLACEHOLDER in text for text in (first, *others)):
            in_front = num_images
        pieces: list[_Piece] = [(_Image(number), False) for number in range(in_front)]
        number = in_front
        for text, learned in self.chat.write([first, *others]):
            if learned or not num_images:
                pieces.append((text, learned))
                continue
            head, *rest = text.split(PLACEHOLDER)
            pieces.append((head, False))
            for text_behind in rest:
                pieces += [(_Image(number), False), (text_behind, False)]
                number += 1
        return [piece for piece in pieces if piece[0] != ""]

    def _tokenise(self, texts: Iterable[str]) -> dict[str, NDArray[np.int32]]:
        parts = {text: text.split(_CUT) for text in texts}
        if not parts:
            return {}
        ordered = list({part for cut in parts.values() for part in cut})
        encoded = self._text.encode_batch(ordered, add_special_tokens=False)
        rows = {part: np.asarray(row.ids, np.int32) for part, row in zip(ordered, encoded, strict=True)}
        return {text: np.concatenate([rows[part] for part in cut]) for text, cut in parts.items()}

    def _encode_images(
        self, records: Sequence[Record], bad: list[str] | None
    ) -> dict[str, NDArray[np.int32]]:
        """Each image of the records, encoded and framed by BOI and EOI; with `bad`, only those that can be."""
        users: dict[str, list[Record]] = {}
        for record in records:
            for key in dict.fromkeys(record.images):
                users.setdefault(key, []).append(record)
        if not users:
            return {}
        if self.bpe is None or self.grids is None:
            record = next(iter(users.values()))[0]
            lacking = "the model is not expanded" if self.bpe is None else "no grids were given"
            raise RecordError(f"{record.where}: has the image {record.images[0]!r}, but {lacking}")
        missing = [key for key in users if key not in self.grids]
        reasons = {key: self.grids.failed.get(key, "not among the quantized images") for key in missing}
        if missing and bad is None:
            shown = "; ".join(f"{key!r} ({reasons[key]}) of {users[key][0].where}" for key in missing[:3])
            raise ImageError(f"{len(missing)} of {len(users)} images have no grid: {shown}{_more(missing)}")
        if bad is not None:
            bad += [
                f"{r.where}: the image {key!r} has no grid ({reasons[key]})"
                for key in missing
                for r in users[key]
            ]
        grids = {}
        for key in (key for key in users if key not in reasons):
            grid = self.grids[key]
            if grid.min() < 0 or grid.max() >= self.bpe.base_vocab_size:
                wrong = grid[(grid < 0) | (grid >= self.bpe.base_vocab_size)][0]
                outside = f"holds the id {wrong}, outside the codebook of {self.bpe.base_vocab_size}"
                if bad is None:
                    raise GridError(f"the grid of {key!r} ({users[key][0].where}) {outside}")
                bad += [f"{record.where}: the grid of {key!r} {outside}" for record in users[key]]
                continue
            grids[key] = grid
        batch = self.bpe.encode_batch(list(grids.values()))
        return {key: self._framed(batch[index]) for index, key in enumerate(grids)}

    def _framed(self, tokens: NDArray[Any]) -> NDArray[np.int32]:
        if self.layout is None:
            raise ModelError("the model is not expanded, so it cannot read images")
        return np.concatenate([[self.layout.boi], self.layout.to_model(tokens), [self.layout.eoi]]).astype(
            np.int32
        )

    def _checked(self, examples: list[Example], bad: list[str] | None) -> list[Example]:
        masked = [example for example in examples if not example.weights[1:].any()]
        if masked and bad is None:
            shown = "; ".join(example.where for example in masked[:3])
            raise RecordError(f"{len(masked)} records have no answer to learn from: {shown}{_more(masked)}")
        long = [example for example in examples if len(example.ids) > self.max_length]
        self.dropped = [(example.where, len(example.ids)) for example in long] if self.drop_too_long else []
        if long and not self.drop_too_long and bad is None:
            shown = "; ".join(f"{example.where} with {len(example.ids)}" for example in long[:3])
            raise RecordError(
                f"{len(long)} of {len(examples)} records are longer than max_length {self.max_length}: "
                f"{shown}{_more(long)}; raise max_length or set drop_too_long"
            )
        if bad is not None:
            bad += [f"{example.where}: no answer to learn from" for example in masked]
            if not self.drop_too_long:
                limit = f"max_length is {self.max_length}"
                bad += [f"{example.where}: {len(example.ids)} tokens, {limit}" for example in long]
        left_out = {id(example) for example in (*masked, *long)}
        return [example for example in examples if id(example) not in left_out]


def _cut(special: re.Match[str]) -> str:
    """A special token's string, cut behind its first character, so that it is not found as one."""
    return special[0][0] + _CUT + special[0][1:]


def check_vocabulary(layout: VocabularyLayout, bpe: VisualBPE) -> None:
    """Check that a visual BPE is the one of a layout, as far as its file says.

    Raises:
        QuantizerError: if they differ in codebook, number of merges or quantizer.
    """
    if (bpe.base_vocab_size, bpe.num_merges) != (layout.codebook_size, layout.num_merges):
        raise QuantizerError(
            f"the vocabulary has a codebook of {bpe.base_vocab_size} and {bpe.num_merges} merges, the model "
            f"{layout.codebook_size} and {layout.num_merges}"
        )
    if bpe.quantizer_fingerprint not in (None, layout.quantizer_fingerprint):
        raise QuantizerError(
            f"the vocabulary was made for quantizer {bpe.quantizer_name!r} ({bpe.quantizer_fingerprint[:12]}), the "
            f"model for {layout.quantizer_name!r} ({layout.quantizer_fingerprint[:12]})"
        )


def _without_visual_tokens(tokenizer: Any) -> Tokenizer:
    """What turns text into ids: the strings of visual tokens are text like any other in it, and no image."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith(TOKEN_PREFIX)]
    return Tokenizer.from_str(json.dumps(state | {"truncation": None, "padding": None}))


def _take_leading(text: str, num_images: int) -> tuple[int, str]:
    """How many placeholders of the first question stand for images in front of the text, and the text without them."""
    for pattern in (_IN_FRONT, _BEHIND):
        found = pattern.match(text) if pattern is _IN_FRONT else pattern.search(text)
        if num_images and found:
            count = found[0].count(PLACEHOLDER)
            if pattern is _IN_FRONT or count == text.count(PLACEHOLDER):
                return count, (text[: found.start()] + text[found.end() :]).strip()
    return 0, text


def _more(items: Sequence[object]) -> str:
    return f"; and {len(items) - 3} more" if len(items) > 3 else ""
