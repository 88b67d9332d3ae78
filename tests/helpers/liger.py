"""Liger's kernels, on a GPU or in Triton's interpreter: `[TRITON_INTERPRET=1] python liger.py FOLDER FAMILY...`.

A process of its own, since Triton looks at the variable when it is imported. For each family losses and gradients of a
model with Liger's kernels must be those of the model without.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import triton.language as tl
from transformers import AutoModelForCausalLM
from triton.language.extra import libdevice
from triton.runtime import interpreter

from being_vl.training.kernels import use_liger
from being_vl.training.split import TwoPartLM

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
convert = interpreter._implicit_cvt


def to_floats(argument: Any) -> Any:
    if not isinstance(argument, float):
        return convert(argument)
    return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)


if IS_INTERPRETED:  # It lacks numbers with a point as arguments, and CUDA's own functions.
    interpreter._implicit_cvt = to_floats
    libdevice.rsqrt = lambda x: tl.rsqrt(x)
    libdevice.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


def main(folder: Path, *families: str) -> None:
    ids = torch.arange(2 * 11).mul(17).view(2, 11).to(DEVICE) % 380
    for family in families:
        llm = tiny.llm(folder / family, family, layers=2)  # type: ignore[arg-type]
        plain_model, liger = (
            AutoModelForCausalLM.from_pretrained(llm, attn_implementation="eager") for _ in "ab"
        )
        use_liger(liger)
        kernels = {type(m).__name__ for m in liger.modules() if "liger" in m.forward.__func__.__module__}
        assert {name[-3:] for name in kernels} == {"MLP", "orm"}, kernels
        models = [TwoPartLM(lm, 390, 1024).to(DEVICE) for lm in (plain_model, liger)]
        losses = [model(input_ids=ids, labels=ids) for model in models]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.mean().backward()
        for (name, expected), parameter in zip(
            models[0].named_parameters(), models[1].parameters(), strict=True
        ):
            torch.testing.assert_close(
                parameter.grad, expected.grad, msg=lambda message, name=name: f"{name}: {message}"
            )
        print(family, *sorted(kernels))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
