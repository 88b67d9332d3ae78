"""Stage 1 by being-vl, beside the Hugging Face Trainer as the published code uses it, on one model and its data.

    python -m benchmarks.train [--folder DIR] [--layers 4] [--hidden 128] [--row 1024] [--steps 12] [--rounds 3]
    python -m benchmarks.train --layers 16 --hidden 2048 --text_rows 128000 --row 8192    # on a GPU

Three contenders read the same mixture of the same records and train the new rows of a tied Llama of random weights:

- `masked`: transformers' Trainer, batches padded, the whole embedding trained, its text rows' gradient set to zero.
- `packed`: the same with being-vl's packed rows in place of padding.
- `being-vl`: `being-vl train` with packed rows.

Each runs in a process of its own, turn about. Tokens are those of records, not padding; the time is a step's median but
for the first two steps. Memory is what a process took at its peak above what it held before the model was loaded (on
a GPU, what was allocated). Optimizer state is counted tensor by tensor. MFU needs `--peak_flops` on a CPU; all three
have the operations that the task needs in its numerator, `being_vl.training.metrics.Cost`.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from being_vl.data.batches import collate
from being_vl.data.options import SequenceOptions
from being_vl.demo import shapesworld
from being_vl.demo.llm import word_tokenizer
from being_vl.layout import VocabularyLayout
from being_vl.model.expand import expand
from being_vl.model.options import ExpandOptions
from being_vl.quantizer.job import quantize
from being_vl.quantizer.options import QuantizeOptions
from being_vl.tokenizer.options import VocabOptions
from being_vl.tokenizer.train import train_vocabulary
from being_vl.training.engine import load_sequences, train
from being_vl.training.log import read_log
from being_vl.training.metrics import Cost, find_peak_flops
from being_vl.training.options import BatchOptions, StageOptions, TrainOptions
from being_vl.training.schedule import make_schedules
from being_vl.training.split import TwoPartLM
from being_vl.training.stages import freeze

CONTENDERS = ("masked", "packed", "being-vl")
MIXTURE = {"foundation": 40.0, "perception": 30.0, "reasoning": 20.0, "instruction": 10.0}


def prepare(folder, args):
    """Records, grids, and an expanded Llama of random weights."""
    # With fewer images, there are too few records to fill a packed row.
    shapesworld.generate(folder / "data", max(60, args.row // 20), seed=0)
    quantize(QuantizeOptions(images=folder / "data" / "images", out=folder / "grids"))
    train_vocabulary(VocabOptions([folder / "grids"], folder / "vocabulary.json", num_merges=args.merges))
    tokenizer = word_tokenizer(folder / "data" / "train.json")
    config = LlamaConfig(
        vocab_size=args.text_rows,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        max_position_embeddings=args.row,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    # On a GPU where there is one: a CPU would take minutes, and float32 twice the disk.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        llm = LlamaForCausalLM(config)
    llm.to(torch.bfloat16 if torch.cuda.is_available() else torch.float32).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    expand(ExpandOptions(str(folder / "llm"), folder / "vocabulary.json", folder / "model"))


def options_of(folder, args, packing):
    """Of `being-vl train`: two packed rows a step, or as many records as have about their tokens."""
    records = round(2 * args.row / args.mean) if args.mean else 2
    return TrainOptions(
        folder / "model",
        [folder / "data" / "train.json"],
        folder / "run",
        folder / "grids",
        sequences=SequenceOptions(max_length=args.row),
        batches=BatchOptions(2 if packing else records, args.row if packing else None),
        stages=[StageOptions("stage1", 0, 1e-3, MIXTURE, max_steps=args.steps)],
    )


def pad_rows(rows, pad_id):
    """A batch as the Trainer's users have it: padded, with an attention mask."""
    batch = collate(rows, pad_id, list(MIXTURE))
    lengths = torch.tensor([sum(len(sequence.ids) for sequence in row) for row in rows])
    mask = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return {"input_ids": batch["input_ids"], "attention_mask": mask, "labels": batch["labels"]}


def pack_rows(rows, pad_id):
    """A batch of packed rows, whose positions say where records begin."""
    batch = collate(rows, pad_id, list(MIXTURE))
    return {name: batch[name] for name in ("input_ids", "position_ids", "labels")}


class TimedTrainer(Trainer):
    """The Trainer over batches made beforehand; takes the time of each step."""

    batches: list
    starts: list

    def get_train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    def training_step(self, *args, **kwargs):
        self.starts.append(time.perf_counter())
        return super().training_step(*args, **kwargs)


def train_with_trainer(options, steps, pad_id):
    """Seconds of each step but the last of the Hugging Face Trainer over the rows of each step."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    matrix = model.get_input_embeddings().weight
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is matrix)
    text_size = VocabularyLayout.load(options.model).text_size
    matrix.register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:text_size]), grad[text_size:]]))
    settings = TrainingArguments(
        output_dir=str(options.out / "trainer"),
        max_steps=len(steps),
        learning_rate=1e-3,
        weight_decay=0.01,
        optim="adamw_torch",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = TimedTrainer(model=model, args=settings)
    trainer.starts = []
    trainer.batches = [(pack_rows if options.batches.packing else pad_rows)(rows, pad_id) for rows in steps]
    trainer.train()
    return [end - start for start, end in pairwise(trainer.starts)]


def run_contender(name, folder, args):
    """Run one contender in this process; returns what it took."""
    figures = {}

    def count(optimizer, *_):
        tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        figures["optimizer"] = sum(t.numel() * t.element_size() for t in tensors if t.dim())

    register_optimizer_step_post_hook(count)
    import deepspeed  # noqa: F401  imported before memory is measured

    gc.collect()
    memory_before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    with tempfile.TemporaryDirectory() as out:
        options = options_of(folder, args, packing=name != "masked")
        options.out = Path(out) / "run"
        sequences = load_sequences(options)
        rows_of_steps = list(make_schedules(options, sequences.lengths, 1)[0])
        get = sequences.get
        steps = [
            [[get(e.group, e.number, e.position) for e in row] for row in rows] for rows in rows_of_steps
        ]
        if name == "being-vl":
            train(options)
            seconds = [entry["seconds"] for entry in read_log(options.out / "log.jsonl")]
        else:
            seconds = train_with_trainer(options, steps, sequences.pad_id)
    if torch.cuda.is_available():
        figures["memory"] = torch.cuda.max_memory_allocated()
    else:
        figures["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - memory_before
    records_of_steps = [[sequence for row in rows for sequence in row] for rows in steps]
    tokens = [sum(len(sequence.ids) for sequence in records) for records in records_of_steps]
    figures["tokens_per_second"] = median([t / s for t, s in zip(tokens, seconds, strict=False)][2:])
    figures["lengths"] = [len(sequence.ids) for records in records_of_steps for sequence in records]
    figures["label_tokens"] = sum(
        int((sequence.weights[1:] > 0).sum()) for records in records_of_steps for sequence in records
    )
    return figures


def flops_per_token(folder, figures):
    """Floating-point operations a token of what a contender has read."""
    text_size = VocabularyLayout.load(folder / "model").text_size
    model = TwoPartLM(AutoModelForCausalLM.from_pretrained(folder / "model"), text_size, 1024)
    freeze(model, StageOptions("stage1", 0, 1e-3, MIXTURE))
    return Cost.from_model(model).flops(figures["lengths"], figures["label_tokens"]) / sum(figures["lengths"])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where model and data are made, or lie already")
    sizes = {"merges": 200, "text_rows": 8000, "hidden": 128, "layers": 4, "row": 1024}
    for name, value in (sizes | {"steps": 12, "rounds": 3}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peak_flops", type=float)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--mean", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    if args.contender:
        print(json.dumps(run_contender(args.contender, folder.resolve(), args)))
        return
    if not (folder / "model").exists():
        prepare(folder, args)
    with tempfile.TemporaryDirectory() as out:
        options = options_of(folder, args, packing=False)
        options.out = Path(out)
        lengths = load_sequences(options).lengths
    mean = sum(sum(tokens.tolist()) for tokens in lengths.values()) / sum(map(len, lengths.values()))
    sizes = [f"--{name}={getattr(args, name)}" for name in (*sizes, "steps")]
    runs = {name: [] for name in CONTENDERS}
    for _ in range(args.rounds):
        for name in CONTENDERS:
            command = [sys.executable, "-m", "benchmarks.train", "--contender", name, "--folder", str(folder)]
            result = subprocess.run(
                [*command, f"--mean={mean}", *sizes], stdout=subprocess.PIPE, text=True, check=True
            )
            runs[name].append(json.loads(result.stdout.splitlines()[-1]))
    layout = VocabularyLayout.load(folder / "model")
    rows = AutoModelForCausalLM.from_pretrained(folder / "model").config.vocab_size
    share = 1 - layout.text_size / rows
    print(
        f"{rows:,} rows, {share:.1%} of them new; width {args.hidden}, {args.layers} layers; records of {mean:.0f} "
        "tokens\n"
    )
    print("| | tokens/s | to masked | MFU | peak memory | optimizer state |\n|---|---|---|---|---|---|")
    peak = find_peak_flops(args.peak_flops)
    for name, figures in runs.items():
        speed = median(run["tokens_per_second"] for run in figures)
        ratios = [
            f["tokens_per_second"] / m["tokens_per_second"]
            for f, m in zip(figures, runs["masked"], strict=True)
        ]
        mfu = f"{speed * flops_per_token(folder, figures[0]) / peak:.1%}" if peak else "n/a"
        memory = median(run["memory"] for run in figures) / 1e6
        state = figures[0]["optimizer"]
        print(
            f"| {name} | {speed:,.0f} | {median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) | {mfu} "
            f"| {memory:,.0f} MB | {state / 1e6:.2f} MB |"
        )
    ratio = runs["being-vl"][0]["optimizer"] / runs["masked"][0]["optimizer"]
    print(f"\nOptimizer state, being-vl to masked: {ratio:.4f}; new rows to all rows: {share:.4f}")


if __name__ == "__main__":
    main()
