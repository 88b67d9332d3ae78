"""The whole chain on one's own images and records: quantize, learn the vocabulary, expand, train."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

from being_vl.errors import ConfigError, RecordError
from being_vl.files import sha256, to_jsonable, write_json
from being_vl.fingerprints import compute_fingerprint
from being_vl.flags import Parser, add_flags
from being_vl.model.options import ExpandOptions
from being_vl.quantize.options import QuantizeOptions
from being_vl.quantize.training.options import QuantizerTrainOptions
from being_vl.recipes import find_recipe, read_recipe
from being_vl.tokenizer.options import VocabularyOptions
from being_vl.train.options import TrainOptions

log = logging.getLogger(__name__)
CHAMELEON = "zawnpn/being-vq-8k"
"""The papers' quantizer, of 8192 ids; a run can be planned before it is downloaded."""


@dataclass
class RunOptions:
    """Where the chain starts and ends; each step's own options stand in a section of its name.

    Args:
        images: Folder of images; records name them by their path in it.
        records: Files of records to train on.
        llm: Folder or hub name of the causal LM to expand.
        out: Folder for everything that the run makes.
        train_quantizer: Train a VQ-GAN on the images first, instead of taking `quantizer`.
        quantizer: Named as for `being-vl quantize`: `builtin`, a folder, a file or a hub name.
        ranks: Processes that train together; one per GPU by default, one on a CPU.
        until: The last step to do; `expand` leaves the training to `being-vl launch`.
    """

    images: Path
    records: list[Path]
    llm: str
    out: Path
    train_quantizer: bool = False
    quantizer: str = "builtin"
    ranks: int | None = None
    until: Literal["quantize", "vocab", "expand", "train"] = "train"


def recipe_parser() -> Parser:
    """The parser of a recipe: `RunOptions`, and a section for each step whose paths follow from them."""
    parser = Parser(description=run.__doc__)
    parser.add_argument("--recipe", action="config", help="YAML file of these options; flags override it.")
    add_flags(parser, RunOptions)
    parser.add_class_arguments(QuantizerTrainOptions, "quantizer_training")
    parser.add_class_arguments(QuantizeOptions, "quantize")
    parser.add_class_arguments(VocabularyOptions, "vocab")
    parser.add_class_arguments(ExpandOptions, "expand")
    parser.add_class_arguments(TrainOptions, "train")
    links: list[tuple[str | tuple[str, ...], str, Callable[..., Any] | None]] = [
        ("images", "quantizer_training.images", lambda images: [images]),
        ("out", "quantizer_training.out", lambda out: Path(out) / "quantizer"),
        ("images", "quantize.images", None),
        ("out", "quantize.out", lambda out: Path(out) / "grids"),
        (("train_quantizer", "quantizer", "out"), "quantize.quantizer", _quantizer),
        ("out", "vocab.grids", lambda out: [Path(out) / "grids"]),
        ("out", "vocab.out", lambda out: Path(out) / "vocabulary.json"),
        ("llm", "expand.llm", None),
        ("out", "expand.vocabulary", lambda out: Path(out) / "vocabulary.json"),
        ("out", "expand.out", lambda out: Path(out) / "expanded"),
        (("train_quantizer", "quantizer", "out"), "expand.quantizer", _quantizer),
        ("out", "train.model", lambda out: Path(out) / "expanded"),
        ("records", "train.records", None),
        ("out", "train.grids", lambda out: Path(out) / "grids"),
        ("out", "train.out", lambda out: Path(out) / "training"),
    ]
    for source, target, compute in links:
        parser.link_arguments(source, target, compute)
    return parser


def _quantizer(trained: bool, name: str, out: Path) -> str:
    return str(Path(out) / "quantizer") if trained else name


def training_of(recipe: Path, flags: list[str]) -> tuple[TrainOptions, list[str]]:
    """The training that a recipe describes, be it one of a training or of a run, and flags that override it.

    Args:
        recipe: Its file, or the name of a shipped one.
        flags: As on the command line.

    Returns:
        The options, and the flags with which `being-vl train` has the same. Where the recipe is one of a run, that is
        the file `options.json` in the training's folder, still to be written.

    Raises:
        ConfigError: if there is no such file, or it is no YAML of options.
    """
    path = find_recipe(recipe)
    if is_run(path):
        options = recipe_parser().instantiate(recipe_parser().parse_args(["--recipe", str(path), *flags]))
        return options.train, ["--recipe", str(options.train.out / "options.json")]
    parser = Parser(prog="being-vl train")
    parser.add_argument("--recipe", action="config")
    add_flags(parser, TrainOptions)
    arguments = ["--recipe", str(path), *flags]
    values = vars(parser.instantiate(parser.parse_args(arguments)))
    values.pop("recipe")
    return TrainOptions(**values), arguments


def model_of(recipe: Path, flags: list[str]) -> tuple[str, int | None]:
    """The model that a recipe trains, or if it is still to be expanded the LLM, and the rows that expanding adds.

    Args:
        recipe: Its file, or the name of a shipped one.
        flags: As on the command line.
    """
    path = find_recipe(recipe)
    if not is_run(path):
        return str(training_of(recipe, flags)[0].model), None
    options = recipe_parser().instantiate(recipe_parser().parse_args(["--recipe", str(path), *flags]))
    if (options.train.model / "config.json").is_file():
        return str(options.train.model), None
    if options.train_quantizer:
        codebook = options.quantizer_training.codebook.size
    elif options.quantizer.partition("@")[0] == CHAMELEON:
        codebook = 8192
    else:
        from being_vl.quantize.base import load_quantizer

        codebook = load_quantizer(options.quantizer).codebook_size
    return options.llm, 2 + codebook + options.vocab.num_merges


def is_run(recipe: Path) -> bool:
    """Whether a recipe's file is one of `being-vl run`.

    Raises:
        ConfigError: if it is no YAML of options.
    """
    return "llm" in read_recipe(recipe)


def run(config: Namespace) -> Path:
    """Quantize, learn the vocabulary, expand and train, up to `until`; steps that are finished are skipped.

    Args:
        config: What `recipe_parser()` parsed.

    Returns:
        The folder of the trained model, or what the last step made.

    Raises:
        ConfigError: if a finished step in `out` was made with other options or inputs.
        ImageError, RecordError, ModelError, QuantizerError: if the inputs are missing or do not fit together;
            before the first step.
    """
    from being_vl.launch.local import train_on_ranks
    from being_vl.model.expand import expand
    from being_vl.quantize.job import quantize
    from being_vl.quantize.training.trainer import train_quantizer

    options = recipe_parser().instantiate(config)
    _check(options)
    records = {str(path): sha256(Path(path)) for path in options.records}
    images = _listing(Path(options.images))
    steps = Steps(Path(options.out))
    if options.train_quantizer:
        steps.do("quantizer", train_quantizer, options.quantizer_training, images)
    train: TrainOptions = options.train
    to_do: dict[str, tuple[Callable[[Any], Any], Any, Any, Path]] = {
        "quantize": (quantize, options.quantize, images, options.quantize.out),
        "vocab": (_train_vocabulary, options.vocab, None, options.vocab.out),
        "expand": (expand, options.expand, None, options.expand.out),
        "train": (
            lambda o: train_on_ranks(o, options.ranks),
            train,
            records,
            train.out / train.stages[-1].name,
        ),
    }
    for name, (function, of_step, inputs, made) in to_do.items():  # noqa: B007
        steps.do(name, function, of_step, inputs)
        if name == options.until:
            break
    if name == "train":
        log.info("trained model: %s", made)
        log.info("ask it: being-vl generate --model %s --image FILE --prompt TEXT", made)
    else:
        log.info("%s is as far as asked for: %s", name, made)
    return made


def _train_vocabulary(options: VocabularyOptions) -> None:
    from being_vl.tokenizer.train import train_vocabulary

    train_vocabulary(options)


def _check(options: Namespace) -> None:
    """Find what would stop a later step, before the first one starts."""
    from being_vl.data.records import Records
    from being_vl.images.sources import find_images
    from being_vl.model.expand import check_llm
    from being_vl.quantize.base import load_quantizer

    folder, train = Path(options.images), options.train
    if not folder.is_dir():
        raise ConfigError(f"images: there is no folder {folder}")
    known = {source.key for source in find_images(folder)}
    reading = train.sequences
    records = Records(options.records, reading.default_category, reading.categories, reading.images_in_front)
    bad = 0
    first: list[str] = []
    for record in () if train.lenient else records.read():
        if isinstance(record, RecordError):
            fault = str(record)
        elif lost := [image for image in record.images if image not in known]:
            fault = f"{record.where}: names the image {lost[0]!r}, which is not in {folder}"
        else:
            continue
        bad += 1
        first += [fault][: 3 - len(first)]
    if bad:
        raise RecordError(
            f"{bad} of {len(records)} records are bad, the first: {'; '.join(first)}; mend them, or set train.lenient"
        )
    check_llm(options.llm)
    if not options.train_quantizer:
        load_quantizer(options.quantizer)


class Steps:
    """Does each step of a run once.

    A finished step leaves `steps/<name>.json` in the run's folder: its options, a digest of them, of its inputs and of
    the step before, and the seconds it took.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out / "steps"
        self._before = ""

    def do(self, name: str, function: Callable[[Any], Any], options: Any, inputs: Any = None) -> None:
        """Call `function(options)`, unless the step is finished.

        Raises:
            ConfigError: if it is finished, but with other options or inputs.
        """
        path = self.folder / f"{name}.json"
        entry = {"options": to_jsonable(options)}
        entry["digest"] = compute_fingerprint([entry["options"], inputs, self._before])
        self._before = entry["digest"]
        if path.is_file():
            done = json.loads(path.read_text(encoding="utf-8"))
            if done["digest"] != entry["digest"]:
                changed = [k for k, v in entry["options"].items() if done["options"].get(k) != v]
                what = f"other options ({', '.join(changed)})" if changed else "other inputs"
                raise ConfigError(
                    f"step {name!r} in {self.folder.parent} was finished with {what}; "
                    f"choose another out folder, or delete {path} and what the step made to do it again"
                )
            log.info("%s: finished before, skipped", name)
            return
        log.info("%s: starting", name)
        started = time.perf_counter()
        function(options)
        entry["seconds"] = round(time.perf_counter() - started, 1)
        write_json(path, entry)
        log.info("%s: finished in %.1f s", name, entry["seconds"])


def _listing(folder: Path) -> str:
    """Digest of the names and sizes of the files in a folder."""
    return compute_fingerprint(
        sorted((str(f.relative_to(folder)), f.stat().st_size) for f in folder.rglob("*") if f.is_file())
    )
