"""Reading, decoding and fitting images in worker processes, ahead of the network."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from being_vl.errors import ImageError
from being_vl.images.decode import decode_image
from being_vl.images.encoded import ImageSource, NoImageError
from being_vl.names import show_name
from being_vl.quantizer.preprocessing import Preprocessing
from being_vl.shards.ranks import end_with_parent

REASON_LENGTH = 500
"""Most characters of the reason why an image cannot be read."""
POINTER_HEAD = b"version https://git-lfs"

# Kinds of what is wrong with an image, as accounts count it.
NOT_READ = "cannot be read"
NOT_DECODED = "cannot be decoded"
NO_IMAGE = "row without an image"


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """An image as the network will see it, or why there is none.

    Args:
        key: Its name.
        pixels: (height, width, 3), uint8; None if it cannot be read.
        reason: Why it cannot; empty if it can.
        kind: Of the reason, in words that others share; empty if there is none.
        source_size: The image's own width and height, in pixels.
        sha256: Of the image file.
    """

    key: str
    pixels: NDArray[np.uint8] | None
    reason: str = ""
    kind: str = ""
    source_size: tuple[int, int] = (0, 0)
    sha256: str = ""


class _Images(Dataset[LoadedImage]):
    """Images by their numbers.

    Args:
        sources: Where they are.
        preprocessing: How they are brought to their size.
        places: Of each worker its process and the number of the image that it reads, shape (workers, 2), in shared
            memory: what is left of a worker that is killed.
    """

    def __init__(self, sources: Sequence[ImageSource], preprocessing: Preprocessing, places: Tensor) -> None:
        self.sources = sources
        self.preprocessing = preprocessing
        self.places = places

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> LoadedImage:
        if worker := get_worker_info():
            self.places[worker.id, 0], self.places[worker.id, 1] = os.getpid(), index
        return load_image(self.sources[index], self.preprocessing)


def load_image(source: ImageSource, preprocessing: Preprocessing) -> LoadedImage:
    """Read, decode and fit an image; whatever is wrong with it is the reason why there are no pixels."""
    kind = NOT_READ
    try:
        data = source.read()
        if data.startswith(POINTER_HEAD):
            raise ImageError("a Git LFS pointer; run git lfs pull")
        kind = NOT_DECODED
        image = decode_image(data, source.key)
        pixels = np.array(preprocessing.prepare(image))
    except NoImageError as error:
        return LoadedImage(source.key, None, str(error), NO_IMAGE)
    except OSError as error:
        detail = error.strerror or str(error)
    except MemoryError:
        detail = "not enough memory"
    except ImageError as error:
        detail = str(error)
    except Exception as error:  # of pyarrow, or of a name that no file can have
        detail = f"{type(error).__name__}: {error}"
    else:
        return LoadedImage(source.key, pixels, "", "", image.size, hashlib.sha256(data).hexdigest())
    name, detail = show_name(source.key), show_name(detail, REASON_LENGTH)
    reason = detail if detail.startswith(f"{name}: ") else f"{name}: {kind} ({detail})"
    return LoadedImage(source.key, None, reason, kind)


def load_images(
    sources: Sequence[ImageSource], preprocessing: Preprocessing, batch_size: int, workers: int
) -> Iterator[list[LoadedImage]]:
    """Batches of images in the order of `sources`.

    Args:
        sources: Where the images are.
        preprocessing: How they are brought to their size.
        batch_size: Images in a batch.
        workers: Processes that read, each up to two batches ahead; with 0 a batch is read when it is asked for.

    Raises:
        ImageError: if a process that reads is killed, such as for the memory that it takes; it names the image.
    """
    places = torch.zeros(max(workers, 1), 2, dtype=torch.int64).share_memory_()
    images = _Images(sources, preprocessing, places)
    loader = DataLoader(
        images, batch_size, num_workers=workers, collate_fn=list, worker_init_fn=end_with_parent
    )
    try:
        yield from loader
    except RuntimeError as error:
        # It has the numbers of the processes in its message alone.
        processes = {int(number) for number in re.findall(r"\d+", str(error))}
        keys = [show_name(sources[index].key) for process, index in places.tolist() if process in processes]
        if not keys:
            raise
        raise ImageError(
            f"{', '.join(keys)}: the process that read it has ended ({show_name(error)}); if it takes more memory than "
            "there is, use fewer workers, or leave the image out"
        ) from error
