"""How fast `being-vl quantize` is, and whether the network waits for images.

    python -m benchmarks.quantize [--images FOLDER] [--quantizer NAME] [--device cuda] [--workers 0 1 2 4] [--count 256]
    python -m benchmarks.quantize --quantizer zawnpn/being-vq-8k:bfloat16 --compile --device cuda --count 4096

Without --images, JPEGs of 640×480 pixels are made of the photographs of the demo. Per number of workers it prints
images per second, how many times that of the first number it is, and the shares of the time in which the network
encodes and waits for images. Starting the workers counts as well, so take enough images.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from being_vl.demo import shapesworld
from being_vl.devices import find_device
from being_vl.images.sources import find_images
from being_vl.quantizer.base import load_quantizer
from being_vl.quantizer.job import encode_batches
from being_vl.quantizer.loading import load_images


def make_images(folder, count):
    """Crops of photographs, of half their sides to all of them, as JPEGs of 640×480."""
    paths = sorted((Path(shapesworld.__file__).parent / "photographs").glob("*.jpg"))
    photographs = [Image.open(path).convert("RGB") for path in paths]
    rng = np.random.default_rng(0)
    for n in range(count):
        photograph = photographs[n % len(photographs)]
        width, height = (int(side * rng.uniform(0.5, 1)) for side in photograph.size)
        left = int(rng.integers(photograph.width - width + 1))
        top = int(rng.integers(photograph.height - height + 1))
        crop = photograph.crop((left, top, left + width, top + height))
        crop.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{n:06d}.jpg", quality=90)


def measure(sources, quantizer, device, batch_size, workers):
    """Images per second, and the share of the time spent encoding."""
    encoding_times, start = [], time.perf_counter()
    batches = load_images(sources, quantizer.preprocessing, batch_size, workers)
    for _ in encode_batches(batches, quantizer, device, encoding_times):
        pass
    seconds = time.perf_counter() - start
    return len(sources) / seconds, sum(encoding_times) / seconds


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path)
    parser.add_argument("--quantizer", default="builtin@256")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    device = find_device(options.device)
    quantizer = load_quantizer(options.quantizer, device)
    if options.compile:
        quantizer.compile()
    with tempfile.TemporaryDirectory() as folder:
        if options.images is None:
            make_images(Path(folder), options.count)
        sources = find_images(options.images or folder).sources[: options.count]
        # First calls are slow.
        measure(sources[: options.batch_size], quantizer, device, options.batch_size, 0)
        print("| workers | images/s | × | encoding | waiting |\n|---|---|---|---|---|")
        first_speed = 0.0
        for workers in options.workers:
            speed, share = measure(sources, quantizer, device, options.batch_size, workers)
            first_speed = first_speed or speed
            print(
                f"| {workers} | {speed:.1f} | {speed / first_speed:.2f} | {share:.0%} | {1 - share:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
