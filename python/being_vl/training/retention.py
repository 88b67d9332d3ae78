"""How much of its language a model keeps: its perplexity on a text."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from being_vl.errors import ConfigError
from being_vl.options import StrPath
from being_vl.training.log import TrainingLog
from being_vl.training.options import RetentionOptions

log = logging.getLogger(__name__)


class TextProbe:
    """Perplexity of the model in a DeepSpeed engine on a text, cut into windows that are shared out over the ranks.

    Args:
        text: File of UTF-8 text.
        tokenizer: The model's tokenizer; special tokens in the text stay text.
        window: Tokens of a window; the first of each has no loss.
        tolerance: Share by which a stage may raise the perplexity without a warning.

    Raises:
        ConfigError: if the file cannot be read, or has less than two tokens.
    """

    def __init__(self, text: StrPath, tokenizer: Any, window: int, tolerance: float) -> None:
        text = Path(text)
        self._path, self._tolerance = text, tolerance
        try:
            content = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"retention.text: {text} cannot be read as text: {error}") from error
        ids = tokenizer(content, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        windows = [ids[start : start + window] for start in range(0, len(ids), window)]
        self._windows = [torch.tensor([ids]) for ids in windows if len(ids) > 1]
        if not self._windows:
            raise ConfigError(f"retention.text: {text} holds {len(ids)} tokens; expected some text")

    @classmethod
    def from_model(cls, model: StrPath, options: RetentionOptions, max_length: int) -> "TextProbe | None":
        """The probe that the options ask for, for a model in a folder; windows are as long as its sequences."""
        from transformers import AutoConfig, AutoTokenizer

        if options.text is None:
            return None
        config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
        window = min(max_length, getattr(config, "max_position_embeddings", max_length))
        return cls(options.text, tokenizer, window, options.tolerance)

    def measure(self, engine: Any, logger: TrainingLog, step: int) -> None:
        """Log the perplexity after a stage's last step, or its step 0, and warn if the stage has raised it."""
        perplexity_before, perplexity = logger.text_perplexity, self.perplexity(engine)
        logger.add_perplexity(step, perplexity)
        if (
            step
            and perplexity_before
            and perplexity > perplexity_before * (1 + self._tolerance)
            and dist.get_rank() == 0
        ):
            log.warning(
                "%s: the perplexity of %s rose from %.4g to %.4g, more than %.0f %%: the model is losing its language",
                *(logger.stage, self._path, perplexity_before, perplexity, 100 * self._tolerance),
            )

    def perplexity(self, engine: Any) -> float:
        """To be called on all ranks; leaves the engine training."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        # Sum of the losses, and their number.
        sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
        engine.eval()
        with torch.no_grad():
            for turn in range(math.ceil(len(self._windows) / ranks)):
                number = turn * ranks + rank
                # Under ZeRO 3 all ranks must run the model equally often, so some may run the first window again.
                ids = self._windows[number if number < len(self._windows) else 0].to(engine.device)
                losses = engine(input_ids=ids, labels=ids)
                if number < len(self._windows):
                    sums += torch.stack([losses.double().sum(), losses.new_tensor(len(losses)).double()])
        engine.train()
        dist.all_reduce(sums)
        return math.exp((sums[0] / sums[1]).item())
