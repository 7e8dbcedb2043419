"""LoReFT, a baseline: a low-rank edit of the hidden state after every decoder layer, at some positions of the prompt.

The edit is ``h + Rᵀ(W h + b − R h)``, where R ``[rank, hidden]`` has orthonormal rows (Wu et al., arXiv 2404.03592,
equation 2). For composition each edit is confined to some of the rows, as in the paper's section on compositional
subspaces. All rows must be trained at once, so that they stay orthogonal to each other.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Edit(nn.Module):
    """The edit of one layer."""

    def __init__(self, hidden: int, rank: int) -> None:
        super().__init__()
        rotate = nn.Linear(hidden, rank, bias=False)
        nn.init.orthogonal_(rotate.weight)
        self.rotate = nn.utils.parametrizations.orthogonal(rotate)
        self.source = nn.Linear(hidden, rank)

    def forward(self, h: Tensor, rows: slice) -> Tensor:
        """Edits hidden states ``[positions, hidden]`` in the subspace spanned by these rows."""
        basis = self.rotate.weight[rows]
        wanted = nn.functional.linear(h, self.source.weight[rows], self.source.bias[rows])
        return h + (wanted - h @ basis.T) @ basis


class LoReFT(nn.Module):
    """A transformers decoder with an edit after each of its layers.

    Attributes:
        rows: the rows of every basis that the next call uses.
    """

    def __init__(self, model: Any, rank: int, positions: int) -> None:
        """Freezes the model and hooks its layers.

        Args:
            model: the decoder; its layers are ``model.model.layers``.
            rank: number of rows of each basis.
            positions: how many tokens are edited at the start of each prompt, and as many at its end.
        """
        super().__init__()
        self.model = model.requires_grad_(False)
        self.positions = positions
        self.rows = slice(0, rank)
        self.edits = nn.ModuleList(Edit(model.config.hidden_size, rank) for _ in model.model.layers)
        self._where: Tensor | None = None
        for layer, edit in zip(model.model.layers, self.edits, strict=True):
            layer.register_forward_hook(lambda _, __, out, edit=edit: self._edited(out, edit))

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss over labels that aren't -100; tokens before the first of them are the prompt."""
        answered = torch.cumsum(labels != -100, 1) > 0
        self._where = self._ends(attention_mask.bool() & ~answered)
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Generates from prompts that are padded on the left."""
        self._where = self._ends(attention_mask.bool())
        return self.model.generate(input_ids=input_ids, attention_mask=attention_mask, **options)

    def _ends(self, prompt: Tensor) -> Tensor:
        from_start = torch.cumsum(prompt, 1)
        from_end = from_start[:, -1:] - from_start
        return prompt & ((from_start <= self.positions) | (from_end < self.positions))

    def _edited(self, hidden: Tensor, edit: Edit) -> Tensor:
        # Tokens decoded after the prompt come in other shapes and aren't edited.
        if self._where is None or hidden.shape[:2] != self._where.shape:
            return hidden
        changed = hidden.clone()
        changed[self._where] = edit(hidden[self._where], self.rows)
        return changed
