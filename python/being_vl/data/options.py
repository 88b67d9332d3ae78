"""Options of prepared data; importable without torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast

from being_vl.errors import ConfigError
from being_vl.hub import is_dataset
from being_vl.names import show_name
from being_vl.options import MAY_CHANGE, SHORTHAND, Options, StrPath, check_minimum

CATEGORIES = ("foundation", "perception", "reasoning", "instruction")
"""The paper's kinds of data (section 3.4): captions; attributes and objects; relations; dialogues and tasks."""

RESERVED_NAMES = ("text", "visual", "text_only")
"""What logs and mixtures call other things than a category."""

TooLong = Literal["error", "drop", "truncate"]


@dataclass
class LossOptions(Options):
    """What carries loss: weights of the loss on predicting a token. All 1 is what the published code does.

    Args:
        answers: Of answers and their end-of-turn tokens.
        captions: Of captions without a question, and their end-of-turn tokens.
        questions: Of questions, system turns, and what the chat template writes around the turns.
        images: Of images' tokens, with BOI and EOI.
    """

    answers: float = 1.0
    captions: float = 1.0
    questions: float = 0.0
    images: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, weight in vars(self).items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"sequences.loss.{name}: expected a weight of at least 0, found {weight}")


@dataclass
class SequenceOptions(Options):
    """How records become sequences.

    Args:
        max_length: Longest sequence in tokens, at most the model's context.
        too_long: What becomes of longer records: `error`; `drop` leaves them out and lists them; `truncate` cuts
            their last questions and answers as whole turns, never an image, and drops those that have one question.
        default_category: Category of the records that name none.
        categories: The categories that records may name.
        images_in_front: Put the images of a record whose text has no `<image>` at all in front of it; without this
            such a record is a fault.
        loss: What carries loss.
    """

    max_length: int = 2048
    too_long: TooLong = "error"
    default_category: str = "foundation"
    categories: list[str] = field(default_factory=lambda: [*CATEGORIES])
    images_in_front: bool = False
    loss: LossOptions = field(default_factory=LossOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum("sequences.max_length", self.max_length, 1)
        for name in self.categories:
            if not name or "/" in name or name in RESERVED_NAMES:
                names = ", ".join(RESERVED_NAMES)
                raise ConfigError(
                    f"sequences.categories: {name!r}; expected names without '/', other than {names}"
                )


@dataclass
class RecordFile(Options):
    """A file of records. A path alone stands for one without a category.

    Args:
        path: The file.
        category: Category of its records that name none themselves; where it is not given,
            `sequences.default_category`.
    """

    path: Path = field(metadata=SHORTHAND)
    category: str | None = None


def list_record_files(
    records: "StrPath | RecordFile | Iterable[StrPath | RecordFile]",
) -> list[RecordFile]:
    """One file of records or several, with their categories, as a list."""
    is_item = isinstance(records, str | PathLike | RecordFile) or is_dataset(records)
    items: Iterable[Any] = [records] if is_item else cast("Iterable[Any]", records)
    return [item if isinstance(item, RecordFile) else RecordFile(item) for item in items]


def check_record_files(files: Iterable[RecordFile], categories: Sequence[str]) -> None:
    """Raise a `ConfigError` that names a file whose category is not one of `sequences.categories`."""
    for file in files:
        if file.category is not None and file.category not in categories:
            raise ConfigError(
                f"records: the category of {show_name(file.path)} is {show_name(repr(file.category))}; expected one "
                f"of {', '.join(categories)}"
            )


@dataclass
class PrepareOptions(Options):
    """Options of `being-vl prepare`.

    Args:
        model: Folder of a model that `being-vl expand` made, or of any causal LM for training on text alone; its
            tokenizer and visual vocabulary are used, its weights are not read.
        records: Files of records: LLaVA JSON, JSON lines, WebDataset, Parquet, Arrow; folders of them, or datasets of
            the Hugging Face hub as `hf://datasets/OWNER/NAME`; with
            `{path: FILE, category: NAME}` the category of the file's records that name none.
        out: Folder for the Arrow files of tokenised records.
        grids: Folders that `being-vl quantize` wrote, all by one quantizer; needed when a record names an image.
        sequences: How records become sequences.
        lenient: Leave out and list records with faults, rather than stop.
        shard_size: Records per Arrow file.
        workers: Processes that make files; 0 for this one alone.
        overwrite: Replace the sequences that other options made in `out`.
    """

    model: Path = field(metadata=MAY_CHANGE)  # its tokenizer and vocabulary count, not its name
    records: list[RecordFile]
    out: Path = field(metadata=MAY_CHANGE)
    grids: list[Path] = field(default_factory=list)
    sequences: SequenceOptions = field(default_factory=SequenceOptions)
    lenient: bool = field(default=False, metadata=MAY_CHANGE)
    shard_size: int = 10_000
    workers: int = field(default=0, metadata=MAY_CHANGE)
    overwrite: bool = field(default=False, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum("shard_size", self.shard_size, 1)
        check_minimum("workers", self.workers, 0)
        check_record_files(self.records, self.sequences.categories)
