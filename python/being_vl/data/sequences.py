"""Records as sequences of ids with labels: `[BOS][BOI] visual tokens [EOI] text ...`."""

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from being_vl.data.chat import ChatFormat
from being_vl.data.options import LossOptions, TooLong
from being_vl.data.pieces import ImageSlot, Piece, write_pieces
from being_vl.data.records import PLACEHOLDER, Record, Turn
from being_vl.data.text import TextEncoder
from being_vl.errors import ModelError, QuantizerError, RecordError
from being_vl.files import to_jsonable
from being_vl.fingerprints import compute_fingerprint
from being_vl.layout import LAYOUT_FILE, VOCABULARY_FILE, VocabularyLayout, num_text_tokens
from being_vl.names import show_name
from being_vl.options import StrPath
from being_vl.quantizer_names import check_same_quantizer
from being_vl.tokenizer.visual_bpe import VisualBPE

if TYPE_CHECKING:
    from being_vl.shards.grids import Grids, GridStore

log = logging.getLogger(__name__)

NO_LOSS = -100
"""Label of a position that carries no loss, as in PyTorch's cross entropy."""

TRUNCATED_RECORD = "truncated"
DROPPED_RECORD = "dropped as too long"


class Fault(NamedTuple):
    """Why a record is left out; kinds `TRUNCATED_RECORD` and `DROPPED_RECORD` are what the options ask for.

    Args:
        kind: The kind of fault, as reports count it.
        text: File, record, and what the fault is.
    """

    kind: str
    text: str


class ImageSpan(NamedTuple):
    """An image in a sequence: `ids[start:stop]` are its visual tokens, without BOI and EOI.

    Args:
        key: The image's key in the grid store.
        start: Position of its first token.
        stop: Position behind its last token.
        cells: Number of cells of its grid.
    """

    key: str
    start: int
    stop: int
    cells: int


class RecordGroup(NamedTuple):
    """Records that no mixture tells apart: of one category, from files of one name, all with images or all without.

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
    """A record as token ids with labels.

    Args:
        ids: int32, shape (length,).
        weights: float32, shape (length,): how much the loss on predicting that id counts; by default 1 on answers and
            their end-of-turn token, elsewhere 0. Not shifted; the model does that.
        category: The record's category.
        source: Name of its file, without folder and suffix.
        location: The record's place, for messages.
        images: The places of its images in `ids`.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    category: str
    source: str
    location: str
    images: tuple[ImageSpan, ...] = ()

    @property
    def group(self) -> RecordGroup:
        """The group that it belongs to."""
        return RecordGroup(self.category, self.source, not self.images)

    @property
    def labels(self) -> NDArray[np.int32]:
        """int32, shape (length,): the id where it carries a loss, elsewhere `NO_LOSS`; not shifted."""
        return np.where(self.weights > 0, self.ids, np.int32(NO_LOSS))


class _ImageTokens(NamedTuple):
    """The tokens of an image between BOI and EOI, and the number of cells of its grid."""

    tokens: NDArray[np.int32]
    cells: int


class SequenceBuilder:
    """Turns records into sequences, and questions into prompts, with the same ids for the same text.

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
        max_length: Longest sequence in tokens.
        too_long: What becomes of longer records. `truncate` cuts as many of their last questions and answers as need
            be, as whole turns with the images in them, and drops a record of which no answer would be left.
        loss: What carries loss.

    Attributes:
        num_threads: Threads that encode images; None for one per core.
        pad_id: An id to fill up batches with.

    Raises:
        QuantizerError: if layout, visual BPE and grids are of different quantizers.
        ModelError: if the tokenizer has ids beyond the layout's text, or its chat template cannot be used.
    """

    def __init__(
        self,
        tokenizer: Any,
        layout: VocabularyLayout | None = None,
        bpe: VisualBPE | None = None,
        grids: "Grids | GridStore | None" = None,
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
            if grids is not None:
                check_same_quantizer(
                    "the grids",
                    (grids.quantizer_name, grids.quantizer_fingerprint),
                    "the model",
                    (layout.quantizer_name, layout.quantizer_fingerprint),
                )
        self.tokenizer = tokenizer
        self.layout = layout
        self.bpe = bpe
        self.grids = _join_grids(grids)
        self.max_length = max_length
        self.too_long = too_long
        self.loss = loss or LossOptions()
        self.chat = ChatFormat(tokenizer)
        self._text = TextEncoder(tokenizer, self.chat)
        self.num_threads: int | None = None
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(pad for pad in pads if pad is not None)

    @classmethod
    def from_model(
        cls,
        folder: StrPath,
        grids: "Grids | GridStore | StrPath | Iterable[StrPath] | None" = None,
        max_length: int = 2048,
        too_long: TooLong = "error",
        loss: LossOptions | None = None,
    ) -> Self:
        """What turns records into sequences for a model on disk, all checked to belong together.

        Args:
            folder: Folder of a model that `being-vl expand` or `being-vl train` made, or of any causal LM for text
                alone. Its weights are not read.
            grids: The images' grids, or the folders that `being-vl quantize` wrote, one or several; none of them is
                as None.
            max_length: Longest sequence in tokens; at most the model's context.
            too_long: What becomes of longer records.
            loss: What carries loss.

        Raises:
            ModelError: if the folder is no model's, or its tokenizer cannot be used.
            ManifestError: if a folder of grids is missing, unfinished or damaged.
            QuantizerError: if the grids are of another quantizer than the model, or of several.
        """
        from transformers import AutoConfig, AutoTokenizer

        from being_vl.shards.grids import Grids, GridStore
        from being_vl.shards.ranks import rank_and_world_size

        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder}: no config.json; expected the folder of a causal LM")
        config = AutoConfig.from_pretrained(folder).get_text_config()
        context = getattr(config, "max_position_embeddings", max_length)
        if max_length > context and rank_and_world_size()[0] == 0:
            log.info("max_length %d is beyond the model's context, so it is %d", max_length, context)
        is_expanded = (folder / LAYOUT_FILE).is_file()
        return cls(
            AutoTokenizer.from_pretrained(folder),
            layout=VocabularyLayout.load(folder) if is_expanded else None,
            bpe=VisualBPE.load(folder / VOCABULARY_FILE) if is_expanded else None,
            grids=grids if isinstance(grids, Grids | GridStore) else Grids.open(grids) if grids else None,
            max_length=min(max_length, context),
            too_long=too_long,
            loss=loss,
        )

    def build(self, records: Sequence[Record], faults: list[Fault] | None = None) -> list[TokenSequence]:
        """Build the sequences of all records, in their order.

        Each image is encoded once and each distinct text tokenised once, however many records share it.

        Args:
            records: The records.
            faults: Takes a fault of each record that is left out, or was truncated; without it, they are an error.

        Raises:
            RecordError: naming the first records that have images without grids, ids outside the codebook, no label,
                more tokens than `max_length`, or a system turn where the template has none.
        """
        record_faults: list[Fault] = []

        # Find and encode all images, and go on with the records that have all of theirs.
        records, grids = self._find_grids(records, record_faults)
        images = self._encode_images(grids)
        if not self.chat.takes_system:
            records = _drop_system_turns(records, record_faults)

        # Write each conversation as pieces of text and images, and tokenise all distinct texts together.
        pieces_of_records = [self._write(record.turns, len(record.images)) for record in records]
        texts = {piece for pieces in pieces_of_records for piece, _ in pieces if isinstance(piece, str)}
        tokens = self._text.encode(texts)

        # Join the pieces; leave out what has no label or is too long.
        sequences = []
        for record, pieces in zip(records, pieces_of_records, strict=True):
            sequence = self._join(record, pieces, images, tokens)
            if not sequence.weights.any():
                record_faults.append(Fault("no label", f"{record.location}: no answer to learn from"))
            elif short_sequence := self._fit(record, sequence, images, tokens, record_faults):
                sequences.append(short_sequence)

        if faults is not None:
            faults += record_faults
        elif errors := [
            fault.text for fault in record_faults if fault.kind not in (TRUNCATED_RECORD, DROPPED_RECORD)
        ]:
            remainder = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
            raise RecordError(f"{len(errors)} faults in records: {'; '.join(errors[:3])}{remainder}")
        return sequences

    def fingerprint_fields(self) -> dict[str, Any]:
        """What ids and weights follow from, besides records and grids; in plain JSON types."""
        texts = [self._text.to_str(), self.tokenizer.chat_template, self.chat.bos, self.pad_id]
        return {
            "tokenizer": compute_fingerprint(texts)[:16],
            "text_size": self.layout.text_size if self.layout else None,
            "vocabulary": compute_fingerprint(self.bpe.to_json())[:16] if self.bpe else None,
            "max_length": self.max_length,
            "too_long": self.too_long,
            "loss": to_jsonable(self.loss),
        }

    def reencode(
        self, sequence: TokenSequence, dropout: float, seed: int, max_length: float = math.inf
    ) -> TokenSequence:
        """The sequence with its images encoded by BPE-dropout; unchanged if it became longer than `max_length`.

        Args:
            sequence: One that `build` made of the same grids.
            dropout: Probability with which each merge is skipped.
            seed: Below 2**63; same seed, same ids.
            max_length: Most tokens of the result.
        """
        if not sequence.images:
            return sequence
        assert self.bpe is not None and self.grids is not None  # noqa: PT018
        grids = [self.grids[image.key] for image in sequence.images]
        batch = self.bpe.encode_batch(grids, 1, dropout=dropout, seed=seed)

        # Copy what stands between the images, and put the new tokens of each image in its place.
        ids, weights, spans, growth, end = [], [], [], 0, 0
        for image, tokens in zip(sequence.images, batch, strict=True):
            ids += [sequence.ids[end : image.start], self._frame(tokens)[1:-1]]
            image_weights = np.repeat(sequence.weights[image.start], len(tokens))
            weights += [sequence.weights[end : image.start], image_weights]
            start = image.start + growth
            spans.append(image._replace(start=start, stop=start + len(tokens)))
            growth += len(tokens) - (image.stop - image.start)
            end = image.stop
        if len(sequence.ids) + growth > max_length:
            return sequence
        return dataclasses.replace(
            sequence,
            ids=np.concatenate([*ids, sequence.ids[end:]]),
            weights=np.concatenate([*weights, sequence.weights[end:]]),
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
        roles = [turn.role for turn in turns if turn.role != "system" or turn is not turns[0]]
        if roles != ["assistant" if i % 2 else "user" for i in range(len(roles) // 2 * 2 + 1)]:
            raise RecordError(
                "a prompt's turns must alternate between user and assistant, user first and last, behind a system turn "
                "if there is one"
            )
        placeholders = sum(turn.text.count(PLACEHOLDER) for turn in turns if turn.role == "user")
        if placeholders not in (0, len(images)):
            raise RecordError(f"the prompt has {placeholders} {PLACEHOLDER} for {len(images)} images")
        pieces = self._write(turns, len(images))
        tokens = self._text.encode({text for text, _ in pieces if isinstance(text, str)})
        frames = [self._frame(np.asarray(image)) for image in images]
        parts = [
            frames[piece.number] if isinstance(piece, ImageSlot) else tokens[piece] for piece, _ in pieces
        ]
        return np.concatenate([self.chat.bos, *parts]).astype(np.int64)

    def _write(self, turns: Sequence[Turn], num_images: int) -> list[Piece]:
        return write_pieces(turns, num_images, self.chat, self._text, self.loss)

    def _join(
        self,
        record: Record,
        pieces: Sequence[Piece],
        images: Mapping[str, _ImageTokens],
        tokens: Mapping[str, NDArray[np.int32]],
    ) -> TokenSequence:
        """The pieces as one sequence."""
        parts, weights, spans = [np.array(self.chat.bos, np.int32)], [0.0], []
        start = len(self.chat.bos)
        for piece, weight in pieces:
            if isinstance(piece, ImageSlot):
                key = record.images[piece.number]
                part, cells = images[key]
                spans.append(ImageSpan(key, start + 1, start + len(part) - 1, cells))
            else:
                part = tokens[piece]
            parts.append(part)
            weights.append(weight)
            start += len(part)
        token_weights = np.repeat(np.array(weights, np.float32), [len(part) for part in parts])
        token_weights[0] = 0  # nothing stands before it that could predict it
        ids = np.concatenate(parts)
        return TokenSequence(
            ids, token_weights, record.category, record.source.stem, record.location, tuple(spans)
        )

    def _fit(
        self,
        record: Record,
        sequence: TokenSequence,
        images: Mapping[str, _ImageTokens],
        tokens: dict[str, NDArray[np.int32]],
        faults: list[Fault],
    ) -> TokenSequence | None:
        """The sequence if it is short enough, or what `too_long` makes of it; the reason goes into `faults`."""
        length, limit = len(sequence.ids), f"max_length is {self.max_length}"
        if length <= self.max_length:
            return sequence
        shorter_record = record
        while self.too_long == "truncate" and sum(turn.role == "user" for turn in shorter_record.turns) > 1:
            # Cut a question and its answer, and build the sequence again.
            shorter_record = _drop_last_exchange(shorter_record)
            pieces = self._write(shorter_record.turns, len(shorter_record.images))
            texts = {piece for piece, _ in pieces if isinstance(piece, str)}
            tokens |= self._text.encode(texts - tokens.keys())
            sequence = self._join(shorter_record, pieces, images, tokens)
            if len(sequence.ids) <= self.max_length and sequence.weights.any():
                cut_text = f"cut its last {len(record.turns) - len(shorter_record.turns)} turns"
                text = f"{record.location}: {length} tokens, {limit}: {cut_text}, {len(sequence.ids)} tokens left"
                faults.append(Fault(TRUNCATED_RECORD, text))
                return sequence
        kind = "too long" if self.too_long == "error" else DROPPED_RECORD
        faults.append(Fault(kind, f"{record.location}: {length} tokens, {limit}"))
        return None

    def _find_grids(
        self, records: Sequence[Record], faults: list[Fault]
    ) -> tuple[list[Record], dict[str, NDArray[np.int64]]]:
        """The records whose images all have grids, with the images' keys as names; and the grids by their keys.

        Of a record with other images a fault goes into `faults`.
        """
        # Find and read the grid of each image once.
        folders: dict[Path, str] = {}
        keys: dict[tuple[str, str], str | Fault] = {}
        grids: dict[str, NDArray[np.int64]] = {}
        complete_records = []
        for record in records:
            folder = folders.get(record.source) or str(record.source.absolute().parent)
            folders[record.source] = folder
            for name in record.images:
                if (name, folder) not in keys:
                    keys[name, folder] = self._find_grid(name, folder, grids)

            # The first image that cannot be used is named.
            record_keys = [keys[name, folder] for name in record.images]
            if fault := next((key for key in record_keys if isinstance(key, Fault)), None):
                faults.append(fault._replace(text=f"{record.location}: {fault.text}"))
            else:
                images = tuple(map(str, record_keys))
                is_same = images == record.images
                complete_records.append(record if is_same else dataclasses.replace(record, images=images))
        return complete_records, grids

    def _find_grid(self, name: str, folder: str, grids: dict[str, NDArray[np.int64]]) -> str | Fault:
        """The key of the image that a name means, whose grid goes into `grids`; or why it cannot be used."""
        if self.bpe is None or self.grids is None:
            reason = "but the model is not expanded by visual tokens (being-vl expand)"
            if self.bpe is not None:
                reason = "but no grids were given (--grids)"
            return Fault("missing image", f"has the image '{show_name(name)}', {reason}")
        try:
            key = self.grids.find(name, folder)
        except RecordError as error:
            return Fault(error.kind, str(error))
        if key in grids:
            return key
        grid = self.grids[key]
        outside_ids = grid[(grid < 0) | (grid >= self.bpe.base_vocab_size)]
        if outside_ids.size:
            text = f"the grid of '{show_name(name)}' holds the id {outside_ids[0]}"
            return Fault("id outside codebook", f"{text}, outside the codebook of {self.bpe.base_vocab_size}")
        grids[key] = grid
        return key

    def _encode_images(self, grids: Mapping[str, NDArray[np.int64]]) -> dict[str, _ImageTokens]:
        """The tokens of all grids, encoded together."""
        if self.bpe is None or not grids:
            return {}
        batch = self.bpe.encode_batch(list(grids.values()), self.num_threads)
        return {
            key: _ImageTokens(self._frame(tokens), grid.size)
            for (key, grid), tokens in zip(grids.items(), batch, strict=True)
        }

    def _frame(self, tokens: NDArray[Any]) -> NDArray[np.int32]:
        """Tokens of the visual BPE as ids of the model, between BOI and EOI."""
        if self.layout is None:
            raise ModelError("the model is not expanded, so it cannot read images")
        frame = np.concatenate([[self.layout.boi], self.layout.to_model(tokens), [self.layout.eoi]])
        return frame.astype(np.int32)


def _join_grids(grids: "Grids | GridStore | None") -> "Grids | None":
    if grids is None:
        return None
    from being_vl.shards.grids import Grids, GridStore

    return Grids([grids]) if isinstance(grids, GridStore) else grids


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
    check_same_quantizer(
        "the vocabulary",
        (bpe.quantizer_name, bpe.quantizer_fingerprint),
        "the model",
        (layout.quantizer_name, layout.quantizer_fingerprint),
    )


def _drop_last_exchange(record: Record) -> Record:
    """The record without its last question, the images in it, and its answer."""
    turns = record.turns[:-2]
    marks = [turn.text.count(PLACEHOLDER) for turn in record.turns]
    images = record.images[: sum(marks[:-2])] if any(marks) else record.images
    return dataclasses.replace(record, turns=turns, images=images)


def _drop_system_turns(records: Sequence[Record], faults: list[Fault]) -> list[Record]:
    """The records that do not begin with a system turn; the others become faults."""
    for record in records:
        if record.turns[0].role == "system":
            reason = "has a system turn, which the model's chat template does not write"
            faults.append(Fault("system turn", f"{record.location}: {reason}"))
    return [record for record in records if record.turns[0].role != "system"]
