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

from being_vl.train.checkpoint import Checkpoints
from being_vl.train.ranks import start_ranks


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
    given = parser.parse_args()
    start_ranks()
    import deepspeed

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=given.vocabulary,
        hidden_size=given.hidden,
        intermediate_size=4 * given.hidden,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64,
        num_key_value_heads=given.hidden // 64,
    )
    model = LlamaForCausalLM(config)
    settings = {
        "train_micro_batch_size_per_gpu": given.batch,
        "bf16": {"enabled": device == "cuda"},
        "zero_optimization": {"stage": given.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    directly = engine.checkpoint_engine.save
    checkpoints = Checkpoints(engine, given.folder, "stage", keep=1)
    in_background = engine.checkpoint_engine.save
    ids = torch.randint(given.vocabulary, (given.batch, given.length), device=engine.device)
    done = 0

    def round_of_steps(way: str) -> tuple[float, float]:
        nonlocal done
        started = time.perf_counter(), time.thread_time()
        if way == "background":
            checkpoints.save(done)
        elif way == "DeepSpeed":
            engine.checkpoint_engine.save = directly
            engine.save_checkpoint(str(given.folder), tag="direct", exclude_frozen_parameters=True)
            engine.checkpoint_engine.save = in_background
        for _ in range(given.every):
            loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            loss.item()
            checkpoints.agree()
            done += 1
        checkpoints.finish()
        return time.perf_counter() - started[0], time.thread_time() - started[1]

    ways = ("none", "background", "DeepSpeed")
    for way in ways:
        round_of_steps(way)
    found = {way: [] for way in ways}
    for _ in range(given.rounds):
        for way in ways:
            found[way].append(round_of_steps(way))
    if dist.get_rank() == 0:
        size = sum(f.stat().st_size for f in (given.folder / "direct").glob("*.pt"))
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{parameters:,} parameters, {size / 1e6:,.0f} MB on {dist.get_world_size()} rank(s)")
        for index, measure in enumerate(("by the clock", "CPU time of the training thread")):
            taken = {way: [seconds[index] for seconds in found[way]] for way in ways}
            step = statistics.median(taken["none"]) / given.every
            print(f"{measure}: a step takes {step:.3f} s")
            for way in ways[1:]:
                extra = statistics.median(map(operator.sub, taken[way], taken["none"]))
                print(f"  a save by {way:<10} adds {extra:7.3f} s, {extra / step:6.1%} of a step")
    dist.barrier()
    shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
