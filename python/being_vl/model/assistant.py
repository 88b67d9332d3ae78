"""Asking a model about images."""

import json
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from being_vl.data.records import PLACEHOLDER, Turn
from being_vl.devices import find_device
from being_vl.errors import ConfigError, ModelError
from being_vl.images.decode import read_image
from being_vl.layout import VocabularyLayout, num_text_tokens
from being_vl.model.options import GenerateOptions
from being_vl.model.processor import BeingVLProcessor, ImageInput
from being_vl.model.weights import load_causal_lm
from being_vl.options import StrPath
from being_vl.quantizer.base import Quantizer


class Assistant:
    """A model that answers questions about images; `Assistant.load` makes one from a folder.

    Args:
        model: The expanded causal LM, in evaluation mode on its device.
        processor: Writes the prompts, as the training data was written.
        folder: The model's folder, for messages.
    """

    def __init__(self, model: Any, processor: BeingVLProcessor, folder: StrPath) -> None:
        self.model = model
        self.processor = processor
        self.builder = builder = processor.builder
        self.folder = Path(folder)
        tokenizer = builder.tokenizer
        eos_token_id = model.generation_config.eos_token_id
        stop_ids = {builder.chat.end_of_turn, tokenizer.eos_token_id}
        stop_ids |= set(eos_token_id if isinstance(eos_token_id, list) else [eos_token_id])
        self._stop_ids = sorted(stop_ids - {None})
        # The folder's own options of sampling are not used; here the caller decides.
        model.generation_config = GenerationConfig()
        # Ids from here on are images, or rows without a token.
        self._text_size = num_text_tokens(tokenizer)

    @classmethod
    def load(cls, folder: StrPath, device: str = "auto") -> Self:
        """Load the folder of an expanded or trained model.

        Args:
            folder: What `being-vl expand` wrote, or a stage of `being-vl train`.
            device: `auto`, a GPU where there is one; or such as `cpu` or `cuda`. On a CPU the model computes in
                float32, elsewhere in the dtype of its weights on disk.

        Raises:
            ModelError: if the folder is not one of an expanded model.
            VocabularyError, QuantizerError: if its vocabulary is damaged or does not belong to the model.
        """
        folder = Path(folder)
        layout = VocabularyLayout.load(folder)
        device = find_device(device)
        model = load_causal_lm(folder, "float32" if device == "cpu" else "auto")
        rows = model.get_input_embeddings().weight.shape[0]
        if rows != layout.rows:
            raise ModelError(f"{folder}: the model has {rows} rows, its layout {layout.rows}")
        return cls(model.to(device).eval(), BeingVLProcessor.from_pretrained(folder, device), folder)

    @property
    def quantizer(self) -> Quantizer:
        """The model's quantizer."""
        return self.processor.quantizer

    def answer(
        self,
        prompts: Sequence[str | Sequence[Turn]],
        images: Sequence[Sequence[ImageInput]],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        batch_size: int = 16,
    ) -> list[str]:
        """Answer questions about images.

        Args:
            prompts: Questions, or dialogues that end with one. Where a question holds no `<image>`, its images come
                in front.
            images: The images of each prompt, in order, their files, or their grids, made by the model's quantizer.
            max_new_tokens: Longest answer in tokens.
            temperature: 0 takes the likeliest token each time; above, tokens are drawn.
            top_p: Draw only from the likeliest tokens that together have this probability.
            seed: Seed of drawing; prompt i draws the same whatever the batch size. None draws differently each time.
            batch_size: Prompts that are answered together.

        Returns:
            One answer per prompt, stripped, without special tokens. Image ids are never generated.

        Raises:
            ConfigError: if the numbers of prompts and of image lists differ, or an option is out of range.
            RecordError: if a prompt has placeholders, but not as many as images, or an image is of another type.
            ImageError: if an image file cannot be read.
            GridError: if a grid has ids outside the codebook.
            ModelError: if a prompt and its answer may be longer than the model's positions.
        """
        if len(prompts) != len(images):
            raise ConfigError(f"{len(prompts)} prompts, but lists of images for {len(images)}")
        if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1 or batch_size < 1:
            raise ConfigError(
                f"temperature {temperature}, top_p {top_p}, max_new_tokens {max_new_tokens}, batch_size {batch_size}: "
                "expected at least 0, in (0, 1], at least 1, at least 1"
            )
        ids = self.processor.prompts(prompts, images)
        self._check_length(ids, max_new_tokens)
        if seed is None:
            seed = secrets.randbits(64)
        answers = [""] * len(ids)
        # Prompts of similar length together need little padding.
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            # A generator for each prompt, so that its answer does not depend on the batch.
            seeds = (
                [np.random.SeedSequence([seed, i]).generate_state(1)[0] for i in indices]
                if temperature
                else []
            )
            chooser = _TokenChooser(self._text_size, temperature, top_p, seeds, self.model.device)
            texts = self._generate([ids[index] for index in indices], max_new_tokens, chooser)
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text
        return answers

    def _check_length(self, ids: Sequence[NDArray[np.int64]], max_new_tokens: int) -> None:
        length = max(map(len, ids), default=0) + max_new_tokens
        positions = getattr(self.model.config, "max_position_embeddings", length)
        if length > positions:
            raise ModelError(
                f"{self.folder}: the longest prompt with max_new_tokens = {max_new_tokens} needs {length} "
                f"positions, the model has {positions}"
            )

    @torch.inference_mode()
    def _generate(
        self, ids: list[NDArray[np.int64]], max_new_tokens: int, processor: LogitsProcessor
    ) -> list[str]:
        batch = self.processor.pad(ids).to(self.model.device)
        output = self.model.generate(
            **batch,
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=self._stop_ids,
                pad_token_id=self.builder.pad_id,
            ),
            logits_processor=[processor],
        )
        texts = self.builder.tokenizer.batch_decode(
            output[:, batch.input_ids.shape[1] :], skip_special_tokens=True
        )
        return [text.strip() for text in texts]


class _TokenChooser(LogitsProcessor):  # type: ignore[misc]
    """Gives the likeliest or a drawn token the greatest score, never an image id.

    Drawing adds Gumbel noise, whose argmax is a draw from the softmax. Each row has a generator of its own, so that an
    answer does not depend on the other rows of its batch.
    """

    def __init__(
        self, text_size: int, temperature: float, top_p: float, seeds: Sequence[int], device: Any
    ) -> None:
        self.text_size = text_size
        self.temperature = temperature
        self.top_p = top_p
        self.generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        scores[:, self.text_size :] = -torch.inf
        if not self.generators:
            return scores
        scores = scores / self.temperature
        if self.top_p < 1:
            probabilities, tokens = scores.softmax(-1).sort(descending=True)
            # A token stays if the likelier ones together fall short of top_p; the likeliest always does.
            is_cut = probabilities.cumsum(-1) - probabilities >= self.top_p
            scores = scores.masked_fill(torch.zeros_like(is_cut).scatter(-1, tokens, is_cut), -torch.inf)
        noise = torch.stack(
            [torch.rand(scores.shape[1], generator=g, device=scores.device) for g in self.generators]
        )
        tiny = torch.finfo(noise.dtype).tiny
        return scores - torch.log(-torch.log(noise.clamp(min=tiny)))


def generate(options: GenerateOptions) -> Iterator[str]:
    """Ask a model's folder about image files, as `being-vl generate` does.

    Yields:
        The answer; of several questions, one JSON object (`images`, `prompt`, `answer`) each, images in the outer
        loop.

    Raises:
        ImageError: if an image is missing or cannot be read, before the model is loaded.
        ConfigError: if there is no prompt.
        ModelError and others: see `Assistant.load` and `Assistant.answer`.
    """
    if not options.prompt:
        raise ConfigError("no prompt; give at least one")
    # Questions about one image are asked about each, the others once about all images.
    images = {path: read_image(path) for path in options.image}
    questions = [
        ([path], prompt)
        for path in options.image or []
        for prompt in options.prompt
        if _is_about_one_image(prompt)
    ]
    questions += [([], prompt) for prompt in options.prompt if not options.image]
    questions += [
        (options.image, prompt)
        for prompt in options.prompt
        if options.image and not _is_about_one_image(prompt)
    ]
    assistant = Assistant.load(options.model, options.device)
    answers = assistant.answer(
        [prompt for _, prompt in questions],
        [[images[path] for path in paths] for paths, _ in questions],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    if len(answers) == 1:
        yield answers[0]
        return
    for (paths, prompt), answer in zip(questions, answers, strict=True):
        names = [str(path) for path in paths]
        yield json.dumps({"images": names, "prompt": prompt, "answer": answer}, ensure_ascii=False)


def _is_about_one_image(prompt: str) -> bool:
    return prompt.count(PLACEHOLDER) < 2
