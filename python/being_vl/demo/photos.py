"""The shipped photographs through quantizer and visual BPE, and back."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from being_vl.demo.figures import draw_reconstructions, draw_token_map
from being_vl.files import write_json
from being_vl.quantize.base import load_quantizer
from being_vl.tokenizer import VisualBPE

PIXELS = 256
MERGES = 256


@dataclass
class PhotosOptions:
    """Options of the round trip.

    Args:
        vocabulary: File of the demo's visual BPE.
        out: Folder for `photographs.png`, `photographs-tokens.png` and `photographs.json`.
        quantizer: The quantizer that the vocabulary was made for; photographs need it at a size of their own.
    """

    vocabulary: Path
    out: Path
    quantizer: str = "builtin"


def photographs(options: PhotosOptions) -> None:
    """Draw each photograph above what its tokens give back, and write what it cost in tokens.

    The demo's vocabulary was learned on simple drawings and hardly shortens photographs, so they also get one of
    their own, learned from just these few.
    """
    drawn = VisualBPE.load(options.vocabulary)
    quantizer = load_quantizer(options.quantizer, size=PIXELS)
    names, photos = [], []
    for file in sorted(files("being_vl.demo.photographs").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".jpg"):
            with file.open("rb") as stream, Image.open(stream) as image:
                photos.append(image.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))
            names.append(file.name)
    grids = quantizer.encode(photos)
    own = VisualBPE.train(grids, base_vocab_size=quantizer.codebook_size, num_merges=MERGES)
    encoded = [own.encode(grid, return_regions=True) for grid in grids]
    restored = [
        own.decode(ids, grid.shape[0], grid.shape[1], regions=regions)
        for grid, (ids, regions) in zip(grids, encoded, strict=True)
    ]
    decoded = quantizer.decode(restored)
    options.out.mkdir(parents=True, exist_ok=True)
    draw_reconstructions(options.out / "photographs.png", {"photograph": photos, "from its tokens": decoded})
    draw_token_map(options.out / "photographs-tokens.png", photos, [regions for _, regions in encoded])
    results = {
        name: {
            "cells": int(grid.size),
            "tokens": len(ids),
            "tokens_by_the_demo's_vocabulary": len(drawn.encode(grid)),
            "grid_came_back": bool(np.array_equal(grid, again)),
            "psnr_db": round(_psnr(photo, back), 2),
        }
        for name, grid, (ids, _), again, photo, back in zip(
            names, grids, encoded, restored, photos, decoded, strict=True
        )
    }
    write_json(options.out / "photographs.json", results)


def _psnr(one: Image.Image, other: Image.Image) -> float:
    error = np.mean((np.asarray(one, np.float64) - np.asarray(other, np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error))
