"""The shipped photographs through quantizer and visual BPE, and back."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from being_vl.files import write_json
from being_vl.quantize.base import load_quantizer
from being_vl.report.figures import draw_reconstructions, draw_token_map
from being_vl.tokenizer import VisualBPE

PIXELS = 256


@dataclass
class PhotosOptions:
    """Options of the round trip.

    Args:
        vocabulary: File of the visual BPE.
        out: Folder for `photographs.png`, `photographs-tokens.png` and `photographs.json`.
        quantizer: The quantizer that the vocabulary was made for; photographs need it at a size of their own.
    """

    vocabulary: Path
    out: Path
    quantizer: str = "builtin"


def photographs(options: PhotosOptions) -> None:
    """Draw each photograph above what its tokens give back, and write what it cost in tokens.

    The vocabulary was learned on the demo's pictures, not on photographs, so it shortens these much less.
    """
    bpe = VisualBPE.load(options.vocabulary)
    quantizer = load_quantizer(options.quantizer, size=PIXELS)
    found = sorted(
        (f for f in files("being_vl.demo.photographs").iterdir() if f.name.endswith(".jpg")), key=str
    )
    results, originals, decoded, covers = {}, [], [], []
    for file in found:
        with file.open("rb") as stream, Image.open(stream) as image:
            photo = image.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
        grid = quantizer.encode([photo])[0]
        ids, regions = bpe.encode(grid, return_regions=True)
        again = bpe.decode(ids, grid.shape[0], grid.shape[1], regions=regions)
        back = quantizer.decode([again])[0]
        error = np.mean((np.asarray(photo, np.float64) - np.asarray(back, np.float64)) ** 2)
        results[file.name] = {
            "cells": int(grid.size),
            "tokens": len(ids),
            "grid_came_back": bool(np.array_equal(again, grid)),
            "psnr_db": round(float(10 * np.log10(255**2 / error)), 2),
        }
        originals.append(photo)
        decoded.append(back)
        covers.append(regions)
    options.out.mkdir(parents=True, exist_ok=True)
    draw_reconstructions(
        options.out / "photographs.png", {"photograph": originals, "from its tokens": decoded}
    )
    draw_token_map(options.out / "photographs-tokens.png", originals, covers)
    write_json(options.out / "photographs.json", results)
