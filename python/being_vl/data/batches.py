"""Examples of different lengths as one batch of tensors."""

from collections.abc import Sequence

import numpy as np
import torch

from being_vl.data.sequences import NO_LOSS, Example


def collate(examples: Sequence[Example], pad_id: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Pad examples on the right; `names` are those of the categories.

    Returns:
        `input_ids` (pads are `pad_id`), `attention_mask` (pads are 0) and `labels` (pads are -100), int64, and
        `weights` of the labels (pads are 0), float32, and `categories`, int64, each token's place in `names`;
        each a tensor of shape (len(examples), length of the longest).
    """
    shape = len(examples), max(len(example.ids) for example in examples)
    ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, NO_LOSS, np.int64)
    mask = np.zeros(shape, np.int64)
    weights = np.zeros(shape, np.float32)
    categories = np.zeros(shape, np.int64)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = example.ids
        labels[row, :length] = example.labels
        mask[row, :length] = 1
        weights[row, :length] = example.weights
        categories[row] = names.index(example.category)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "weights": weights}
    batch["categories"] = categories
    return {name: torch.from_numpy(array) for name, array in batch.items()}
