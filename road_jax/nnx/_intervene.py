"""`intervene`: RoAd on the outputs of whole blocks of an NNX model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from road_core import AdapterError, InterventionConfig, output_size, parameter_size
from road_jax._intervene import at_prompt, check_blocks, check_choice, hidden_states, parameters, prompt_of
from road_jax._transform import trace
from road_jax._tree import ROAD_LEAVES, Tree
from road_jax.nnx._wrap import (
    Around,
    CallInput,
    RoadLayer,
    RoadParam,
    Rotated,
    during_call,
    modules_of,
    refuse_tuples,
    rotate,
)


class RoadBlock(Rotated):
    """A block, or a stack of blocks, whose hidden states are rotated; made by `intervene`.

    Attributes:
        base: the block, which keeps its own Variables.
        road_theta: float32 ``[parameter_size]``, or ``[blocks, parameter_size]`` for a stack.
        road_alpha: of the same shape.
        config: which blocks `intervene` rotates, at which tokens, and how.
        start: the index of its first block.
        stack: the number of blocks in a stack; None for a single block.
        name: the block's path in the model.
        road_ids: the intervention of each row, while `apply` calls the model.
        road_chosen: bool ``[blocks]``: which blocks of a stack are rotated and trained, while the model is called.
        road_prompt: the prompt mask, while the model is called with one.
        road_call: what counts as the prompt, while the model is called: "mask", "all" or "none".
    """

    def __init__(
        self, base: nnx.Module, hidden: int, stack: int | None, *, config: InterventionConfig, start: int, name: str
    ) -> None:
        lead = () if stack is None else (stack,)
        shape = (*lead, parameter_size(config.variant, hidden))
        self.road_theta = RoadParam(jnp.zeros(shape, jnp.float32))
        self.road_alpha = RoadParam(jnp.ones(shape, jnp.float32))
        self.config = config
        self.start = start
        self.stack = stack
        self.name = name
        self.road_ids = nnx.data(None)
        self.road_chosen = nnx.data(None)
        self.road_prompt = nnx.data(None)
        self.road_call: str | None = None
        self.base = base

    @property
    def lead(self) -> tuple[int, ...]:
        return () if self.stack is None else (self.stack,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the block and rotates its hidden states at the chosen tokens; keeps their dtype."""
        result = self.base(*args, **kwargs)
        if self.road_call is None:
            raise AdapterError(f"{self.name}: expected a call of the model that intervene gave, found one of the block")
        hidden_states(self.name, result)
        prompt = 1 if self.road_call == "all" else None if self.road_prompt is None else self.road_prompt[...]
        return at_prompt(self.name, result, self._rotate, self.config, prompt)

    def _rotate(self, h: jax.Array) -> jax.Array:
        how = self.config
        theta, alpha = self.road_theta[...], self.road_alpha[...]
        if self.road_chosen is not None:
            theta, alpha = (jnp.where(self.road_chosen[...], leaf, i) for i, leaf in enumerate((theta, alpha)))
        return rotate(h, theta, alpha, self.road_ids, how.variant, how.group_size, how.subspace)

    def inputs(self, prompt: jax.Array | int | None) -> dict[str, Any]:
        """Returns the attributes that a call with this prompt needs; ``prompt`` is as returned by `prompt_of`."""
        if prompt is None or isinstance(prompt, int):
            values: dict[str, Any] = {"road_call": "none" if prompt is None else "all"}
        else:
            mask = jnp.asarray(prompt)
            values = {"road_call": "mask", "road_prompt": CallInput(jnp.broadcast_to(mask, (*self.lead, *mask.shape)))}
        if self.stack is not None:
            chosen = np.isin(self.start + np.arange(self.stack), self.config.layers)
            values["road_chosen"] = CallInput(jnp.asarray(chosen))
        return values


class Intervened(Around):
    """A model whose blocks' hidden states are rotated; made by `intervene`.

    Attributes:
        base: the model, with its chosen blocks inside of `RoadBlock`.
        config: which blocks, at which tokens, and how.
    """

    def __init__(self, base: nnx.Module, config: InterventionConfig) -> None:
        self.config = config
        self.base = base

    def __call__(self, *args: Any, prompt_mask: jax.Array | None = None, **kwargs: Any) -> Any:
        """Calls the model; ``prompt_mask`` is as for ``apply`` of `road_jax.intervene`."""
        prompt = prompt_of(self.base, prompt_mask, args, kwargs)
        blocks = [node for _, node in nnx.iter_graph(self.base) if isinstance(node, RoadBlock)]
        with during_call([(block, block.inputs(prompt)) for block in blocks]):
            return self.base(*args, **kwargs)


class _Probe(Around):
    """Reports what a block returns while the model is traced."""

    def __init__(self, base: nnx.Module, seen: Callable[[nnx.Module, Any], None]) -> None:
        self.seen = seen
        self.base = base

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.base(*args, **kwargs)
        self.seen(self.base, result)
        return result


def intervene(
    model: nnx.Module,
    config: InterventionConfig,
    *args: Any,
    blocks: type[nnx.Module] | Callable[[nnx.Module], bool],
    **kwargs: Any,
) -> Intervened:
    """Returns a model whose blocks' outputs are rotated at chosen tokens; the given model isn't changed.

    The counterpart of `road_jax.intervene`: θ and α are `RoadParam`, and the two models share the base's Variables.
    Blocks may be single ones or in stacks made by ``nnx.vmap`` and run by ``nnx.scan`` (stack axes first, θ and α
    scanned with the kernels); for blocks of a stack that aren't chosen, the gradient is exactly 0. `unwrap` returns the
    original model, `apply` runs several interventions in one batch. Paper: section 4.3.

    Args:
        model: any NNX module.
        config: which blocks, counted in the order in which they run, at which tokens, and how.
        *args: sample inputs of the model, which is only traced with them; only shapes and dtypes matter.
        blocks: the blocks' class, or a function that returns True for modules that are blocks. A block returns hidden
            states ``[batch, length, hidden]``, alone or first in a tuple.
        **kwargs: further sample inputs.

    Raises:
        AdapterError: the model isn't an NNX module, has no such blocks, or interventions already, or the group size
            doesn't divide the outputs.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import road_jax
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.Linear(64, 64, rngs=nnx.Rngs(1)))
        >>> config = road_jax.InterventionConfig(layers=[1], positions="last")
        >>> x = jnp.ones((2, 5, 64))
        >>> adapted = road_jax.nnx.intervene(model, config, x, blocks=nnx.Linear)
        >>> adapted(x, prompt_mask=jnp.ones((2, 5), jnp.int32)).shape
        (2, 5, 64)
        >>> road_jax.nnx.get_intervention(adapted)["layers"]["1"]["road_theta"].shape
        (32,)
    """
    if not isinstance(model, nnx.Module):
        raise AdapterError(
            f"model: expected an NNX module (for Linen: road_jax.intervene), found {type(model).__name__}"
        )
    check_choice(config, blocks)
    is_block = (lambda node: isinstance(node, blocks)) if isinstance(blocks, type) else blocks
    modules = list(modules_of(model))
    if adapted := [name for name, node in modules if isinstance(node, RoadBlock)]:
        raise AdapterError(
            f"intervene: expected a model without interventions, found one at {adapted[0]} (unwrap first)"
        )
    # A layer that wrap rotates counts as one module, together with what is inside.
    inside = {id(node) for _, layer in modules if isinstance(layer, RoadLayer) for _, node in modules_of(layer)}
    found = {
        name: node
        for name, node in modules
        if id(node) not in inside and is_block(node.base if isinstance(node, RoadLayer) else node)
    }
    refuse_tuples(model, found)
    # A block with several names is one block.
    first = {id(node): name for name, node in reversed(found.items())}
    names = {name: first[id(node)] for name, node in found.items()}
    seen: dict[str, tuple[int, int | None]] = {}

    def probe(path: tuple, node: Any) -> Any:
        if (name := names.get(".".join(map(str, path)))) is None:
            return node
        whole = _shapes(node)

        def look(base: nnx.Module, result: Any) -> None:
            seen[name] = hidden_states(name, result).shape[-1], _stack_size(name, whole, _shapes(base))

        return _Probe(node, look)

    graph, state = nnx.split(nnx.recursive_map(probe, model))
    trace(lambda _, args, kwargs: nnx.merge(graph, args[0])(*args[1:], **kwargs), None, (state, *args), kwargs)
    starts, total = {}, 0
    for name, (_, stack) in seen.items():
        starts[name] = total
        total += stack or 1
    check_blocks(model, config, total, {name: hidden for name, (hidden, _) in seen.items()})

    def adapt(path: tuple, node: Any) -> Any:
        name = names.get(".".join(map(str, path)))
        if name not in seen:
            return node
        hidden, stack = seen[name]
        end = starts[name] + (stack or 1)
        if not any(starts[name] <= i < end for i in config.layers):
            return node
        return RoadBlock(node, hidden, stack, config=config, start=starts[name], name=name)

    return Intervened(nnx.recursive_map(adapt, model), config)


def _shapes(node: nnx.Module) -> list[tuple[int, ...]]:
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(nnx.state(node))]


def _stack_size(name: str, whole: list[tuple[int, ...]], inside: list[tuple[int, ...]]) -> int | None:
    """Returns how many blocks a module holds, by its Variables' shapes in the model and where the module is called."""
    stacked = [(a, b) for a, b in zip(whole, inside, strict=True) if a != b]
    sizes = {a[0] for a, b in stacked if a[1:] == b}
    if stacked and (len(sizes) > 1 or any(a[1:] != b for a, b in stacked)):
        raise AdapterError(f"{name}: expected one stack of blocks at most, its axis first, found {stacked[0]}")
    return sizes.pop() if sizes else None


def get_intervention(model: nnx.Module) -> Tree:
    """Returns an intervened model's θ and α in the form that `road_jax.save_intervention` and `stack_adapters` take.

    Returns:
        ``{"layers": {"<index>": {"road_theta": …, "road_alpha": …}}}`` with the config's blocks, as in Linen.
    """
    layers = {}
    for i, block in _blocks(model).items():
        at = ... if block.stack is None else i - block.start
        layers[str(i)] = {name: getattr(block, name)[...][at] for name in ROAD_LEAVES}
    return {"layers": layers}


def set_intervention(model: nnx.Module, intervention: Tree) -> None:
    """Puts an intervention into an intervened model, in place.

    Args:
        model: as returned by `intervene`.
        intervention: as returned by `get_intervention` or `road_jax.load_intervention`; or several of them from
            `road_jax.stack_adapters`, for `apply`.

    Raises:
        AdapterError: it doesn't fit the model's config and hidden size. Nothing is changed then.
    """
    held = _blocks(model)
    block = next(iter(held.values()))
    config = block.config
    hidden = output_size(config.variant, block.road_theta.shape[len(block.lead)])
    for name, leaves in zip(ROAD_LEAVES, parameters(intervention, config, hidden), strict=True):
        for block in {id(block): block for block in held.values()}.values():
            mine = {i - block.start: leaf for i, leaf in zip(config.layers, leaves, strict=True) if held[i] is block}
            if block.stack is not None:
                rest = jnp.full_like(leaves[0], name == "road_alpha")
                value = jnp.stack([mine.get(at, rest) for at in range(block.stack)])
            else:
                value = mine[0]
            getattr(block, name).set_value(value)


def _blocks(model: nnx.Module) -> dict[int, RoadBlock]:
    """Returns an intervened model's blocks by the config's indices; a stack appears at each of its indices."""
    found = {id(module): module for _, module in modules_of(model) if isinstance(module, RoadBlock)}
    blocks = {
        i: block
        for block in found.values()
        for i in block.config.layers
        if block.start <= i < block.start + (block.stack or 1)
    }
    if not blocks:
        raise AdapterError("model: expected blocks that intervene has adapted, found none")
    return dict(sorted(blocks.items()))
