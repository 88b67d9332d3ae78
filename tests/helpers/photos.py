"""Grids of photographs, and the size of their codebook."""

from pathlib import Path

import numpy as np

PHOTOS = np.load(Path(__file__).with_name("photo_grids.npz"))["grids"]
PHOTOS.flags.writeable = False
PHOTOS_K = 1024
