"""Adapters composed into one, in closed form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from road_core import AdapterError
from road_torch._kernels import default

# One adapter's part in a module: θ, α, variant.
Part = tuple[Tensor, Tensor, str]


def weigh(parts: Sequence[tuple[Part, float]], group_size: int, where: str, *, road_1: bool) -> Part:
    """Composes powers of rotations, ``R_n^w_n ⋯ R_1^w_1``: the first adapter is applied first.

    A pair of road_1 is a complex number, so powers of any real weight exist and commute:
    ``α = Π |α_i|^w_i`` and ``θ = Σ w_i (θ_i + π [α_i < 0])``. Angles count as they were trained, not modulo 2π: a
    weight of 0.5 goes half of the way that training went.

    Blocks of road_2 and road_4 are any 2×2 matrices. They don't commute and real powers need not exist, so weights must
    be whole; -1 is the inverse. The result is a road_2, which holds every such block.

    Args:
        parts: each adapter's θ and α with its weight.
        group_size: of all of them.
        where: the module, for errors.
        road_1: whether all adapters are road_1, in other modules too; an adapter has one variant everywhere.

    Returns:
        θ, α (float32) and the variant: ``"road_1"``, or ``"road_2"``.

    Raises:
        AdapterError: a weight that must be whole isn't, or a power doesn't exist.
    """
    if road_1:
        angle = torch.zeros_like(parts[0][0][0], dtype=torch.float64)
        scale = torch.ones_like(angle)
        for (theta, alpha, _), weight in parts:
            theta, alpha = theta.double(), alpha.double()
            angle += weight * (theta + torch.pi * (alpha < 0))
            scale *= alpha.abs() ** weight
        return (*_finite(angle, scale, where), "road_1")
    out = next(2 * len(t) if v == "road_1" else len(t) if v == "road_2" else len(t) // 2 for (t, _, v), _ in parts)
    first, cross = torch.ones(out, dtype=torch.float64), torch.zeros(out, dtype=torch.float64)
    for (theta, alpha, variant), weight in parts:
        if not float(weight).is_integer():
            raise AdapterError(
                f"add_weighted_adapter: expected whole weights where {variant} takes part, for the blocks of {where} "
                f"have no unique real powers, found {weight}"
            )
        step = default.coefficients(theta.double(), alpha.double(), variant, group_size)
        if weight < 0:
            step = default.inverse(*step, group_size)
        for _ in range(abs(round(weight))):
            first, cross = default.compose((first, cross), step, group_size)
    # cross carries a sign in the first half of a group; second = α sin θ doesn't.
    second = cross.view(-1, 2, group_size // 2) * torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    second = second.view(-1)
    return (*_finite(torch.atan2(second, first), torch.hypot(first, second), where), "road_2")


def _finite(theta: Tensor, alpha: Tensor, where: str) -> tuple[Tensor, Tensor]:
    theta, alpha = theta.float(), alpha.float()
    for value in (theta, alpha):
        if not torch.isfinite(value).all():
            wrong = int((~torch.isfinite(value)).sum())
            raise AdapterError(
                f"add_weighted_adapter: expected blocks of {where} that have these powers, found {wrong} values that "
                "are NaN or infinite (a block that is singular has no negative power)"
            )
    return theta, alpha
