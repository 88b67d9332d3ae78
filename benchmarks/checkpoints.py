"""What saving a checkpoint costs the steps of a training: by `Checkpoints` in the background, and by DeepSpeed alone.

    python -m benchmarks.checkpoints --folder /tmp/checkpoints

trains a Llama of random weights on random tokens, one rank per process (several under torchrun). A round is `--every`
steps, the first of them preceded by a save in one of three ways, in turn: none; `Checkpoints.save`; DeepSpeed's
`save_checkpoint`. A round ends when its checkpoint is complete, so it should be long enough for that. Printed are the
medians of the rounds' seconds, and what a save adds to the round without one just before, in seconds and in steps: by
the clock, and in CPU time of the thread that trains, which on a CPU tells more where other programs run beside it.
"""

import argparse
import operator
import shutil
import statistics
import time
from pathlib import Path

import torch
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from being_vl.training.checkpoint import Checkpoints
from being_vl.training.ranks import start_ranks

SAVE_MODES = ("none", "background", "DeepSpeed")


class Trainer:
    """A Llama of random weights, trained on random tokens, and saved in one way or another."""

    def __init__(self, options: argparse.Namespace) -> None:
        import deepspeed

        self.options, self.step = options, 0
        config = LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden,
            intermediate_size=4 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            num_key_value_heads=options.hidden // 64,
        )
        self.model = LlamaForCausalLM(config)
        settings = {
            "train_micro_batch_size_per_gpu": options.batch,
            "bf16": {"enabled": torch.cuda.is_available()},
            "zero_optimization": {"stage": options.zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=settings)
        # `Checkpoints` puts its own way of writing a file in the place of DeepSpeed's.
        self.deepspeed_save = self.engine.checkpoint_engine.save
        self.checkpoints = Checkpoints(self.engine, options.folder, "stage", keep=1)
        self.background_save = self.engine.checkpoint_engine.save
        shape = options.batch, options.length
        self.ids = torch.randint(options.vocabulary, shape, device=self.engine.device)

    def round_of_steps(self, way: str) -> tuple[float, float]:
        """Save, and take steps until the checkpoint is complete; seconds by the clock, and of CPU time."""
        clock, cpu = time.perf_counter(), time.thread_time()
        if way == "background":
            self.checkpoints.save(self.step)
        elif way == "DeepSpeed":
            self.engine.checkpoint_engine.save = self.deepspeed_save
            folder = str(self.options.folder)
            self.engine.save_checkpoint(folder, tag="direct", exclude_frozen_parameters=True)
            self.engine.checkpoint_engine.save = self.background_save
        for _ in range(self.options.every):
            loss = self.engine(input_ids=self.ids, labels=self.ids, use_cache=False).loss
            self.engine.backward(loss)
            self.engine.step()
            loss.item()
            self.checkpoints.agree()
            self.step += 1
        self.checkpoints.finish()
        return time.perf_counter() - clock, time.thread_time() - cpu


def report(trainer: Trainer, rounds: dict[str, list[tuple[float, float]]]) -> None:
    """Print what a step takes, and what a save of each way adds to it."""
    options = trainer.options
    size = sum(f.stat().st_size for f in (options.folder / "direct").glob("*.pt"))
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{parameters:,} parameters, {size / 1e6:,.0f} MB on {dist.get_world_size()} rank(s)")
    for index, measure in enumerate(("by the clock", "CPU time of the training thread")):
        seconds = {way: [pair[index] for pair in rounds[way]] for way in SAVE_MODES}
        step = statistics.median(seconds["none"]) / options.every
        print(f"{measure}: a step takes {step:.3f} s")
        for way in SAVE_MODES[1:]:
            extra_seconds = statistics.median(map(operator.sub, seconds[way], seconds["none"]))
            print(f"  a save by {way:<10} adds {extra_seconds:7.3f} s, {extra_seconds / step:6.1%} of a step")


def main() -> None:
    """Train, save, and print what saving cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints go; must not exist")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--zero", type=int, default=2)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    start_ranks()
    trainer = Trainer(options)
    # Once each to warm up: the first save is slower than the others.
    for way in SAVE_MODES:
        trainer.round_of_steps(way)
    rounds = {way: [] for way in SAVE_MODES}
    for _ in range(options.rounds):
        for way in SAVE_MODES:
            rounds[way].append(trainer.round_of_steps(way))
    if dist.get_rank() == 0:
        report(trainer, rounds)
    dist.barrier()
    shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
