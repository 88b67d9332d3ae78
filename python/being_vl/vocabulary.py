"""The step that learns a visual BPE vocabulary from a folder of grids."""

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from being_vl.errors import ConfigError, GridError
from being_vl.tokenizer import VisualBPE

log = logging.getLogger(__name__)


@dataclass
class VocabOptions:
    """Options of `being-vl vocab train`.

    Args:
        grids: Folder that `being-vl quantize` wrote, or a .npy or .npz file with an integer array (N, H, W).
        out: The vocabulary file (JSON).
        num_merges: Rules to learn; fewer are learned when no candidate is left.
        merge_mode: `pair` merges a pair at every offset (the paper); `oriented` at one, and encodes losslessly.
        alpha: Weight of spatial consistency in P = F + alpha·S.
        sigma: Width of the Gaussian kernel of S, in cells.
        min_frequency: A pair that is adjacent less often is no candidate.
        base_vocab_size: Codebook size; needed for .npy and .npz, known for a folder of grids.
        num_threads: Threads; all cores by default. The result does not depend on it.
    """

    grids: Path
    out: Path
    num_merges: int = 8192
    merge_mode: Literal["pair", "oriented"] = "pair"
    alpha: float = 0.3
    sigma: float = 1.0
    min_frequency: int = 2
    base_vocab_size: int | None = None
    num_threads: int | None = None


def train_vocabulary(options: VocabOptions) -> VisualBPE:
    """Learn the vocabulary, write it to `options.out` and say how much shorter the sequences became.

    Raises:
        GridError, ManifestError, ConfigError: if the grids cannot be read or do not fit the options.
    """
    started = time.perf_counter()
    name = fingerprint = None
    size = options.base_vocab_size
    if options.grids.is_dir():
        from being_vl.quantize.grids import GridStore

        store = GridStore.open(options.grids)
        if size not in (None, store.codebook_size):
            raise ConfigError(
                f"{options.grids}: codebook size {store.codebook_size}, but base_vocab_size {size}"
            )
        size, name, fingerprint = store.codebook_size, store.quantizer_name, store.quantizer_fingerprint
        grids = [store[key] for key in store]
    else:
        grids = _read_array(options.grids)
        if size is None:
            raise ConfigError(f"{options.grids}: give base_vocab_size, the size of its codebook")
    with tqdm(total=options.num_merges, unit="merge", disable=not sys.stderr.isatty()) as bar:
        bpe = VisualBPE.train(
            grids,
            base_vocab_size=size,
            num_merges=options.num_merges,
            merge_mode=options.merge_mode,
            alpha=options.alpha,
            sigma=options.sigma,
            min_frequency=options.min_frequency,
            num_threads=options.num_threads,
            progress=lambda info: bar.update(info.done - bar.n),
            quantizer_name=name,
            quantizer_fingerprint=fingerprint,
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    bpe.save(options.out)
    cells = sum(grid.size for grid in grids)
    tokens = len(bpe.encode_batch(grids, num_threads=options.num_threads).values)
    log.info(
        "%s: %d merges from %d grids in %.1f s; %.1f tokens per grid instead of %.1f (%.1f %%)",
        options.out,
        len(bpe.merges),
        len(grids),
        time.perf_counter() - started,
        tokens / len(grids),
        cells / len(grids),
        100 * tokens / cells,
    )
    if len(bpe.merges) < options.num_merges:
        log.info("no pair is left that occurs %d times: fewer merges than asked", options.min_frequency)
    return bpe


def _read_array(path: Path) -> list[np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
        array = loaded["grids"] if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
    except (OSError, ValueError, KeyError) as error:
        raise GridError(
            f"{path}: expected a folder of grids, or a .npy or .npz (key 'grids') file: {error}"
        ) from None
    if array.ndim != 3 or not len(array):
        raise GridError(f"{path}: expected an array (N, H, W) of at least one grid, got shape {array.shape}")
    return list(array)
