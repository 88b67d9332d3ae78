"""`being-vl vocab train`: grids → a vocabulary and a report on it."""

import logging
import time
from collections import Counter
from typing import Any

from being_vl.account import Account
from being_vl.errors import GridError
from being_vl.files import write_json
from being_vl.options import fixed_options
from being_vl.outputs import free_locks
from being_vl.progress import progress_bar, show_log_lines
from being_vl.tokenizer.corpus import (
    Corpus,
    CorpusSummary,
    GridSource,
    choose_held_out,
    describe_sizes,
    open_grids,
)
from being_vl.tokenizer.options import VocabularyOptions
from being_vl.tokenizer.output import VocabularyOutput, check_vocabulary_output
from being_vl.tokenizer.report import EncodingStats, build_report, format_report, measure_encoding
from being_vl.tokenizer.visual_bpe import MergeInfo, VisualBPE

log = logging.getLogger(__name__)

LOG_SECONDS = 10
"""Time between two lines on the progress, where there is no terminal."""


@show_log_lines()
@free_locks()
def train_vocabulary(options: VocabularyOptions) -> VisualBPE:
    """Learn a vocabulary (Algorithm 1 of Being-VL-0.5), write it to `options.out`, and a report on it beside it.

    A training that was stopped goes on when it is started again with the same options, to the same file byte for byte;
    a finished vocabulary is kept.

    Raises:
        GridError, ManifestError: if the grids cannot be read or hold anything but ids of the codebook.
        ConfigError, QuantizerError: if grids and options, or grids of several folders, do not fit together.
        FingerprintError: if `options.out` holds a vocabulary of other grids or options, unless `options.overwrite`.
        OutputError: if it is anything else, or another process is writing it.
    """
    start = time.perf_counter()
    check_vocabulary_output(options.out, options.grids)

    # Read the grids once: check their ids and take their fingerprint.
    source = open_grids(options.grids, options.codebook_size)
    summary = source.corpus.summarize(source.codebook_size)
    log.info("grids: %s; %d cells", describe_sizes(summary.sizes), summary.cells)
    held_out = choose_held_out(summary.grids, options.held_out, options.held_out_every, options.seed)

    # Keep what an earlier call has finished, or go on from where it was stopped.
    output = VocabularyOutput(options.out, _fingerprint_fields(options, source, summary), options.overwrite)
    bpe = output.load_finished()
    if bpe is not None:
        return bpe
    training_grids = source.corpus.select(~held_out)
    bpe, training_stats = _learn(options, source, training_grids, output)

    # Measure on grids that were not learned from, and write the vocabulary last.
    held_out_stats = None
    if held_out.any():
        held_out_stats = measure_encoding(bpe, source.corpus.select(held_out), options.num_threads)
    training_stats = training_stats or measure_encoding(bpe, training_grids, options.num_threads)
    content = build_report(bpe, options, training_stats, held_out_stats, time.perf_counter() - start)
    account = Account("grids", int((~held_out).sum()), Counter({"held out": int(held_out.sum())}))
    write_json(output.report_path, content | {"account": account.to_json()})
    output.save(bpe)
    log.info("%s\nmore in %s", format_report(content), output.report_path)
    log.info(account.describe())
    return bpe


def _learn(
    options: VocabularyOptions, source: GridSource, grids: Corpus, output: VocabularyOutput
) -> tuple[VisualBPE, EncodingStats | None]:
    """The vocabulary, and the lengths of the grids as training has counted them; None if no merge was to learn."""
    partial_bpe = output.load_partial()
    num_done = partial_bpe.num_merges if partial_bpe else 0
    try:
        with progress_bar(options.num_merges, "merge", "vocab", num_done) as bar:
            progress = MergeProgress(bar)
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
                resume=partial_bpe,
                checkpoint=output.save_partial,
                checkpoint_every=options.checkpoint_every,
                quantizer_name=source.quantizer_name,
                quantizer_fingerprint=source.quantizer_fingerprint,
            )
    except GridError as error:
        raise GridError(f"{', '.join(map(str, options.grids))}: {error}") from None
    except KeyboardInterrupt:
        if output.partial_path.exists():
            log.info(
                "%s: the %d merges learned so far, a vocabulary of its own; the same command goes on from there",
                output.partial_path,
                VisualBPE.load(output.partial_path).num_merges,
            )
        raise
    return bpe, progress.training_stats(bpe.num_grids)


class MergeProgress:
    """Shows how training goes: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._logged_merges, self._logged_seconds = bar.n, 0.0
        self._lengths: tuple[int, int] | None = None

    def __call__(self, info: MergeInfo) -> None:
        """Take note of a merge just learned."""
        cells, tokens, elapsed = info.cells or 0, info.tokens or 0, info.elapsed or 0.0
        self._lengths = cells, tokens
        offset = "" if info.dy is None else f" at ({info.dy}, {info.dx})"
        pair = f"({info.a}, {info.b}){offset} N={info.n} S={info.s:.3f}, {tokens / cells:.1%} of the length"
        if not self._bar.disable:
            self._bar.set_postfix_str(pair, refresh=False)
            self._bar.update(info.done - self._bar.n)
        elif elapsed - self._logged_seconds >= LOG_SECONDS:
            rate = (info.done - self._logged_merges) / (elapsed - self._logged_seconds)
            log.info("merge %d of %d, %.0f per second: %s", info.done, info.total, rate, pair)
            self._logged_merges, self._logged_seconds = info.done, elapsed

    def training_stats(self, grids: int) -> EncodingStats | None:
        """Lengths of the grids after the last merge; None if no merge was learned."""
        return EncodingStats(grids, *self._lengths) if self._lengths else None


def _fingerprint_fields(
    options: VocabularyOptions, source: GridSource, summary: CorpusSummary
) -> dict[str, Any]:
    """What a vocabulary follows from; of the grids their content, wherever they lie."""
    return fixed_options(options) | {
        "codebook_size": source.codebook_size,
        "quantizer": source.quantizer_fingerprint,
        "grids": summary.grids,
        "cells": summary.cells,
        "ids_sha256": summary.fingerprint,
    }
