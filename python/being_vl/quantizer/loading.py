"""Reading, decoding and fitting images in worker processes, ahead of the network."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from being_vl.errors import ImageError
from being_vl.images.decode import decode_image
from being_vl.images.sources import ImageSource
from being_vl.quantizer.preprocessing import Preprocessing
from being_vl.shards.ranks import end_with_parent


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """An image as the network will see it, or why there is none.

    Args:
        key: Its name.
        pixels: (height, width, 3), uint8; None if it cannot be read.
        reason: Why it cannot; empty if it can.
        source_size: The image's own width and height, in pixels.
        sha256: Of the image file.
    """

    key: str
    pixels: NDArray[np.uint8] | None
    reason: str = ""
    source_size: tuple[int, int] = (0, 0)
    sha256: str = ""


class _Images(Dataset[LoadedImage]):
    def __init__(self, sources: Sequence[ImageSource], preprocessing: Preprocessing) -> None:
        self.sources = sources
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> LoadedImage:
        source = self.sources[index]
        try:
            data = source.read()
            image = decode_image(data, source.key)
        except OSError as error:
            return LoadedImage(source.key, None, f"{source.key}: cannot be read ({error.strerror})")
        except ImageError as error:
            return LoadedImage(source.key, None, str(error))
        pixels = np.array(self.preprocessing.prepare(image))
        return LoadedImage(source.key, pixels, "", image.size, hashlib.sha256(data).hexdigest())


def load_images(
    sources: Sequence[ImageSource], preprocessing: Preprocessing, batch_size: int, workers: int
) -> Iterator[list[LoadedImage]]:
    """Batches of images in the order of `sources`.

    Args:
        sources: Where the images are.
        preprocessing: How they are brought to their size.
        batch_size: Images in a batch.
        workers: Processes that read, each up to two batches ahead; with 0 a batch is read when it is asked for.
    """
    images = _Images(sources, preprocessing)
    yield from DataLoader(
        images, batch_size, num_workers=workers, collate_fn=list, worker_init_fn=end_with_parent
    )
