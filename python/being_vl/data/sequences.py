"""Records as sequences of ids with labels: `[BOS][BOI] visual tokens [EOI] text ...`."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from being_vl.data.chat import ChatFormat
from being_vl.data.options import LossOptions, TooLong
from being_vl.data.records import PLACEHOLDER, Record, Turn
from being_vl.errors import ModelError, QuantizerError, RecordError
from being_vl.files import to_jsonable
from being_vl.fingerprints import compute_fingerprint
from being_vl.layout import TOKEN_PREFIX, VocabularyLayout, num_text_tokens
from being_vl.tokenizer import VisualBPE

if TYPE_CHECKING:
    from being_vl.shards.grids import GridStore

NO_LOSS = -100
"""Label of a position that carries no loss, as in PyTorch's cross entropy."""

_CUT = "\udc00"
"""Where a text is cut before it is tokenised; half of a character, so no text holds it."""

_IN_FRONT = re.compile(rf"\s*({PLACEHOLDER}\s*)+")
_BEHIND = re.compile(rf"(\s*\n\s*{PLACEHOLDER})+\s*\Z")


TRUNCATED = "truncated"
DROPPED = "dropped as too long"


class Fault(NamedTuple):
    """Why a record is left out, or in kinds `TRUNCATED` and `DROPPED` what was done to it as asked.

    Args:
        kind: What reports count it as.
        text: File, record, and what is wrong.
    """

    kind: str
    text: str


class ImageSpan(NamedTuple):
    """An image in a sequence: `ids[start:stop]` are its visual tokens, BOI and EOI not among them.

    Args:
        key: The image's key in the grid store.
        start: Its first token.
        stop: Behind its last.
        cells: Ids of its grid.
    """

    key: str
    start: int
    stop: int
    cells: int


class Group(NamedTuple):
    """Records that no mixture tells apart: of one category, out of files of one name, all with images or all without.

    Args:
        category: Their category.
        source: Name of their files, without folder and suffix.
        text_only: Whether they have no images.
    """

    category: str
    source: str
    text_only: bool


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """A record, ready for the model.

    Args:
        ids: int32, shape (length,).
        weights: float32, shape (length,): how much the loss on predicting that id counts; by default 1 on answers and
            their end-of-turn token, elsewhere 0. Not shifted; the model does that.
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
    def group(self) -> Group:
        """The group that it belongs to."""
        return Group(self.category, self.source, not self.images)

    @property
    def labels(self) -> NDArray[np.int32]:
        """int32, shape (length,): the id where it carries a loss, elsewhere `NO_LOSS`; not shifted."""
        return np.where(self.weights > 0, self.ids, np.int32(NO_LOSS))


class _Image(NamedTuple):
    """Stands for an image of a conversation, by its number there, among pieces of text."""

    number: int


class _Encoded(NamedTuple):
    """An image as tokens, framed by BOI and EOI, and the number of its ids."""

    tokens: NDArray[np.int32]
    cells: int


_Piece = tuple[str | _Image, float]
"""A piece of a sequence, and the weight of the loss on it."""


class SequenceBuilder:
    """Turns records into examples, and questions into prompts, the same way to the id.

    Images of a text without any placeholder, and those whose placeholders open the first question or close it on lines
    of their own, come directly behind BOS. Any other placeholder stays where it is. Text is written by the tokenizer's
    chat template, or `being_vl.data.chat.DEFAULT_TEMPLATE`; the labels are exactly the answers with their end-of-turn
    tokens, unless `loss` says otherwise. A caption follows its images without a template, with an end-of-turn token.
    Strings of special tokens in the texts are text like any other and never become special.

    Args:
        tokenizer: The model's Hugging Face tokenizer.
        layout: The shared vocabulary; None for a model that is not expanded, and text alone.
        bpe: The visual BPE that the model was expanded by; None as `layout`.
        grids: The images' grids; None where there are none to build from.
        max_length: Longest example in tokens.
        too_long: What becomes of longer records. Truncated they lose their last questions and answers, as whole turns
            with the images in them, as many as need be; dropped are those of which not one would be left.
        loss: What carries loss.

    Attributes:
        num_threads: Threads that encode images; None for one per core.
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
        too_long: TooLong = "error",
        loss: LossOptions | None = None,
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
        self.too_long = too_long
        self.loss = loss or LossOptions()
        self.chat = ChatFormat(tokenizer)
        self._text = _without_visual_tokens(tokenizer)
        names = [name for name in self.chat.specials - {PLACEHOLDER} if not name.startswith(TOKEN_PREFIX)]
        self._specials = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
        self.num_threads: int | None = None
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(pad for pad in pads if pad is not None)

    def build(self, records: Sequence[Record], faults: list[Fault] | None = None) -> list[TokenSequence]:
        """Build the examples of all records, in their order.

        Each image is encoded once and each distinct text tokenised once, however many records share it.

        Args:
            records: The records.
            faults: Takes a fault of each record that is left out, or was truncated; without it, they are an error.

        Raises:
            RecordError: naming the first records that have images without grids, ids outside the codebook, no label,
                more tokens than `max_length`, or a system turn where the template has none.
        """
        found: list[Fault] = []
        images = self._encode_images(records, found)
        records = [record for record in records if images.keys() >= set(record.images)]
        if not self.chat.takes_system:
            refused = [record for record in records if record.turns[0].role == "system"]
            reason = "has a system turn, which the model's chat template does not write"
            found += [Fault("system turn", f"{record.where}: {reason}") for record in refused]
            records = [record for record in records if record.turns[0].role != "system"]
        written = [self._write(record.turns, len(record.images)) for record in records]
        tokens = self._tokenise(
            {piece for pieces in written for piece, _ in pieces if isinstance(piece, str)}
        )
        examples = []
        for record, pieces in zip(records, written, strict=True):
            example = self._join(record, pieces, images, tokens)
            if not example.weights.any():
                found.append(Fault("no label", f"{record.where}: no answer to learn from"))
            elif fitted := self._fit(record, example, images, tokens, found):
                examples.append(fitted)
        if faults is not None:
            faults += found
        elif left_out := [fault.text for fault in found if fault.kind not in (TRUNCATED, DROPPED)]:
            raise RecordError(
                f"{len(left_out)} faults in records: {'; '.join(left_out[:3])}{_more(left_out)}"
            )
        return examples

    def recipe(self) -> dict[str, Any]:
        """What ids and weights follow from, besides records and grids; as JSON has it."""
        words = [self._text.to_str(), self.tokenizer.chat_template, self.chat.bos, self.pad_id]
        return {
            "tokenizer": compute_fingerprint(words)[:16],
            "text_size": self.layout.text_size if self.layout else None,
            "vocabulary": compute_fingerprint(self.bpe.to_json())[:16] if self.bpe else None,
            "max_length": self.max_length,
            "too_long": self.too_long,
            "loss": to_jsonable(self.loss),
        }

    def reencode(
        self, example: TokenSequence, dropout: float, seed: int, longest: float = math.inf
    ) -> TokenSequence:
        """The example with its images encoded by BPE-dropout; unchanged if that makes it longer than `longest`.

        Args:
            example: One that `build` made of the same grids.
            dropout: Probability with which each merge is skipped.
            seed: Below 2**63; same seed, same ids.
            longest: Tokens.
        """
        if not example.images:
            return example
        assert self.bpe is not None and self.grids is not None  # noqa: PT018
        grids = [self.grids[image.key] for image in example.images]
        encoded = self.bpe.encode_batch(grids, 1, dropout=dropout, seed=seed)
        ids, weights, spans, grown, behind = [], [], [], 0, 0
        for image, tokens in zip(example.images, encoded, strict=True):
            ids += [example.ids[behind : image.start], self._framed(tokens)[1:-1]]
            weights += [
                example.weights[behind : image.start],
                np.repeat(example.weights[image.start], len(tokens)),
            ]
            start = image.start + grown
            spans.append(image._replace(start=start, stop=start + len(tokens)))
            grown += len(tokens) - (image.stop - image.start)
            behind = image.stop
        if len(example.ids) + grown > longest:
            return example
        return dataclasses.replace(
            example,
            ids=np.concatenate([*ids, example.ids[behind:]]),
            weights=np.concatenate([*weights, example.weights[behind:]]),
            images=tuple(spans),
        )

    def prompt(self, turns: Sequence[Turn], images: Sequence[ArrayLike] = ()) -> NDArray[np.int64]:
        """The ids up to where the answer to the last question begins: what `build` puts in front of that answer.

        Args:
            turns: User and assistant alternate, user first and last; a system turn may stand before them.
            images: Ids of the visual BPE, one 1-D array per image.

        Returns:
            int64, shape (length,).

        Raises:
            RecordError: if the turns do not alternate, or placeholders and images differ in number.
            ModelError: if there is an image but no layout, an id outside the visual vocabulary, or a system turn that
                the chat template does not write.
        """
        asked = [turn.role for turn in turns if turn.role != "system" or turn is not turns[0]]
        if asked != ["assistant" if i % 2 else "user" for i in range(len(asked) // 2 * 2 + 1)]:
            raise RecordError(
                "a prompt's turns must alternate between user and assistant, user first and last, behind a system turn "
                "if there is one"
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
        """The conversation as pieces of text and images, each with the weight of its loss."""
        loss = self.loss
        texts = [self._specials.sub(_cut, turn.text.strip()) for turn in turns]
        if len(turns) == 1 and turns[0].role == "assistant":
            images: list[_Piece] = [(_Image(number), loss.images) for number in range(num_images)]
            return [*images, (texts[0] + self.chat.closing, loss.captions)]
        system = texts.pop(0) if turns[0].role == "system" else None
        in_front, texts[0] = _take_leading(texts[0], num_images)
        if not in_front and not any(PLACEHOLDER in text for text in texts):
            in_front = num_images
        pieces: list[_Piece] = [(_Image(number), loss.images) for number in range(in_front)]
        number = in_front
        for text, learned in self.chat.write(texts, system):
            if learned or not num_images:
                pieces.append((text, loss.answers if learned else loss.questions))
                continue
            head, *rest = text.split(PLACEHOLDER)
            pieces.append((head, loss.questions))
            for text_behind in rest:
                pieces += [(_Image(number), loss.images), (text_behind, loss.questions)]
                number += 1
        return [piece for piece in pieces if piece[0] != ""]

    def _join(
        self,
        record: Record,
        pieces: Sequence[_Piece],
        images: Mapping[str, _Encoded],
        tokens: Mapping[str, NDArray[np.int32]],
    ) -> TokenSequence:
        """The pieces as one sequence."""
        parts, weights, spans = [np.array(self.chat.bos, np.int32)], [0.0], []
        start = len(self.chat.bos)
        for piece, weight in pieces:
            if isinstance(piece, _Image):
                key = record.images[piece.number]
                part, cells = images[key]
                spans.append(ImageSpan(key, start + 1, start + len(part) - 1, cells))
            else:
                part = tokens[piece]
            parts.append(part)
            weights.append(weight)
            start += len(part)
        every = np.repeat(np.array(weights, np.float32), [len(part) for part in parts])
        every[0] = 0  # nothing stands before it that could predict it
        ids = np.concatenate(parts)
        return TokenSequence(ids, every, record.category, record.source.stem, record.where, tuple(spans))

    def _fit(
        self,
        record: Record,
        example: TokenSequence,
        images: Mapping[str, _Encoded],
        tokens: dict[str, NDArray[np.int32]],
        found: list[Fault],
    ) -> TokenSequence | None:
        """The example if it is short enough, or what `too_long` makes of it; why, into `found`."""
        length = len(example.ids)
        if length <= self.max_length:
            return example
        where, limit = record.where, f"max_length is {self.max_length}"
        shorter = record
        while self.too_long == "truncate" and sum(turn.role == "user" for turn in shorter.turns) > 1:
            shorter = _without_last_exchange(shorter)
            pieces = self._write(shorter.turns, len(shorter.images))
            tokens |= self._tokenise({p for p, _ in pieces if isinstance(p, str)} - tokens.keys())
            example = self._join(shorter, pieces, images, tokens)
            if len(example.ids) <= self.max_length and example.weights.any():
                cut = len(record.turns) - len(shorter.turns)
                found.append(
                    Fault(
                        TRUNCATED,
                        f"{where}: {length} tokens, {limit}: cut its last {cut} turns, {len(example.ids)} tokens left",
                    )
                )
                return example
        kind = "too long" if self.too_long == "error" else DROPPED
        found.append(Fault(kind, f"{where}: {length} tokens, {limit}"))
        return None

    def _tokenise(self, texts: Iterable[str]) -> dict[str, NDArray[np.int32]]:
        parts = {text: text.split(_CUT) for text in texts}
        if not parts:
            return {}
        ordered = list({part for cut in parts.values() for part in cut})
        encoded = self._text.encode_batch(ordered, add_special_tokens=False)
        rows = {part: np.asarray(row.ids, np.int32) for part, row in zip(ordered, encoded, strict=True)}
        return {text: np.concatenate([rows[part] for part in cut]) for text, cut in parts.items()}

    def _encode_images(self, records: Sequence[Record], found: list[Fault]) -> dict[str, _Encoded]:
        """Each image of the records that can be encoded; why a record has others, into `found`."""
        grids: dict[str, NDArray[np.int64]] = {}
        wrong: dict[str, Fault] = {}
        for key in dict.fromkeys(key for record in records for key in record.images):
            if self.bpe is None:
                reason = "but the model is not expanded by visual tokens (being-vl expand)"
                wrong[key] = Fault("missing image", f"has the image {key!r}, {reason}")
            elif self.grids is None:
                reason = "but no grids were given (--grids)"
                wrong[key] = Fault("missing image", f"has the image {key!r}, {reason}")
            elif key not in self.grids:
                why = self.grids.failures.get(key, "not among the quantized images")
                wrong[key] = Fault("missing image", f"the image {key!r} has no grid ({why})")
            else:
                grids[key] = grid = self.grids[key]
                outside = grid[(grid < 0) | (grid >= self.bpe.base_vocab_size)]
                if outside.size:
                    reason = f"outside the codebook of {self.bpe.base_vocab_size}"
                    wrong[key] = Fault("bad grid", f"the grid of {key!r} holds the id {outside[0]}, {reason}")
                    del grids[key]
        for record in records:
            if fault := next((wrong[key] for key in record.images if key in wrong), None):
                found.append(fault._replace(text=f"{record.where}: {fault.text}"))
        if self.bpe is None or not grids:
            return {}
        batch = self.bpe.encode_batch(list(grids.values()), self.num_threads)
        return {
            key: _Encoded(self._framed(tokens), grid.size)
            for (key, grid), tokens in zip(grids.items(), batch, strict=True)
        }

    def _framed(self, tokens: NDArray[Any]) -> NDArray[np.int32]:
        if self.layout is None:
            raise ModelError("the model is not expanded, so it cannot read images")
        framed = np.concatenate([[self.layout.boi], self.layout.to_model(tokens), [self.layout.eoi]])
        return framed.astype(np.int32)


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


def _without_last_exchange(record: Record) -> Record:
    """The record without its last question, the images in it, and its answer."""
    turns = record.turns[:-2]
    marks = [turn.text.count(PLACEHOLDER) for turn in record.turns]
    images = record.images[: sum(marks[:-2])] if any(marks) else record.images
    return dataclasses.replace(record, turns=turns, images=images)


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
