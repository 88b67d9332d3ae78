"""What each stage of a training will read: its mixture, its rows, its optimizer steps."""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from being_vl.data.batches import Row, collate
from being_vl.data.curriculum import TEXT_ONLY, Curriculum, assign_groups
from being_vl.data.packing import WINDOW, pack
from being_vl.data.sequences import RecordGroup, TokenSequence
from being_vl.errors import ConfigError, ModelError
from being_vl.shards.ranks import rank_and_world_size
from being_vl.training.options import BatchOptions, StageOptions, TrainOptions

Lengths = Mapping[RecordGroup, NDArray[np.int32]]
"""Of each group of records the tokens of each record."""

log = logging.getLogger(__name__)

SHOWN_GROUPS = 5
"""Groups of records that a warning names."""
_SAMPLE_ROWS = 2000
"""Rows read ahead of training, through all of a stage's mixture, to know how many records and tokens a row holds."""


@dataclass(frozen=True)
class StageSchedule:
    """What a stage reads, whatever ranks and workers read it.

    Iterating gives the rows of each step, from the first step on, each time again.

    Args:
        stage: Its options, with the mixture in effect.
        lengths: Tokens of each record of each group.
        seed: Of the order of the records.
        packing: Tokens of a row; None if each record is a row of its own.
        batch_size: Rows of an optimizer step, over all ranks.
        steps: Optimizer steps.
        records: Records that all steps will read, estimated.
        tokens: Their tokens, estimated.
    """

    stage: StageOptions
    lengths: Lengths
    seed: int
    packing: int | None
    batch_size: int
    steps: int = 0
    records: float = 0
    tokens: float = 0

    def weights(self) -> dict[str, float]:
        """Of each key of the mixture its weight at the start or the end, whichever is larger."""
        weights = dict(self.stage.mixture)
        for key, weight in (self.stage.mixture_end or {}).items():
            weights[key] = max(weight, weights.get(key, 0))
        return weights

    def curriculum(self, rows: int) -> Curriculum:
        """The stream of records, from its beginning; the mixture reaches its end after that many rows."""
        stage = self.stage
        return Curriculum(self.lengths, stage.mixture, self.seed, stage.mixture_end, rows, stage.mixture_by)

    def rows(self, total: int) -> Iterator[Row]:
        """That many rows, in which the mixture goes from start to end."""
        curriculum = self.curriculum(total)
        if not self.packing:
            return ([curriculum.draw(row)] for row in range(total))
        # With few records use a smaller window, so that short runs still read most of them.
        window = min(WINDOW, max(1, sum(curriculum.keys.values()) // 4))
        return islice(pack(curriculum.draw, self.packing, window), total)

    def __iter__(self) -> Iterator[list[Row]]:
        rows = self.rows(self.steps * self.batch_size)
        for _ in range(self.steps):
            yield list(islice(rows, self.batch_size))

    def describe(self) -> str:
        """The mixture in effect, and what was asked for without there being records of it."""
        curriculum = self.curriculum(1)
        mixtures = [
            ", ".join(f"{key} {weight:.1%}" for key, weight in mixture.items())
            for mixture in (curriculum.weights, curriculum.end)
        ]
        missing_keys = sorted(
            key for key, weight in self.weights().items() if weight and key not in curriculum.keys
        )
        return (
            f"{self.stage.name}: {self.steps} steps of {self.batch_size} rows, mixture by {self.stage.mixture_by}: "
            + " to ".join(dict.fromkeys(mixtures))
            + (f"; no records of {', '.join(missing_keys)}" if missing_keys else "")
        )


def make_schedules(options: TrainOptions, lengths: Lengths, ranks: int) -> list[StageSchedule]:
    """The schedules of a training's stages.

    Args:
        options: Of the training.
        lengths: Of each group of records the tokens of each record.
        ranks: Number of processes; the batches of stages without a `batch_size` are as large as these make them.

    Raises:
        ConfigError: if a mixture cannot be, or names what there is not, or a record is longer than a packed row.
    """
    packing = options.batches.packing
    max_length = max((int(tokens.max()) for tokens in lengths.values() if len(tokens)), default=0)
    if packing and max_length > packing:
        raise ConfigError(
            f"packing is {packing} tokens, but there are records of {max_length}; raise batches.packing, or lower "
            "sequences.max_length"
        )
    schedules = []
    # Each stage has an order of its own, by its seed.
    for index, stage in enumerate(options.stages_in_order()):
        batch_size = count_rows_of_step(stage, options.batches, ranks)
        schedule = StageSchedule(stage, lengths, options.seed + index, packing, batch_size)
        _check_mixture(schedule, options.sequences.categories)
        schedules.append(_count_steps(schedule, options.max_steps))
    if rank_and_world_size()[0] == 0:
        for line in find_gaps(schedules):
            log.warning("%s", line)
    return schedules


def find_gaps(schedules: Sequence[StageSchedule]) -> Iterator[str]:
    """What is asked of the records and not there, and what is there and not asked for, a line each.

    These are keys of mixtures without records, records that no stage reads, and mixtures of several categories where
    all records are of one.
    """
    lengths = schedules[0].lengths
    groups = [group for group in lengths if len(lengths[group])]
    groups_read: set[RecordGroup] = set()
    keys_asked: set[str] = set()
    for schedule in schedules:
        weights = schedule.weights()
        # Keys that have a share, but no records.
        curriculum = schedule.curriculum(1)
        shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        missing_keys = [name for name, share in shares.items() if share and name not in curriculum.keys]
        if missing_keys:
            listing = ", ".join(f"{name} ({shares[name]:.0%})" for name in missing_keys)
            yield (
                f"stage {schedule.stage.name!r}: there are no records of {listing}, which its mixture asks for; the "
                f"other keys share that part: {', '.join(curriculum.keys)}"
            )
        # Groups that it reads: all, if it has no mixture.
        members = assign_groups([*weights], groups) if weights else {"": groups}
        for key, key_groups in members.items():
            if not key or weights[key]:
                groups_read.update(key_groups)
        keys_asked.update(name for name, weight in weights.items() if weight and name != TEXT_ONLY)
    # Records of no stage.
    unread_groups = [group for group in groups if group not in groups_read]
    if unread_groups:
        count = sum(len(lengths[group]) for group in unread_groups)
        names = list(dict.fromkeys(f"{group.category}/{group.source}" for group in unread_groups))
        rest = f" and {len(names) - SHOWN_GROUPS} more" if len(names) > SHOWN_GROUPS else ""
        yield f"no stage reads {count:,} of the records: {', '.join(names[:SHOWN_GROUPS])}{rest}"
    # One category where several are asked for.
    categories = {group.category for group in groups}
    asked_categories = {name.partition("/")[0] for name in keys_asked}
    if len(categories) == 1 and len(asked_categories) > 1:
        yield (
            f"all records are of the category {categories.pop()!r}, so the mixtures, which tell "
            f"{len(asked_categories)} categories apart, change nothing: records name their category in a field "
            "`category`, or their file has one, `records: [{path: FILE, category: NAME}]`"
        )


def count_rows_of_step(stage: StageOptions, batches: BatchOptions, ranks: int) -> int:
    """Rows of an optimizer step over all ranks: the stage's `batch_size`, or those of all micro-batches."""
    return stage.batch_size or batches.micro_batch_size * ranks * stage.accumulation


def _check_mixture(schedule: StageSchedule, categories: list[str]) -> None:
    """Raise a `ConfigError` if a stage's mixture cannot be, or names what is neither a category nor in the records."""
    stage, lengths = schedule.stage, schedule.lengths
    try:
        curriculum = schedule.curriculum(1)
    except ConfigError as error:
        raise ConfigError(f"stage {stage.name!r}: {error}; {_list_groups(lengths)}") from None
    # A key of weight 0 and a known category may lack records; any other key is a mistake.
    for key in {**stage.mixture, **(stage.mixture_end or {})}:
        if key not in curriculum.keys and key not in categories and stage.mixture.get(key) != 0:
            hint = f"; those without images belong to {TEXT_ONLY!r}" if TEXT_ONLY in curriculum.keys else ""
            raise ConfigError(
                f"stage {stage.name!r}: there are no records of {key!r}; {_list_groups(lengths)}{hint}"
            )


def _count_steps(schedule: StageSchedule, max_steps: int | None) -> StageSchedule:
    """The schedule with its number of steps, and estimates of the records and tokens that they read."""
    stage, curriculum = schedule.stage, schedule.curriculum(1)
    # How many records and tokens a row holds, by a sample of rows.
    sample = list(schedule.rows(_SAMPLE_ROWS))
    records_per_row = sum(map(len, sample)) / _SAMPLE_ROWS
    tokens_per_row = sum(entry.length for row in sample for entry in row) / _SAMPLE_ROWS
    # Rows of the epochs, by what the mixture counts.
    if stage.mixture_by == "records":
        rows = stage.epochs * sum(curriculum.keys.values()) / records_per_row
    else:
        rows = stage.epochs * curriculum.tokens / tokens_per_row
    steps = stage.max_steps or math.ceil(rows / schedule.batch_size)
    steps = min(steps, max_steps or steps)
    total = steps * schedule.batch_size
    return replace(schedule, steps=steps, records=total * records_per_row, tokens=total * tokens_per_row)


class StageProgress:
    """What a stage has read so far, by the keys of its mixture."""

    def __init__(self, schedule: StageSchedule) -> None:
        self._schedule = schedule
        self._sizes = schedule.curriculum(1).keys
        self._records: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def rows_after(self, step: int) -> Iterator[list[Row]]:
        """The rows of each step after the first `step`, which count as read."""
        for number, rows in enumerate(self._schedule):
            if number < step:
                self.add(rows)
            else:
                yield rows

    def add(self, rows: list[Row]) -> None:
        """Count the rows of a step."""
        for row in rows:
            for entry in row:
                self._records[entry.key] += 1
                self._tokens[entry.key] += entry.length

    def shares(self) -> dict[str, dict[str, float]]:
        """Of each key its share of the records and of the tokens, and how often its records have come round."""
        return {
            "mixture": {key: self._records[key] / self._records.total() for key in self._sizes},
            "mixture_tokens": {key: self._tokens[key] / self._tokens.total() for key in self._sizes},
            "passes": {key: self._records[key] / size for key, size in self._sizes.items()},
        }


def check_packing(lm: Any, is_flat: bool) -> None:
    """Check on a model that the records of a packed row do not see each other.

    What the model makes of a record must be the same whatever record stands before it in the row.

    Args:
        lm: A causal LM of transformers.
        is_flat: As for `being_vl.data.batches.collate`.

    Raises:
        ModelError: if it differs.
    """
    ids, weights = np.arange(16, dtype=np.int32), np.ones(8, np.float32)
    a, b = (TokenSequence(half, weights, "", "", "") for half in (ids[:8], ids[8:]))
    device = next(lm.parameters()).device
    states, was_training = [], lm.training
    lm.eval()
    with torch.no_grad():
        # Two rows that end in the same record, behind another one in each.
        for row in ([a, a], [b, a]):
            batch = collate([row], 0, [""], is_flat)
            inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
            states.append(lm.get_decoder()(**inputs, use_cache=False).last_hidden_state[0, 8:].float())
    lm.train(was_training)
    if (states[0] - states[1]).abs().max() > 1e-3 * states[0].abs().max():
        raise ModelError(
            f"{lm.name_or_path}: its {type(lm).__name__} lets a record see the one before it in a packed row; train "
            "without packing"
        )


def _list_groups(lengths: Lengths) -> str:
    return "there are " + ", ".join(
        f"{len(lengths[group])} of {group.category}/{group.source}{' without images' * group.text_only}"
        for group in sorted(lengths)
    )
