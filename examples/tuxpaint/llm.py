"""Make the little language model of the example: a tiny Llama, trained on the captions alone.

    python examples/tuxpaint/llm.py

Any Hugging Face causal LM can stand in its place: give its folder or hub name as `llm` in the recipe. This one is
small enough for two CPU cores.
"""

import logging
from pathlib import Path

from being_vl.data.records import read_records
from being_vl.demo.llm import new_llm
from being_vl.train.engine import train
from being_vl.train.options import StageOptions, TrainOptions

DATA = Path("runs/tuxpaint/data/text.json")
OUT = Path("runs/tuxpaint/llm")


def main() -> None:
    """Make the tokenizer and the untrained model, then train it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not (OUT / "untrained").exists():
        new_llm(OUT / "untrained", read_records(DATA), vocab_size=2048)
    stage = StageOptions("text", "all", 2e-3, {"foundation": 50, "reasoning": 50}, max_steps=600)
    train(TrainOptions(model=OUT / "untrained", records=[DATA], out=OUT, stages=[stage], micro_batch_size=32))


if __name__ == "__main__":
    main()
