"""Implementations of the rotation, one file each, all with the same signatures."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from road_core import AdapterError
from road_torch._kernels import default


class Kernel(NamedTuple):
    """An implementation; see `road_torch._kernels.default` for the arguments.

    Attributes:
        rotate: gives a new tensor.
        rotate_: overwrites its first argument.
        gathers: whether a call is best given whole tables and an index, not the rows that were gathered before.
    """

    rotate: Callable[..., Tensor]
    rotate_: Callable[..., Tensor]
    gathers: bool


DEFAULT = Kernel(default.rotate, default.rotate_, gathers=False)


NAMES = ("auto", "default")


def check(name: str) -> str:
    """Returns the name of an implementation.

    Raises:
        AdapterError: there is none of this name.
    """
    if name not in NAMES:
        raise AdapterError(f"kernel: expected one of {', '.join(NAMES)}, found {name!r}")
    return name


def choose(name: str, device: torch.device) -> Kernel:
    """Returns the implementation of this name; ``"auto"`` is the device's own."""
    return DEFAULT
