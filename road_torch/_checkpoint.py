"""Gradient checkpointing in transformers: recomputation in a backward pass uses the adapters of its call."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from road_core import AdapterError
from road_torch._routing import LOCAL, routed

# New in torch 2.8; before that, users get torch's own error.
_saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)

# The attribute of transformers' modules with the function that computes a block and recomputes it in the backward pass.
_NAME = "_gradient_checkpointing_func"


class Checkpoint:
    """Wraps a module's checkpointing function, so that it works in mixed batches; other calls pass through.

    Args:
        function: the module's own function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a block through the module's own function."""
        again = LOCAL.again
        # torch.compile traces both passes within the call; nested in another checkpoint, the layers refuse.
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
    """True within a non-reentrant checkpoint whose recomputation won't be brought back into the call."""
    hooks = _saving_hooks(False)
    if hooks is None or getattr(hooks[0], "__module__", None) != torch.utils.checkpoint.__name__:
        return False
    return LOCAL.saving is None or hooks[0] is not LOCAL.saving[0]


def checkpointing(model: nn.Module) -> list[nn.Module]:
    """Returns the modules with gradient checkpointing, whose layers a backward pass may recompute."""
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]


def follow(model: nn.Module) -> bool:
    """Wraps checkpointing functions, so that recomputation uses the adapters of a mixed call.

    Returns:
        Whether any module has gradient checkpointing.

    Raises:
        AdapterError: a module in training has checkpointing, but not through transformers' function.
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
    """Gives modules their own checkpointing functions back."""
    for module in model.modules():
        if isinstance(function := module.__dict__.get(_NAME), Checkpoint):
            setattr(module, _NAME, function.function)
