"""The shipped photographs through quantizer and visual BPE, and back."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from being_vl.demo.figures import draw_reconstructions, draw_token_map
from being_vl.files import write_json
from being_vl.images.decode import decode_image
from being_vl.options import Options
from being_vl.quantizer.base import load_quantizer
from being_vl.tokenizer import VisualBPE

PIXELS = 256
MERGES = 256


@dataclass
class PhotosOptions(Options):
    """Options of the round trip.

    Args:
        vocabulary: File of the demo's visual BPE.
        out: Folder for `photographs.png`, `photographs-tokens.png` and `photographs.json`.
        quantizer: The quantizer that the vocabulary was made for; photographs need it at a size of their own.
    """

    vocabulary: Path
    out: Path
    quantizer: str = "builtin"


def draw_photographs(options: PhotosOptions) -> None:
    """Draw each photograph above what its tokens give back, and write what it cost in tokens.

    The demo's vocabulary was learned on simple drawings and hardly shortens photographs, so they also get one of
    their own, learned from just these few.
    """
    quantizer = load_quantizer(options.quantizer, size=PIXELS)
    names, photos = [], []
    for file in sorted(files("being_vl.demo.photographs").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".jpg"):
            photo = decode_image(file.read_bytes(), file.name)
            photos.append(photo.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))
            names.append(file.name)
    # Photographs → grids → tokens, and all the way back.
    grids = quantizer.encode(photos)
    bpe = VisualBPE.train(grids, base_vocab_size=quantizer.codebook_size, num_merges=MERGES)
    sequences = [bpe.encode(grid, return_regions=True) for grid in grids]
    grids_of_tokens = [
        bpe.decode(ids, grid.shape[0], grid.shape[1], regions=regions)
        for grid, (ids, regions) in zip(grids, sequences, strict=True)
    ]
    reconstructions = quantizer.decode(grids_of_tokens)
    # Figures, and what it cost.
    options.out.mkdir(parents=True, exist_ok=True)
    draw_reconstructions(
        options.out / "photographs.png", {"photograph": photos, "from its tokens": reconstructions}
    )
    regions_of_photos = [regions for _, regions in sequences]
    draw_token_map(options.out / "photographs-tokens.png", photos, regions_of_photos)
    demo_bpe = VisualBPE.load(options.vocabulary)
    results = {
        name: {
            "cells": int(grid.size),
            "tokens": len(ids),
            "tokens_by_the_demo's_vocabulary": len(demo_bpe.encode(grid)),
            "grid_came_back": bool(np.array_equal(grid, grid_of_tokens)),
            "psnr_db": round(_psnr(photo, reconstruction), 2),
        }
        for name, grid, (ids, _), grid_of_tokens, photo, reconstruction in zip(
            names, grids, sequences, grids_of_tokens, photos, reconstructions, strict=True
        )
    }
    write_json(options.out / "photographs.json", results)


def _psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error))
