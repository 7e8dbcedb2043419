"""Implementations of the rotation, one per file, all with the same signatures."""

import functools
import importlib.util
import os
import warnings
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
        prepare_: takes the arguments of ``rotate_`` but the first, and returns a function of that one, which must then
            always be on the same device and of the same dtype.
        gathers: whether it is faster with whole tables and an index than with rows that were gathered beforehand.
    """

    rotate: Callable[..., Tensor]
    rotate_: Callable[..., Tensor]
    prepare_: Callable[..., Callable[[Tensor], Tensor]]
    gathers: bool


def _prepare_default_(
    first: Tensor, cross: Tensor, group_size: int, index: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    return functools.partial(default.rotate_, first=first, cross=cross, group_size=group_size, index=index)


DEFAULT = Kernel(default.rotate, default.rotate_, _prepare_default_, gathers=False)

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
    """Returns the implementation of this name.

    ``"auto"`` is Triton on a GPU if it is installed and works there, else plain PyTorch.

    Raises:
        AdapterError: the device can't run the implementation.
    """
    if name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise AdapterError("kernel: expected a model on a GPU for the kernel 'triton', found it on the CPU")
    if name == "triton" or (name == "auto" and device.type == "cuda" and _has_triton()):
        if device.type == "cpu" or not (fault := _fault(device)):
            return _triton()
        message = f"kernel: expected that Triton can launch a kernel on {device}, found {fault}"
        if name == "triton":
            raise AdapterError(message)
        _warn(f"{message}; kernel='auto' is plain PyTorch there")
    return DEFAULT


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _triton() -> Kernel:
    # Imported here because it takes a moment and isn't always installed.
    from road_torch._kernels import triton

    return Kernel(triton.rotate, triton.rotate_, triton.prepare_, gathers=True)


@functools.cache
def _fault(device: torch.device) -> str:
    """Launches the kernel once; returns why that failed, or nothing. Triton needs a C compiler and Python's headers."""
    try:
        from road_torch._kernels import triton

        triton.launch_once(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Triton has no class of its own for all that it may lack, and some of its messages are long.
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return ""


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
