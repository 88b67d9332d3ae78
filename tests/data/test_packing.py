"""Rows of records: none lost, none seen by another, the same on any ranks and workers."""

import sys
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from itertools import count, islice, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BloomConfig, modeling_flash_attention_utils

from being_vl.data.batches import collate, load_batches
from being_vl.data.curriculum import Curriculum, Entry
from being_vl.data.options import CATEGORIES, PrepareOptions
from being_vl.data.packing import pack
from being_vl.data.prepare import prepare
from being_vl.data.sequences import RecordGroup, TokenSequence
from being_vl.data.store import PreparedSequences
from being_vl.errors import ConfigError, ModelError
from being_vl.training.kernels import attention_kernel
from being_vl.training.options import BatchOptions, PrecisionOptions, StageOptions, TrainOptions
from being_vl.training.schedule import StageProgress, StageSchedule, check_packing, make_schedules
from helpers import tiny

PAD = 999
GROUP = RecordGroup("foundation", "file", True)


def options(**changes: Any) -> TrainOptions:
    """Two stages on packed rows of 32 tokens, 3 a micro-batch; `changes` are those of the first."""
    stages = [
        StageOptions("one", "all", 1e-3, {"foundation": 3, "reasoning": 1}, accumulation=2, **changes),
        StageOptions("two", "all", 1e-3, {"reasoning": 1}, {"foundation": 1}),
    ]
    batches = BatchOptions(micro_batch_size=3, packing=32)
    return TrainOptions(Path("m"), [Path("r")], Path("o"), stages=stages, batches=batches)


def stream(lengths: list[int], keys: str = "a") -> Any:
    """`draw` of a stream whose records have these lengths and keys, again and again."""
    places = count()
    return lambda rows: Entry(
        keys[(place := next(places)) % len(keys)], GROUP, 0, lengths[place % len(lengths)], place
    )


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=80),
    st.integers(50, 120),
    st.integers(1, 40),
    st.text("abc", min_size=1, max_size=20),
)
def test_packing_loses_nothing_and_fits(lengths: list[int], capacity: int, window: int, keys: str) -> None:
    positions_read: set[int] = set()
    longest_wait = 0 if len(set(keys)) == 1 else 2 * window
    for number, row in enumerate(islice(pack(stream(lengths, keys), capacity, window), 100)):
        assert row
        assert sum(entry.length for entry in row) <= capacity
        positions = [entry.position for entry in row]
        assert positions == sorted(positions)
        assert not positions_read.intersection(positions)
        positions_read.update(positions)
        # All that came are seen or wait, and they wait for at most as many rows as there are places to wait.
        assert len(set(range(max(positions_read) + 1)) - positions_read) < window
        assert not [place for place in range(number + 1 - longest_wait) if place not in positions_read]


@pytest.mark.parametrize("unit", ["records", "tokens"])
@pytest.mark.parametrize("row", [2048, 8192])
def test_rows_keep_the_mixture_whatever_fits_best(row: int, unit: Any) -> None:
    """Within 0.5 % over 10,000 records; with the lengths of these keys each row would take the long ones first."""
    generator = np.random.default_rng(0)
    spans = {
        "foundation": (690, 700),
        "perception": (550, 1000),
        "reasoning": (1300, 1350),
        "instruction": (20, 90),
    }
    mixture = {"foundation": 30, "perception": 10, "reasoning": 10, "instruction": 50}
    lengths = {
        RecordGroup(key, "file", False): generator.integers(*span, 5000).astype(np.int32)
        for key, span in spans.items()
    }
    read: Counter[str] = Counter()
    for rows in pack(Curriculum(lengths, mixture, seed=0, unit=unit).draw, row):
        for entry in rows:
            read[entry.key] += entry.length if unit == "tokens" else 1
        if sum(read.values()) >= (10_000 if unit == "records" else 10_000 * 400):
            break
    for key, share in mixture.items():
        assert read[key] / sum(read.values()) == pytest.approx(share / 100, abs=0.005), key


@pytest.mark.parametrize("kind", ["uniform", "skewed", "images and text"])
def test_rows_of_mixed_lengths_are_at_least_98_percent_full(kind: str) -> None:
    generator = np.random.default_rng(0)
    n = 20_000
    lengths = {
        "uniform": generator.integers(20, 2049, n),
        "skewed": np.clip(generator.lognormal(6, 0.8, n), 20, 2048),
        "images and text": generator.choice([0, 600, 1000], n) + generator.integers(20, 300, n),
    }[kind]
    rows = list(islice(pack(stream(lengths.astype(int).tolist(), "aaab"), 2048), 2000))
    assert sum(entry.length for row in rows for entry in row) / (2000 * 2048) > 0.98


def make_sequences(n: int = 60, seed: int = 0, size: int = 300) -> list[TokenSequence]:
    """Records of 3 to 20 tokens, with labels on about half of them, in two categories."""
    generator = np.random.default_rng(seed)
    results = []
    for number in range(n):
        length = int(generator.integers(3, 21))
        ids = generator.integers(size, size=length).astype(np.int32)
        weights = (generator.random(length) < 0.5).astype(np.float32)
        weights[-1] = 1
        category = ("foundation", "reasoning")[number % 3 == 0]
        results.append(TokenSequence(ids, weights, category, "file", f"record {number}"))
    return results


def test_a_batch_is_padded_on_the_right_and_positions_restart() -> None:
    a, b, c = make_sequences(3)
    a.weights[:] = b.weights[:] = 1
    batch = collate([[a, b], [c]], 7, CATEGORIES)
    length = len(a.ids) + len(b.ids)
    assert all(tensor.shape == (2, length) for tensor in batch.values())
    assert [tensor.dtype for tensor in batch.values()] == [*[torch.int64] * 3, torch.float32, torch.int64]
    assert batch["input_ids"].tolist() == [[*a.ids, *b.ids], [*c.ids, *[7] * (length - len(c.ids))]]
    assert batch["position_ids"].tolist() == [[*range(len(a.ids)), *range(len(b.ids))], [*range(length)]]
    assert batch["labels"][0].tolist() == [-100, *a.ids[1:], -100, *b.ids[1:]]
    assert batch["labels"][1].tolist() == [-100, *c.labels[1:], *[-100] * (length - len(c.ids))]
    assert ((batch["weights"] > 0) == (batch["labels"] != -100)).all()
    flat_batch = collate([[a, b], [c]], 7, CATEGORIES, is_flat=True)
    assert flat_batch["input_ids"].tolist() == [[*a.ids, *b.ids, *c.ids]]
    assert flat_batch["position_ids"].tolist() == [
        [*range(len(a.ids)), *range(len(b.ids)), *range(len(c.ids))]
    ]


# ------------------------------------------------------------------------------------------------ leaks


def losses(model: Any, batch: dict[str, torch.Tensor]) -> list[float]:
    """Cross-entropy at each label, row by row."""
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    results = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none", ignore_index=-100
    )
    return results[batch["labels"][:, 1:].flatten() != -100].tolist()


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """What flash-attn computes for (records, length, heads, width), without its kernels, which need a GPU."""
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    is_visible = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
    assert causal
    q, k, v = (states.transpose(1, 2) for states in (q, k, v))
    results = F.scaled_dot_product_attention(
        q, k, v, attn_mask=is_visible, scale=softmax_scale, enable_gqa=True
    )
    return results.transpose(1, 2)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """The same for records one after the other, which begin at `cu_seqlens`."""
    assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist()
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    records = [
        flash_attn_func(q[None, a:b], k[None, a:b], v[None, a:b], softmax_scale, causal, window_size)
        for a, b in pairwise(cu_seqlens_q.tolist())
    ]
    return torch.cat(records, dim=1)[0]


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn as far as transformers knows, computed by the functions above."""
    module, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    functions = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    vars(module).update(functions, flash_attn_with_kvcache=None)
    vars(padding).update(pad_input=None, unpad_input=None)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)


NO_FLASH = pytest.mark.skipif(not find_spec("flash_attn"), reason="flash-attn is not installed")
KERNELS = [
    *("sdpa", "eager", "flash_attn by PyTorch"),
    pytest.param("flash_attention_2", marks=[NO_FLASH, pytest.mark.gpu]),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "olmo2", "olmo3"]
)
def test_packed_records_have_the_losses_that_they_have_alone(
    family: tiny.Family, kernel: str, request: pytest.FixtureRequest
) -> None:
    """Also where attention slides over fewer tokens than a record has."""
    if family == "gemma2" and kernel != "eager":
        pytest.skip("transformers computes Gemma 2's capped attention by eager alone")
    extra = {"sliding_window": 6} if family in ("mistral", "gemma2", "gemma3", "olmo3") else {}
    is_on_cpu = kernel != "flash_attention_2"
    device, dtype = ("cpu", torch.float32) if is_on_cpu else ("cuda", torch.bfloat16)
    torch.manual_seed(0)
    config = tiny.CONFIGS[family](
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=None, **extra,
    )  # fmt: skip
    is_flat = kernel.startswith("flash")
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa" if is_flat and is_on_cpu else kernel
    )
    model.to(device, dtype)
    records = make_sequences(12)

    def batch(rows: list[list[TokenSequence]]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(device) for name, tensor in collate(rows, 0, CATEGORIES, is_flat).items()}

    single_losses = [loss for record in records for loss in losses(model, batch([[record]]))]
    if is_flat and is_on_cpu:
        request.getfixturevalue("flash_attn")
        model.config._attn_implementation = "flash_attention_2"  # as what is installed would have made it
    check_packing(model, is_flat)
    tolerance = 0.05 if dtype == torch.bfloat16 else 2e-6
    packed_losses = losses(model, batch([records[:5], records[5:7], records[7:]]))
    assert packed_losses == pytest.approx(single_losses, abs=tolerance)
    padded_losses = losses(model, batch([[record] for record in records]))
    assert padded_losses == pytest.approx(single_losses, abs=tolerance)


def test_flash_attention_is_what_auto_means_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    assert attention_kernel(PrecisionOptions("bf16")) is None
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    assert attention_kernel(PrecisionOptions("bf16")) == "flash_attention_2"
    assert attention_kernel(PrecisionOptions("fp32")) is None
    assert attention_kernel(PrecisionOptions("bf16", attention="sdpa")) == "sdpa"


def test_a_model_that_lets_records_see_each_other_is_refused() -> None:
    """BLOOM knows positions by an attention bias and no position_ids."""
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(ModelError, match="lets a record see the one before it"):
        check_packing(model, is_flat=False)


# ------------------------------------------------------------------------------------------------ the plan of steps


def read_steps(stage: StageSchedule, ranks: int, workers: int, start: int) -> list[list[list[int]]]:
    """The ids of the rows of each step after the first `start`, as the ranks read them, put together again."""
    sequences = tiny.SequenceList(make_sequences(), PAD)
    parts = -(-stage.batch_size // (3 * ranks))
    loaders = [
        load_batches(StageProgress(stage).rows_after(start), sequences, parts, rank, ranks, workers)
        for rank in range(ranks)
    ]
    steps = []
    for batches_of_ranks in zip(*loaders, strict=True):
        assert all(rows == batches_of_ranks[0][0] for rows, _ in batches_of_ranks)
        micro = [batches[part] for part in range(parts) for _, batches in batches_of_ranks]
        assert all(1 <= len(batch["input_ids"]) <= 3 for batch in micro)
        steps.append([ids[ids != PAD].tolist() for batch in micro for ids in batch["input_ids"]])
    return steps


@pytest.fixture(scope="module")
def reference() -> list[list[list[int]]]:
    (stage, _) = make_schedules(options(max_steps=6), tiny.SequenceList(make_sequences()).lengths, ranks=2)
    assert stage.batch_size == 12
    return read_steps(stage, 1, 0, 0)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (3, 0), (4, 0), (1, 2), (2, 2), (4, 2)])
def test_ranks_workers_and_stops_do_not_change_what_the_model_sees(
    ranks: int, workers: int, reference: list[list[list[int]]]
) -> None:
    (stage, _) = make_schedules(options(max_steps=6), tiny.SequenceList(make_sequences()).lengths, ranks=2)
    for start in range(6) if workers == 0 else (0, 3):
        assert read_steps(stage, ranks, workers, start) == reference[start:]


@pytest.fixture(scope="module")
def prepared_options(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> PrepareOptions:
    """The chain's records, prepared."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    preparation = PrepareOptions(chain / "tied", [chain / "data" / "train.json"], out, chain / "grids")
    prepare(preparation)
    return preparation


@given(st.floats(0, 1), st.integers(0, 9), st.integers(0, 700), st.sampled_from([1, 2, 3]), st.integers(0, 2))
@settings(max_examples=30)
def test_with_dropout_no_row_is_too_long_and_the_records_are_those_planned(
    prepared_options: PrepareOptions, dropout: float, seed: int, margin: int, ranks: int, start: int
) -> None:
    builder = tiny.builder(prepared_options)
    plain_sequences = PreparedSequences(prepared_options.out, builder)
    packing = max(int(lengths.max()) for lengths in plain_sequences.lengths.values()) + margin
    sequences = PreparedSequences(prepared_options.out, builder, dropout, seed, packing)
    assert all(
        (sequences.lengths[group] >= plain_sequences.lengths[group]).all()
        for group in plain_sequences.lengths
    )
    stage = StageSchedule(options().stages[0], sequences.lengths, seed, packing, batch_size=6, steps=3)
    assert builder.layout is not None
    first_visual = builder.layout.first_visual

    def texts(rows: list[list[TokenSequence]]) -> list[list[int]]:
        ids_of_rows = [np.concatenate([sequence.ids for sequence in row]) for row in rows]
        return [ids[ids < first_visual].tolist() for ids in ids_of_rows]

    def read(ranks: int, start: int) -> list[list[list[int]]]:
        parts = 6 // ranks
        loaders = [
            load_batches(
                StageProgress(stage).rows_after(start), sequences, parts, rank, ranks, packing=packing
            )
            for rank in range(ranks)
        ]
        micro = [
            [batches[part] for part in range(parts) for _, batches in loaders_of_rank]
            for loaders_of_rank in zip(*loaders, strict=True)
        ]
        rows = [[batch["input_ids"][0, : int(batch["tokens"])] for batch in step] for step in micro]
        assert all(batch["input_ids"].shape == (1, batch["tokens"]) for step in micro for batch in step)
        return [[row.tolist() for row in step] for step in rows]

    steps = read(ranks, start)
    assert all(len(row) <= packing for step in steps for row in step)
    planned_rows = [sorted(step, key=lambda row: sum(entry.length for entry in row)) for step in stage]
    for rows, step in zip(planned_rows[start:], steps, strict=True):
        expected = [[plain_sequences.get(e.group, e.number, e.position) for e in row] for row in rows]
        assert texts(expected) == [[i for i in row if i < first_visual] for row in step]
    assert steps == read(1, 0)[start:]
    if dropout == 0:
        assert [[len(row) for row in step] for step in steps] == [
            [sum(entry.length for entry in row) for row in rows] for rows in planned_rows[start:]
        ]


def test_with_dropout_rows_are_as_full_as_was_planned(prepared_options: PrepareOptions) -> None:
    """And nearly all that dropout adds is there."""
    builder = tiny.builder(prepared_options)
    sequences = PreparedSequences(prepared_options.out, builder, 0.3, 0, 2000)
    (stage, _) = make_schedules(
        replace(options(max_steps=20, batch_size=6), batches=BatchOptions(packing=2000)), sequences.lengths, 1
    )
    tokens, entries = 0, []
    for rows, batches in load_batches(iter(stage), sequences, 6, packing=2000):
        tokens += sum(int(batch["tokens"]) for batch in batches)
        entries += [entry for row in rows for entry in row]
    assert tokens == pytest.approx(sum(entry.length for entry in entries), rel=0.01)
    fewest_tokens, most_tokens = (
        sum(len(sequences.get(entry.group, entry.number, entry.position, share).ids) for entry in entries)
        for share in (0, 1)
    )
    assert tokens - fewest_tokens > 0.9 * (most_tokens - fewest_tokens) > 0


def test_an_epoch_is_as_many_records_or_tokens_as_there_are() -> None:
    lengths = tiny.SequenceList(make_sequences()).lengths
    total, tokens = sum(map(len, lengths.values())), sum(int(tokens.sum()) for tokens in lengths.values())
    by_records, _ = make_schedules(options(epochs=40), lengths, ranks=1)
    assert by_records.batch_size == 6
    rows = [row for step in by_records for row in step]
    assert len(rows) == by_records.steps * 6
    assert sum(map(len, rows)) == pytest.approx(40 * total, rel=0.02)
    assert by_records.records == pytest.approx(sum(map(len, rows)), rel=0.02)
    by_tokens, _ = make_schedules(options(epochs=40, mixture_by="tokens", batch_size=10), lengths, ranks=1)
    num_tokens = sum(entry.length for step in by_tokens for row in step for entry in row)
    assert by_tokens.batch_size == 10
    assert num_tokens == pytest.approx(40 * tokens, rel=0.02)
    assert by_tokens.tokens == pytest.approx(num_tokens, rel=0.02)


def test_shares_that_were_realised_are_counted_also_after_a_stop() -> None:
    (stage, _) = make_schedules(options(max_steps=8), tiny.SequenceList(make_sequences()).lengths, ranks=1)
    progress = StageProgress(stage)
    for rows in progress.rows_after(5):
        progress.add(rows)
    entries = [entry for step in stage for row in step for entry in row]
    counts = Counter(entry.key for entry in entries)
    shares = progress.shares()
    assert shares["mixture"] == {key: counts[key] / len(entries) for key in ("foundation", "reasoning")}
    assert shares["mixture"]["foundation"] == pytest.approx(0.75, abs=0.05)
    tokens = sum(entry.length for entry in entries if entry.key == "reasoning")
    assert shares["mixture_tokens"]["reasoning"] == tokens / sum(entry.length for entry in entries)
    assert shares["passes"] == {
        "foundation": counts["foundation"] / 40,
        "reasoning": counts["reasoning"] / 20,
    }


def test_orders_of_the_ablation() -> None:
    def mixtures(order: Any) -> list[Any]:
        stages = replace(options(), order=order).stages_in_order()
        return [(stage.name, stage.mixture, stage.mixture_end) for stage in stages]

    first = {"foundation": 3, "reasoning": 1}
    assert mixtures("progressive") == [
        ("one", first, None),
        ("two", {"reasoning": 1}, {"foundation": 1}),
    ]
    assert mixtures("reverse") == [("one", {"foundation": 1}, {"reasoning": 1}), ("two", first, None)]
    assert mixtures("random") == [("one", {}, None), ("two", {}, None)]
    paper = TrainOptions(Path("m"), [Path("r")], Path("o"), order="reverse").stages_in_order()
    assert [stage.mixture["foundation"] for stage in paper] == [15, 40, 80]
    assert [stage.unfreeze for stage in paper] == [0, 0.25, "all"]


def test_a_key_without_records_is_said_or_refused() -> None:
    lengths = tiny.SequenceList(make_sequences()).lengths
    training = options()
    training.stages[0].mixture = {"foundation": 3, "foundation/fiel": 1}
    with pytest.raises(
        ConfigError, match=r"no records of 'foundation/fiel'; there are 40 of foundation/file wi"
    ):
        make_schedules(training, lengths, 1)
    training.stages[0].mixture = {"foundation": 3, "perception": 1}
    assert (
        make_schedules(training, lengths, 1)[0]
        .describe()
        .endswith("mixture by records: foundation 100.0%; no records of perception")
    )
    with pytest.raises(ConfigError, match="packing is 10 tokens, but there are records of 20"):
        make_schedules(replace(options(), batches=BatchOptions(packing=10)), lengths, 1)
