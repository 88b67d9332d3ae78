"""Make the little language model of the example: a tiny Llama, trained on the captions alone.

    python examples/tuxpaint/llm.py

Any Hugging Face causal LM can stand in its place: give its folder or hub name as `llm` in the recipe. This one is
small enough for two CPU cores.
"""

import logging
from pathlib import Path

from being_vl.demo.llm import TinyLlamaOptions, make_llama
from being_vl.training.engine import train
from being_vl.training.options import BatchOptions, PrecisionOptions, StageOptions, TrainOptions

DATA = Path("runs/tuxpaint/data/text.json")
UNTRAINED = Path("runs/tuxpaint/untrained")
OUT = Path("runs/tuxpaint/llm")


def main() -> None:
    """Make the tokenizer and the untrained model, then train it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not UNTRAINED.exists():
        make_llama(TinyLlamaOptions(DATA, UNTRAINED, hidden_size=128, layers=4, heads=4))
    stage = StageOptions("text", "all", 2e-3, {"foundation": 50, "reasoning": 50}, max_steps=300)
    batches, precision = BatchOptions(micro_batch_size=32), PrecisionOptions(dtype="fp32")
    train(TrainOptions(UNTRAINED, [DATA], OUT, stages=[stage], batches=batches, precision=precision))


if __name__ == "__main__":
    main()
