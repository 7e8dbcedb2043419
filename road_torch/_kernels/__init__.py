"""Implementations of the rotation, one per file, all with the same signatures."""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from road_core import AdapterError
from road_torch._kernels import default


class Kernel(NamedTuple):
    """An implementation of the rotation; see `road_torch._kernels.default` for the arguments.

    Attributes:
        rotate: returns a new tensor.
        rotate_: overwrites its first argument.
        gathers: whether it is faster with whole tables and an index than with rows that were gathered beforehand.
    """

    rotate: Callable[..., Tensor]
    rotate_: Callable[..., Tensor]
    gathers: bool


DEFAULT = Kernel(default.rotate, default.rotate_, gathers=False)


NAMES = ("auto", "default", "triton")


def check(name: str) -> str:
    """Checks the name of an implementation and returns it.

    Raises:
        AdapterError: the name is unknown, or the implementation isn't installed.
    """
    if name not in NAMES:
        raise AdapterError(f"kernel: expected one of {', '.join(NAMES)}, found {name!r}")
    if name == "triton" and not _has_triton():
        raise AdapterError("kernel: expected the package triton for the kernel 'triton', found it isn't installed")
    return name


def choose(name: str, device: torch.device) -> Kernel:
    """Returns the implementation of this name; ``"auto"`` is Triton on a GPU, if installed, else plain PyTorch.

    Raises:
        AdapterError: the device can't run the implementation.
    """
    if name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise AdapterError("kernel: expected a model on a GPU for the kernel 'triton', found it on the CPU")
    if name == "triton" or (name == "auto" and device.type == "cuda" and _has_triton()):
        return _triton()
    return DEFAULT


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _triton() -> Kernel:
    # Imported here because it takes a moment and isn't always installed.
    from road_torch._kernels import triton

    return Kernel(triton.rotate, triton.rotate_, gathers=True)
