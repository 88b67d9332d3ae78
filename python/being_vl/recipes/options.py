"""Options of `being-vl run`; importable without torch."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from being_vl.data.options import RecordFile
from being_vl.model.options import ExpandOptions
from being_vl.options import MAY_CHANGE, Options, check_minimum
from being_vl.quantizer.options import QuantizeOptions
from being_vl.quantizer.training.options import QuantizerTrainOptions
from being_vl.schema import FALLBACKS, LINKS
from being_vl.tokenizer.options import VocabularyOptions
from being_vl.training.options import TrainOptions


def _quantizer(run: Any) -> str:
    """The quantizer of a run: the one that it trains, or the one that it names."""
    return str(run.out / "quantizer") if run.train_quantizer else run.quantizer


def _section(**links: Any) -> dict[str, Any]:
    """Metadata of a field with the options of one step; those in `links` follow from the run's own."""
    return {LINKS: links, FALLBACKS: ("seed", "device", "max_steps", "overwrite")}


@dataclass(kw_only=True)
class RunOptions(Options):
    """Where the chain starts and ends; each step's own options stand in a section of its name.

    Args:
        images: Folder of images; records name them by their path in it.
        records: Files of records to train on; with `{path: FILE, category: NAME}` the category of the file's records
            that name none.
        llm: Folder or hub name of the causal LM to expand.
        out: Folder for everything that the run makes.
        train_quantizer: Train a VQ-GAN on the images first, instead of taking `quantizer`.
        quantizer: Named as for `being-vl quantize`: `builtin`, a folder, a file or a hub name.
        ranks: Processes that train the quantizer, quantize and train together; one per GPU by default, one on a CPU.
        seed: Seed of all steps whose section gives none.
        device: Where all steps run: `auto` is all GPUs where there are some; `cpu`, or `cuda:1` for one GPU alone.
        max_steps: Largest number of optimizer steps of each stage, and of training a quantizer, for a trial.
        until: The last step to do; `expand` leaves the training to `being-vl launch`.
        overwrite: Do steps again that were finished with other options or inputs, in place of refusing them.
        quantizer_training: Options of training the quantizer.
        quantize: Options of turning images into grids.
        vocab: Options of learning the vocabulary.
        expand: Options of expanding the LLM.
        train: Options of the training.
    """

    images: Path
    records: list[RecordFile]
    llm: str
    out: Path
    train_quantizer: bool = False
    quantizer: str = "builtin"
    ranks: int | None = field(default=None, metadata=MAY_CHANGE)
    seed: int | None = None
    device: str = field(default="auto", metadata=MAY_CHANGE)
    max_steps: int | None = None
    until: Literal["quantize", "vocab", "expand", "train"] = field(default="train", metadata=MAY_CHANGE)
    overwrite: bool = field(default=False, metadata=MAY_CHANGE)
    quantizer_training: QuantizerTrainOptions = field(
        metadata=_section(images=lambda run: [run.images], out=lambda run: run.out / "quantizer")
    )
    quantize: QuantizeOptions = field(
        metadata=_section(
            images=lambda run: run.images, out=lambda run: run.out / "grids", quantizer=_quantizer
        )
    )
    vocab: VocabularyOptions = field(
        metadata=_section(grids=lambda run: [run.out / "grids"], out=lambda run: run.out / "vocabulary.json")
    )
    expand: ExpandOptions = field(
        metadata=_section(
            llm=lambda run: run.llm,
            vocabulary=lambda run: run.out / "vocabulary.json",
            out=lambda run: run.out / "expanded",
            quantizer=_quantizer,
        )
    )
    train: TrainOptions = field(
        metadata=_section(
            model=lambda run: run.out / "expanded",
            records=lambda run: run.records,
            grids=lambda run: [run.out / "grids"],
            out=lambda run: run.out / "training",
        )
    )

    def __post_init__(self) -> None:
        """Check the values, and cap the steps."""
        super().__post_init__()
        check_minimum("ranks", self.ranks, 1)
        check_minimum("max_steps", self.max_steps, 1)
        if self.max_steps is not None:
            steps = min(self.quantizer_training.steps, self.max_steps)
            self.quantizer_training = replace(self.quantizer_training, steps=steps)
