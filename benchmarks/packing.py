"""How full packed rows are, what planning them costs, and what packing gains over padding.

    python -m benchmarks.packing [--records 100000] [--row 2048] [--steps 6]
    python -m benchmarks.packing --prepared DIR --model DIR [--row 2048] [--rows 500] [--dropout 0 0.1 0.5]

First table: fill of packed rows over lengths of three kinds, by the records looked ahead, and the time to plan a record
(mixture and packing; it is also what a resumed run takes for each record that it has seen). Second: tokens per second
of forward and backward passes of a small Llama, batches of equally many records padded, and the same records packed,
turn about; medians, on a CPU of its CPU time.

Of what `being-vl prepare` made, with BPE-dropout: the fill that was planned and the one of the rows that were read, and
how much longer the records are than without, there and where they need not fit into rows.
"""

import argparse
import time
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from being_vl.data.batches import collate, load_batches
from being_vl.data.curriculum import Curriculum
from being_vl.data.packing import pack
from being_vl.data.prepare import find_grids
from being_vl.data.sequences import RecordGroup, SequenceBuilder, TokenSequence
from being_vl.data.store import PreparedSequences

GROUPS = [RecordGroup(name, "file", False) for name in ("foundation", "reasoning")]
MIXTURE = {"foundation": 3, "reasoning": 1}


def lengths(kind, count, row):
    """Tokens of that many records, from 20 to a row."""
    generator = np.random.default_rng(0)
    return {
        "uniform": generator.integers(20, row + 1, count),
        "log-normal": np.clip(generator.lognormal(np.log(row / 5), 0.8, count), 20, row),
        "image and text": np.clip(row * 0.4 * generator.integers(2, size=count), 0, row - 400)
        + generator.integers(20, 400, count),
    }[kind].astype(np.int32)


def stream(record_lengths):
    """`draw` of a mixture of the records' two halves."""
    return Curriculum(dict(zip(GROUPS, np.array_split(record_lengths, 2), strict=True)), MIXTURE, seed=0).draw


def fill(records, row):
    """The first table."""
    print("| lengths | looked ahead | fill | planning, CPU µs a record |\n|---|---|---|---|")
    for kind in ("uniform", "log-normal", "image and text"):
        record_lengths = lengths(kind, records, row)
        for window in (64, 256, 4096):
            start = time.process_time()
            draw, record_count, tokens, rows = stream(record_lengths), 0, 0, 0
            for entries in pack(draw, row, window):
                record_count, tokens, rows = (
                    record_count + len(entries),
                    tokens + sum(e.length for e in entries),
                    rows + 1,
                )
                if record_count >= records:
                    break
            cost = (time.process_time() - start) / record_count * 1e6
            print(f"| {kind} | {window} | {tokens / rows / row:.1%} | {cost:.1f} |", flush=True)


def speed(row, steps):
    """The second table."""
    device, dtype, clock = "cpu", torch.float32, time.process_time
    if torch.cuda.is_available():
        device, dtype, clock = "cuda", torch.bfloat16, time.perf_counter
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).to(device, dtype)
    print("| lengths | batch | tokens/s | fill |\n|---|---|---|---|")
    for kind in ("uniform", "log-normal", "image and text"):
        record_lengths = lengths(kind, 10_000, row)
        packed_rows = [
            [entry.length for entry in entries]
            for entries in islice(pack(stream(record_lengths), row), 2 * steps)
        ]
        seconds, positions, tokens = {}, {}, sum(map(sum, packed_rows))
        for first in range(0, 2 * steps, 2):
            rows = packed_rows[first : first + 2]
            single_rows = [[length] for entries in rows for length in entries]
            for name, batch in {"packed": rows, "padded": single_rows}.items():
                ids = [
                    [
                        TokenSequence(np.zeros(n, np.int32), np.ones(n, np.float32), "", "", "")
                        for n in entries
                    ]
                    for entries in batch
                ]
                batch_tensors = {k: v.to(device) for k, v in collate(ids, 0, [""]).items()}
                start = clock()
                inputs = {name: batch_tensors[name] for name in ("input_ids", "position_ids")}
                hidden = model.model(**inputs, use_cache=False)
                hidden.last_hidden_state.float().square().mean().backward()
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds.setdefault(name, []).append((clock() - start) / sum(map(sum, batch)))
                positions[name] = positions.get(name, 0) + batch_tensors["input_ids"].numel()
        for name, rates in seconds.items():
            print(
                f"| {kind} | {name} | {1 / median(rates):,.0f} | {tokens / positions[name]:.1%} |", flush=True
            )


def measure_dropout(folder, model, row, rows, dropouts):
    """The table of prepared records."""
    builder = SequenceBuilder.from_model(model, find_grids(folder))
    print("| dropout | planned | read | longer by | of |\n|---|---|---|---|---|")
    for dropout in dropouts:
        sequences = PreparedSequences(folder, builder, dropout, max_length=row)
        packed_rows = list(islice(pack(Curriculum(sequences.lengths, {}, seed=0).draw, row), rows))
        tokens = [
            int(batch["tokens"])
            for _, (batch,) in load_batches(([r] for r in packed_rows), sequences, 1, packing=row)
        ]
        assert max(tokens) <= row
        tokens_expected = sum(entry.length for entries in packed_rows for entry in entries)
        tokens_without_dropout, tokens_with_dropout = (
            sum(
                len(sequences.get(e.group, e.number, e.position, share).ids)
                for entries in packed_rows
                for e in entries
            )
            for share in (0, 1)
        )
        growth = sum(tokens) - tokens_without_dropout
        print(
            f"| {dropout} | {tokens_expected / rows / row:.2%} | {sum(tokens) / rows / row:.2%} "
            f"| {growth / tokens_without_dropout:.2%} | {tokens_with_dropout / tokens_without_dropout - 1:.2%} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--row", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--prepared", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0, 0.1, 0.5])
    options = parser.parse_args()
    if options.prepared:
        measure_dropout(options.prepared, options.model, options.row, options.rows, options.dropout)
    else:
        fill(options.records, options.row)
        speed(options.row, options.steps)
