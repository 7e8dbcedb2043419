"""The lines of a packed batch of road-train in the form for a peer in PyTorch: one per row, padded."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from road_jax.train import _data


def lines_of(element: Any, examples: Sequence[_data.Example]) -> list[_data.Example]:
    """Returns the lines in an element of `road_jax.train._data.packed`, each once."""
    return [examples[i] for i in np.unique(element["example"][element["input_ids_segment_ids"] > 0])]


def pad(examples: Sequence[_data.Example], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Returns ``input_ids``, ``attention_mask`` and ``labels``, each int64 ``[lines, longest]``, padded on the right.

    Labels are -100 where there is no target; transformers leaves those out of the loss.
    """
    longest = max(len(example.input_ids) for example in examples)
    ids, mask, labels = (np.full((len(examples), longest), fill, np.int64) for fill in (0, 0, -100))
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        ids[row, :n], mask[row, :n] = example.input_ids, 1
        labels[row, :n] = np.where(example.is_target == 1, example.input_ids, -100)
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
