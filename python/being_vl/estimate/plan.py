"""`being-vl plan`: what a training takes of each GPU, of the disk and of time."""

from pathlib import Path

from being_vl.estimate.estimate import estimate_stages, read_gpus, read_stages, row_length
from being_vl.estimate.options import PlanOptions
from being_vl.estimate.shapes import SHAPES, find_shape
from being_vl.estimate.table import describe_plan
from being_vl.recipes.recipe import ModelSource, Recipe


def plan(options: PlanOptions) -> str:
    """Plan a training.

    Args:
        options: Of the plan.

    Returns:
        The plan as text.

    Raises:
        ConfigError: if the options or the recipe are wrong.
        ModelError: if nothing says what the model is like.
        RecordError, ModelError, QuantizerError: if the records exist and have faults.
    """
    recipe = Recipe.find(options.recipe)
    training = recipe.training(options.overrides)
    gpus = read_gpus(options)
    name, new_rows = _find_model(options, recipe)
    shape = find_shape(name, new_rows)
    estimates = estimate_stages(options, training, shape, read_stages(options, training, gpus.number), gpus)
    title = (
        f"{name}, {shape.text_size:,} text rows and {shape.config.vocab_size - shape.text_size:,} new ones, on "
        f"{gpus.number} GPUs of {gpus.memory / 1e9:g} GB: ZeRO-{training.zero}, "
        f"{'fp32' if training.precision.dtype == 'fp32' else 'bf16'}, "
        f"{training.batches.micro_batch_size} rows of {row_length(training, shape):,} tokens"
    )
    return describe_plan(title, options, training, estimates, gpus)


def _find_model(options: PlanOptions, recipe: Recipe) -> ModelSource:
    """The model to plan with; of a shipped recipe whose LLM is still to be made, the shipped shape of its name."""
    model = recipe.model(options.overrides)
    name = options.shape or model.name
    shape = SHAPES / f"{recipe.path.stem}.json"
    is_made = (Path(name) / "config.json").is_file()
    if recipe.is_shipped and name == recipe.content.get("llm") and shape.is_file() and not is_made:
        name = recipe.name
    return ModelSource(name, model.new_rows if options.new_rows is None else options.new_rows)
