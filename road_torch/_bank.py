"""The coefficients of all adapters of one layer, as two tables."""

import torch
from torch import Tensor

from road_torch._kernels import default

# What a row of a batch that wants no adapter calls itself, as in PEFT.
BASE = "__base__"


class Bank:
    """Coefficients ``first`` and ``cross`` (see `road_torch._kernels.default`), each float32 ``[capacity, out]``.

    A row an adapter, the same in every layer of a model, so that one index gathers for all of them. Row 0, and that of
    an adapter which this layer doesn't have, is the identity. Tables grow by doubling: adding the n-th adapter doesn't
    copy the n - 1 before it.
    """

    def __init__(self, out: int, device: torch.device) -> None:
        self._written: dict[int, tuple[Tensor, int, Tensor, int]] = {}
        # Tensors made in inference mode could not be used in training later.
        with torch.inference_mode(False):
            self.first = torch.ones(2, out, device=device)
            self.cross = torch.zeros(2, out, device=device)

    def update(self, row: int, theta: Tensor, alpha: Tensor, variant: str, group_size: int) -> None:
        """Forms a row again if θ or α were replaced or written to since the last time."""
        old = self._written.get(row)
        now = (theta, theta._version, alpha, alpha._version)
        if old and old[0] is theta and old[2] is alpha and old[1::2] == now[1::2]:
            return
        self.reserve(row)
        with torch.inference_mode(False), torch.no_grad():
            self.first[row], self.cross[row] = default.coefficients(theta, alpha, variant, group_size)
        self._written[row] = now

    def clear(self, row: int) -> None:
        """Makes a row the identity again, for its adapter is gone."""
        if self._written.pop(row, None):
            with torch.inference_mode(False), torch.no_grad():
                self.first[row], self.cross[row] = 1.0, 0.0

    def reserve(self, row: int) -> None:
        """Grows the tables until they have this row."""
        with torch.inference_mode(False), torch.no_grad():
            while row >= len(self.first):
                self.first = torch.cat((self.first, torch.ones_like(self.first)))
                self.cross = torch.cat((self.cross, torch.zeros_like(self.cross)))
