"""`being-vl vocab train`: grids → a vocabulary and a report on it."""

import logging
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

from being_vl.errors import ConfigError, GridError
from being_vl.files import write_json
from being_vl.tokenizer import MergeInfo, VisualBPE
from being_vl.vocabulary.corpus import grids_of, held_out, open_source
from being_vl.vocabulary.options import VocabOptions
from being_vl.vocabulary.report import encoded, report, text_of

log = logging.getLogger(__name__)

LOG_SECONDS = 10
"""Time between two lines on the progress, where there is no terminal."""


def train_vocabulary(options: VocabOptions) -> VisualBPE:
    """Learn a vocabulary, write it to `options.out`, and a report on it beside it.

    Raises:
        GridError, ManifestError: if the grids cannot be read or hold anything but ids of the codebook.
        ConfigError: if grids and options do not fit together.
    """
    started = time.perf_counter()
    if options.out.is_dir():
        raise ConfigError(f"{options.out} is a folder; expected the name of a file")
    source = open_source(options.grids, options.base_vocab_size)
    everything = source.corpus.check(source.codebook_size)
    log.info("%d grids, %d ids", everything.grids, everything.cells)
    chosen = held_out(everything.grids, options.held_out, options.held_out_every, options.seed)
    learned_from = source.corpus.select(~chosen)
    grids = [grid for block in learned_from for grid in grids_of(block)]
    try:
        with Progress(options.num_merges) as progress:
            bpe = VisualBPE.train(
                grids,
                base_vocab_size=source.codebook_size,
                num_merges=options.num_merges,
                merge_mode=options.merge_mode,
                alpha=options.alpha,
                sigma=options.sigma,
                min_frequency=options.min_frequency,
                num_threads=options.num_threads,
                progress=progress,
                quantizer_name=source.quantizer_name,
                quantizer_fingerprint=source.quantizer_fingerprint,
            )
    except GridError as error:
        raise GridError(f"{', '.join(map(str, options.grids))}: {error}") from None
    bpe.save(options.out)
    seconds = time.perf_counter() - started
    training = encoded(bpe, learned_from, options.num_threads)
    measured = encoded(bpe, source.corpus.select(chosen), options.num_threads) if chosen.any() else None
    content = report(bpe, options, training, measured, seconds)
    path = options.out.with_name(options.out.stem + ".report.json")
    write_json(path, content)
    log.info("%s\nmore in %s", text_of(content), path)
    return bpe


class Progress:
    """Shows how training goes: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int) -> None:
        self._bar = tqdm(total=total, desc="vocab", unit="merge", disable=None)
        self._told = 0, time.perf_counter()

    def __call__(self, info: MergeInfo) -> None:
        """Take note of a merge just learned."""
        where = "" if info.dy is None else f" at ({info.dy}, {info.dx})"
        pair = f"({info.a}, {info.b}){where} N={info.n} S={info.s:.3f}"
        if not self._bar.disable:
            self._bar.set_postfix_str(pair, refresh=False)
            self._bar.update(info.done - self._bar.n)
            return
        (done, then), now = self._told, time.perf_counter()
        if now - then >= LOG_SECONDS:
            rate = (info.done - done) / (now - then)
            log.info("merge %d of %d, %.0f per second: %s", info.done, info.total, rate, pair)
            self._told = info.done, now

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
