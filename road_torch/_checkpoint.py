"""Gradient checkpointing as transformers does it: what a backward pass computes again follows the call it is of."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from road_core import AdapterError
from road_torch._routing import LOCAL, routed

# torch 2.8 brought it; before, torch's own error must do.
_saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)

# Where transformers' modules have the function that computes a block and, in the backward pass, computes it again.
_NAME = "_gradient_checkpointing_func"


class Checkpoint:
    """A module's checkpointing function, for mixed batches too; other calls pass through.

    Args:
        function: the module's own.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a block through the module's own function."""
        again = LOCAL.again
        # torch.compile traces both passes within the call; within another checkpointing the layers refuse.
        if again is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not in_another():
            block = functools.partial(_compute, block, again)
        return self.function(block, *args, **kwargs)


def _compute(block: Callable[..., Any], again: Callable[[], routed], /, *args: Any, **kwargs: Any) -> Any:
    if LOCAL.again is not again:
        # The call is over: this is a backward pass.
        with again():
            LOCAL.again = again
            return _compute(block, again, *args, **kwargs)
    before = LOCAL.saving, LOCAL.unrecorded
    LOCAL.saving, LOCAL.unrecorded = _saving_hooks(False), not torch.is_grad_enabled()
    try:
        return block(*args, **kwargs)
    finally:
        LOCAL.saving, LOCAL.unrecorded = before


def in_another() -> bool:
    """True in a checkpointing that isn't reentrant and that nobody brings back into the call."""
    hooks = _saving_hooks(False)
    if hooks is None or getattr(hooks[0], "__module__", None) != torch.utils.checkpoint.__name__:
        return False
    return LOCAL.saving is None or hooks[0] is not LOCAL.saving[0]


def checkpointing(model: nn.Module) -> list[nn.Module]:
    """The modules of which a backward pass may compute layers a second time."""
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]


def follow(model: nn.Module) -> bool:
    """Sees to it that checkpointing follows mixed batches.

    Returns:
        Whether there is any.

    Raises:
        AdapterError: a module has it in a way that transformers no longer has.
    """
    found = checkpointing(model)
    for module in found:
        function = getattr(module, _NAME, None)
        if function is None and module.training:
            raise AdapterError(
                "adapter_names: expected gradient checkpointing through transformers' "
                f"gradient_checkpointing_enable, found {type(module).__name__} with its own, which would compute "
                "layers a second time after the call"
            )
        if function is not None and not isinstance(function, Checkpoint):
            setattr(module, _NAME, Checkpoint(function))
    return bool(found)


def leave(model: nn.Module) -> None:
    """Gives modules their own functions back."""
    for module in model.modules():
        if isinstance(function := module.__dict__.get(_NAME), Checkpoint):
            setattr(module, _NAME, function.function)
