"""`being-vl vocab train`: grids → a vocabulary and a report on it."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from being_vl.errors import CheckpointError, ConfigError, GridError
from being_vl.files import write_json
from being_vl.tokenizer import MergeInfo, VisualBPE
from being_vl.tokenizer.corpus import Census, Source, held_out, open_source
from being_vl.tokenizer.options import VocabOptions
from being_vl.tokenizer.report import Encoded, encoded, report, text_of

log = logging.getLogger(__name__)

LOG_SECONDS = 10
"""Time between two lines on the progress, where there is no terminal."""


def train_vocabulary(options: VocabOptions) -> VisualBPE:
    """Learn a vocabulary, write it to `options.out`, and a report on it beside it.

    Ctrl-C leaves what was learned so far in a checkpoint, from which `options.resume` goes on.

    Raises:
        GridError, ManifestError: if the grids cannot be read or hold anything but ids of the codebook.
        ConfigError: if grids and options do not fit together.
        CheckpointError: if there is a checkpoint that `options.resume` does not allow to go on from, or of another
            training.
    """
    started = time.perf_counter()
    if options.out.is_dir():
        raise ConfigError(f"{options.out} is a folder; expected the name of a file")
    source = open_source(options.grids, options.base_vocab_size)
    everything = source.corpus.check(source.codebook_size)
    log.info("%d grids, %d ids", everything.grids, everything.cells)
    chosen = held_out(everything.grids, options.held_out, options.held_out_every, options.seed)
    learned_from = source.corpus.select(~chosen)
    checkpoint = Checkpoint(options.out, _job(options, source, everything))
    before = checkpoint.load(options)
    done = before.num_merges if before else 0
    try:
        with tqdm(total=options.num_merges, initial=done, desc="vocab", unit="merge", disable=None) as bar:
            progress = Progress(bar)
            bpe = VisualBPE.train(
                learned_from,
                base_vocab_size=source.codebook_size,
                num_merges=options.num_merges,
                merge_mode=options.merge_mode,
                alpha=options.alpha,
                sigma=options.sigma,
                min_frequency=options.min_frequency,
                num_threads=options.num_threads,
                progress=progress,
                resume=before,
                checkpoint=checkpoint.save,
                checkpoint_every=options.checkpoint_every,
                quantizer_name=source.quantizer_name,
                quantizer_fingerprint=source.quantizer_fingerprint,
            )
    except GridError as error:
        raise GridError(f"{', '.join(map(str, options.grids))}: {error}") from None
    except KeyboardInterrupt:
        checkpoint.say_how_to_go_on()
        raise
    bpe.save(options.out)
    checkpoint.remove()
    seconds = time.perf_counter() - started
    training = progress.result(bpe.num_grids) or encoded(bpe, learned_from, options.num_threads)
    measured = encoded(bpe, source.corpus.select(chosen), options.num_threads) if chosen.any() else None
    content = report(bpe, options, training, measured, seconds)
    path = options.out.with_name(options.out.stem + ".report.json")
    write_json(path, content)
    log.info("%s\nmore in %s", text_of(content), path)
    return bpe


class Progress:
    """Shows how training goes: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, bar: "tqdm[Any]") -> None:
        self._bar = bar
        self._told = bar.n, 0.0
        self._lengths: tuple[int, int] | None = None

    def __call__(self, info: MergeInfo) -> None:
        """Take note of a merge just learned."""
        cells, tokens, elapsed = info.cells or 0, info.tokens or 0, info.elapsed or 0.0
        self._lengths = cells, tokens
        where = "" if info.dy is None else f" at ({info.dy}, {info.dx})"
        pair = f"({info.a}, {info.b}){where} N={info.n} S={info.s:.3f}, {tokens / cells:.1%} of the length"
        if not self._bar.disable:
            self._bar.set_postfix_str(pair, refresh=False)
            self._bar.update(info.done - self._bar.n)
            return
        done, then = self._told
        if elapsed - then >= LOG_SECONDS:
            rate = (info.done - done) / (elapsed - then)
            log.info("merge %d of %d, %.0f per second: %s", info.done, info.total, rate, pair)
            self._told = info.done, elapsed

    def result(self, grids: int) -> Encoded | None:
        """What became of the grids; unknown if no merge was left to learn."""
        return Encoded(grids, *self._lengths) if self._lengths else None


class Checkpoint:
    """What was learned so far, beside the file that the vocabulary will have.

    `NAME.partial.json` is a vocabulary like any other; `NAME.job.json` says what it was learned from and how.
    """

    def __init__(self, out: Path, job: dict[str, Any]) -> None:
        self.path = out.with_name(out.stem + ".partial.json")
        self._job = job
        self._job_path = out.with_name(out.stem + ".job.json")

    def load(self, options: VocabOptions) -> VisualBPE | None:
        """What to go on from, if there is anything.

        Raises:
            CheckpointError: a checkpoint of other grids or options, or one although `resume` was not asked for.
            VocabularyError: a damaged one.
        """
        if not self.path.exists():
            if options.resume:
                log.info("no checkpoint %s to go on from: starting with the first merge", self.path)
            return None
        if not options.resume:
            raise CheckpointError(
                f"{self.path} is what an interrupted training learned; --resume goes on from it, "
                "and without the file training starts from the beginning"
            )
        try:
            before = json.loads(self._job_path.read_text(encoding="utf-8"))
            changed = [
                f"{k} = {v}, now {self._job.get(k)}" for k, v in before.items() if v != self._job.get(k)
            ]
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self._job_path}: cannot be read ({error}), so it is not known what {self.path} was learned from"
            ) from None
        if changed:
            raise CheckpointError(f"{self.path} is of another training ({'; '.join(changed)})")
        bpe = VisualBPE.load(self.path)
        if bpe.num_merges > options.num_merges:
            raise CheckpointError(
                f"{self.path} has {bpe.num_merges} merges already, num_merges is {options.num_merges}; "
                "being-vl vocab truncate cuts it"
            )
        log.info("%s: going on after %d merges", self.path, bpe.num_merges)
        return bpe

    def save(self, bpe: VisualBPE) -> None:
        """Write both files, once there is something to keep."""
        if not bpe.num_merges:
            return
        try:
            self._write(bpe)
        except KeyboardInterrupt:  # in the middle of writing
            self._write(bpe)
            raise

    def _write(self, bpe: VisualBPE) -> None:
        write_json(self._job_path, self._job)
        bpe.save(self.path)

    def say_how_to_go_on(self) -> None:
        """After Ctrl-C."""
        if self.path.exists():
            log.info(
                "%s: the %d merges learned so far, a vocabulary as it is; the same command with --resume goes on",
                self.path,
                VisualBPE.load(self.path).num_merges,
            )

    def remove(self) -> None:
        """After the end."""
        self.path.unlink(missing_ok=True)
        self._job_path.unlink(missing_ok=True)


def _job(options: VocabOptions, source: Source, census: Census) -> dict[str, Any]:
    """What a vocabulary follows from, number of merges apart."""
    names = ("merge_mode", "alpha", "sigma", "min_frequency", "held_out", "held_out_every", "seed")
    return {
        "base_vocab_size": source.codebook_size,
        "quantizer": source.quantizer_fingerprint,
        "grids": census.grids,
        "ids": census.cells,
        "sha256 of the ids": census.fingerprint[:16],
    } | {name: getattr(options, name) for name in names}
