"""`intervene`: RoAd on the outputs of whole blocks of a Linen model, without changing the model."""

import dataclasses
import inspect
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from road_core import (
    AdapterError,
    Intervention,
    InterventionConfig,
    RoadConfig,
    check_group_size,
    parameter_size,
    read_intervention,
    write_intervention,
)
from road_core._errors import expect
from road_jax._io import from_tensors
from road_jax._rotate import blocks, polar, rotate_blocks, rotate_rows, within
from road_jax._stack import as_ids, check_ids, of_rows
from road_jax._transform import Functions, Road, check_linen, is_array, new_names, trace, traced_anew, without
from road_jax._tree import (
    ROAD_LEAVES,
    Path,
    Tree,
    check_floating,
    dotted,
    flatten,
    params_of,
    to_dict,
    unbox,
    unflatten,
)
from road_jax.models._decoder import Block

Blocks = type[nn.Module] | Callable[[nn.Module], bool]

# Keyword arguments that `nn.Module.apply` itself takes.
_OF_APPLY = ("rngs", "method", "mutable", "capture_intermediates")


class _Place(NamedTuple):
    """Where the params of one block, or of a scanned stack of blocks, are.

    Attributes:
        path: the module's path.
        axis: the stack's axis in the params; None for a single block.
        start: the index of the first block.
        layers: the number of blocks.
        hidden: the size of each block's output.
    """

    path: Path
    axis: int | None
    start: int
    layers: int
    hidden: int


@dataclasses.dataclass(frozen=True)
class Intervened(Functions):
    """A pair of pure functions, `init` and `apply`; made by `intervene`.

    Attributes:
        model: the Linen module, unchanged.
        config: which blocks' outputs are rotated, at which tokens, and how.
        blocks: the blocks' class, or a function that returns True for a block.
    """

    model: nn.Module
    config: InterventionConfig
    blocks: Blocks = Block
    # Results of tracing the model, by its method and all arguments; in these keys, all arrays are alike.
    _places: dict[Any, list[_Place]] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def init(self, *args: Any, **kwargs: Any) -> Tree:
        """Returns a fresh intervention, which changes nothing yet; the model is only traced for its shapes, never run.

        Args:
            *args: sample inputs of the model; only their shapes and dtypes matter.
            **kwargs: further sample inputs.

        Returns:
            ``{"layers": {"<index>": {"road_theta": …, "road_alpha": …}}}`` with the config's blocks, scanned or not;
            each array is float32 ``[parameter_size]``, with θ = 0 and α = 1.

        Raises:
            AdapterError: the model has no such blocks, or the group size doesn't divide their outputs.
        """
        size = parameter_size(self.config.variant, self._find(args, kwargs)[0].hidden)
        leaves = {"road_theta": jnp.zeros, "road_alpha": jnp.ones}
        return {
            "layers": {
                str(i): {name: make((size,), jnp.float32) for name, make in leaves.items()} for i in self.config.layers
            }
        }

    def apply(
        self,
        variables: Mapping[str, Any],
        intervention: Tree,
        *args: Any,
        prompt_mask: jax.Array | None = None,
        adapter_ids: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the model with the chosen blocks' outputs rotated at the chosen tokens: ``h' = R h``.

        A pure function that can be used under ``jit``, ``grad`` and ``vmap``. A gradient with respect to
        ``intervention`` alone computes no gradient of a kernel, and is exactly 0 outside of the config's subspace.

        Args:
            variables: the model's variables; kernels may be quantised by `road_jax.quantize`.
            intervention: as returned by `init`; with ``adapter_ids``, several of them from `road_jax.stack_adapters`,
                all of this config, though each may have only some of its layers.
            *args: the model's inputs.
            prompt_mask: int or bool ``[batch, length]``, nonzero at the prompt's tokens, 0 at padding on either side
                and at answers; see `road_core.position_mask`. By default no token is prompt if the model is given a
                ``cache`` (it is decoding then); otherwise the model's ``attention_mask`` is used, or all tokens if
                there is none. Ignored with ``positions="all"``.
            adapter_ids: int32 ``[batch]``, the intervention of each row, counted from 1; 0 means none.
            **kwargs: passed to ``model.apply``.

        Returns:
            What ``model.apply`` returns; every rotated output keeps its dtype.

        Raises:
            AdapterError: the intervention doesn't fit the config or the model, the mask has the wrong shape, or a block
                returns something other than hidden states.
        """
        adapter_ids = None if adapter_ids is None else as_ids(adapter_ids)
        mask = prompt_of(self.model, prompt_mask, args, kwargs)
        if self.config.spans is not None and mask is None:
            return _plain(self.model).apply(variables, {}, *args, **kwargs)
        places = self._find(args, kwargs)
        added, shape = self._coefficients(intervention, places, adapter_ids)
        # The coefficients that rotate a block's output are laid beside its params.
        laid = {path: new_names("road_first", "road_second") for path in added}
        used: set[Path] = set()

        def turn(module: nn.Module, result: Any) -> Any:
            leaves = laid.get(module.path)
            if leaves is None or not module.scope.has_variable("params", leaves[0]):
                return result
            used.add(module.path)
            first, second = (module.scope.get_variable("params", name).reshape(shape) for name in leaves)
            rotate = rotate_blocks if adapter_ids is None else rotate_rows
            where = dotted(module.path)
            return at_prompt(where, result, lambda h: rotate(h, first, second), self.config, mask)

        params = flatten(params_of(variables))
        for path, leaves in laid.items():
            params.update(zip(((*path, name) for name in leaves), added[path], strict=True))
        with nn.intercept_methods(self._on_blocks(turn)):
            # Also runs quantised kernels, which model.apply can't.
            result = _plain(self.model).apply({**to_dict(variables), "params": unflatten(params)}, {}, *args, **kwargs)
        if unused := sorted(map(dotted, laid.keys() - used)):
            raise AdapterError(f"intervention: expected every block to be called, found unused {', '.join(unused[:5])}")
        return without(result, set(itertools.chain(*laid.values())), kwargs.get("mutable", False))

    def _coefficients(
        self, intervention: Tree, places: list[_Place], adapter_ids: jax.Array | None
    ) -> tuple[dict[Path, list[jax.Array]], tuple[int, ...]]:
        """Returns the arrays to lay beside each block's params, and their shape where the block is called.

        They have one axis of their own and the stack's axis, which Flax may count from either end. Blocks of a stack
        that aren't chosen get the identity.
        """
        config = self.config
        theta, alpha = parameters(intervention, config, places[0].hidden)
        if (adapter_ids is None) != (theta.ndim == 2):
            count = "no" if adapter_ids is None else adapter_ids.shape[0]
            raise AdapterError(
                "intervention: expected several (stack_adapters) with adapter_ids and one without, "
                f"found θ {list(theta.shape[1:])} and {count} adapter_ids"
            )
        if adapter_ids is not None:
            check_ids(adapter_ids, theta.shape[-1] - 1)
            # [layers, size, interventions] -> [layers, batch, size]
            theta, alpha = (jnp.moveaxis(of_rows(leaf, adapter_ids, i), -1, 1) for i, leaf in enumerate((theta, alpha)))
        how: Any = {"variant": config.variant, "group_size": config.group_size}
        theta, alpha = within(theta, alpha, **how, subspace=config.subspace)
        # Each [layers of the config, groups, 1 or 2, half], or [layers, batch, …].
        tables: Sequence[jax.Array] = blocks(*polar(theta, alpha), **how)
        # After the chosen blocks comes one row for all others; derived from these, it is placed on a mesh as they are.
        identities = jnp.ones_like(tables[0][:1]), jnp.zeros_like(tables[1][:1])
        tables = [jnp.concatenate(pair) for pair in zip(tables, identities, strict=True)]
        shape = tables[0].shape[1:]
        row = {i: k for k, i in enumerate(config.layers)}
        added: dict[Path, list[jax.Array]] = {}
        for place in places:
            if not any(place.start <= i < place.start + place.layers for i in config.layers):
                continue
            added[place.path] = []
            for table in tables:
                rows = np.array([row.get(i, len(row)) for i in range(place.start, place.start + place.layers)])
                stack = table[rows].reshape(place.layers, math.prod(shape))
                added[place.path].append(stack[0] if place.axis is None else jnp.moveaxis(stack, 0, place.axis))
        return added, shape

    def _find(self, args: Any, kwargs: Any) -> list[_Place]:
        """Traces the model to find its blocks, once for each way of calling it."""
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_APPLY or name == "method"}
        leaves, tree = jax.tree.flatten((args, kwargs))
        key = tree, *(None if is_array(leaf) else leaf for leaf in leaves)
        try:
            known = key in self._places
        except TypeError:
            # If the arguments can't be a key, the model is traced each time.
            return self._trace(args, kwargs)
        if not known:
            self._places[key] = self._trace(args, kwargs)
        return self._places[key]

    def _trace(self, args: Any, kwargs: Any) -> list[_Place]:
        hidden: dict[Path, int] = {}
        probes = {"road_probe_2": 2, "road_probe_3": 3}

        def declare(module: nn.Module, result: Any) -> Any:
            hidden[module.path] = hidden_states(dotted(module.path), result).shape[-1]
            for name, size in probes.items():
                module.scope.param(name, lambda _, size=size: jnp.zeros(size, jnp.float32))
            return result

        def shapes(rng: jax.Array, args: Any, kwargs: Any) -> Any:
            with traced_anew() as forget, nn.intercept_methods(self._on_blocks(declare, forget)):
                return self.model.init(rng, *args, **kwargs)

        params = flatten(unbox(trace(shapes, jax.random.key(0), args, kwargs)["params"]))
        places: list[_Place] = []
        for path, size in hidden.items():
            # The axes on which two params of different sizes agree are a stack's.
            pair = [params[*path, name].shape for name in probes]
            axes = [axis for axis, (a, b) in enumerate(zip(*pair, strict=True)) if a == b]
            if len(axes) > 1:
                raise AdapterError(f"{dotted(path)}: expected one stack of blocks at most, found stacks of stacks")
            count = pair[0][axes[0]] if axes else 1
            start = places[-1].start + places[-1].layers if places else 0
            places.append(_Place(path, axes[0] if axes else None, start, count, size))
        total = places[-1].start + places[-1].layers if places else 0
        check_blocks(self.model, self.config, total, {dotted(place.path): place.hidden for place in places})
        return places

    def _on_blocks(
        self,
        act: Callable[[nn.Module, Any], Any],
        before: Callable[[nn.Module], None] = lambda _: None,
    ) -> Callable:
        """Returns an interceptor that passes each block's result through ``act``, and every module to ``before``."""
        calls: dict[Path, int] = {}

        def intercept(next_fn: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            module = context.module
            before(module)
            if context.method_name != "__call__" or not self._is_block(module):
                return next_fn(*args, **kwargs)
            count = calls.get(module.path, 0)
            result = next_fn(*args, **kwargs)
            # scan and remat call the block itself within a module of the same path; the inner call sees one layer's
            # params.
            if calls.get(module.path, 0) > count:
                return result
            calls[module.path] = count + 1
            return act(module, result)

        return intercept

    def _is_block(self, module: nn.Module) -> bool:
        if isinstance(self.blocks, type):
            return isinstance(module, self.blocks)
        return self.blocks(module)


def intervene(model: nn.Module, config: InterventionConfig, *, blocks: Blocks = Block) -> Intervened:
    """Makes the functions that train and run an intervention on a Linen model: RoAd on the outputs of its blocks.

    The model needs no change; its blocks may be under ``nn.scan`` and ``nn.remat``. Paper: section 4.3.

    Args:
        model: a Linen module.
        config: which blocks, counted in the order in which they run, at which tokens, and how.
        blocks: the blocks' class, or a function that returns True for modules that are blocks. A block returns hidden
            states ``[batch, length, hidden]``, alone or first in a tuple. By default the blocks of `road_jax.models`.

    Returns:
        An `Intervened` with ``init`` and ``apply``.

    Raises:
        AdapterError: the model isn't a Linen module, the config isn't an `InterventionConfig`, or ``blocks`` is neither
            a class nor a function.

    Example:
        >>> import jax, jax.numpy as jnp, road_jax
        >>> from flax import linen as nn
        >>> model = nn.Sequential([nn.Dense(64), nn.Dense(64)])
        >>> x = jnp.ones((2, 5, 64))
        >>> variables = model.init(jax.random.key(0), x)
        >>> config = road_jax.InterventionConfig(layers=[1], positions="last")
        >>> model = road_jax.intervene(model, config, blocks=nn.Dense)
        >>> intervention = model.init(x)
        >>> jax.tree.map(jnp.shape, intervention)
        {'layers': {'1': {'road_alpha': (32,), 'road_theta': (32,)}}}
        >>> model.apply(variables, intervention, x).shape
        (2, 5, 64)
    """
    check_linen(model, "road_jax.nnx.intervene")
    check_choice(config, blocks)
    return Intervened(model, config, blocks)


def save_intervention(
    directory: str | os.PathLike, intervention: Tree, config: InterventionConfig, *, overwrite: bool = False
) -> None:
    """Writes ``intervention_config.json`` and ``intervention.safetensors``, which road_torch can load unchanged.

    Args:
        directory: a new or empty folder; with ``overwrite``, one whose two files are replaced.
        intervention: as returned by ``Intervened.init``; any floating dtypes, kept bit for bit.
        config: the config that the intervention was made with.
        overwrite: see ``directory``.

    Raises:
        AdapterError: the folder already contains something, or the intervention isn't complete and finite.
    """
    expect("config", config, InterventionConfig)
    found = flatten(intervention, "intervention")
    leaves = {dotted(path): np.asarray(jax.device_get(leaf)) for path, leaf in found.items()}
    keys = {i: (f"layers.{i}.road_theta", f"layers.{i}.road_alpha") for i in config.layers}
    if wrong := sorted(leaves.keys() ^ {key for pair in keys.values() for key in pair}):
        raise AdapterError(
            f"intervention: expected road_theta and road_alpha of layers.<index> for {list(config.layers)!s:.80}, "
            f"found a difference in {', '.join(wrong[:5])}"
        )
    layers = {i: (leaves[theta], leaves[alpha]) for i, (theta, alpha) in keys.items()}
    write_intervention(directory, Intervention(config, layers), overwrite=overwrite)


def load_intervention(directory: str | os.PathLike) -> tuple[Tree, InterventionConfig]:
    """Reads what `save_intervention` wrote.

    Returns:
        The intervention as a nested dict of JAX arrays in the file's dtypes, and its config.

    Raises:
        AdapterError: the folder contains no complete intervention.
    """
    record = read_intervention(directory)
    return from_tensors(record.tensors()), record.config


def _plain(model: nn.Module) -> Road:
    return Road(model, RoadConfig())


def prompt_of(model: Any, prompt_mask: jax.Array | None, args: Any, kwargs: Any) -> jax.Array | int | None:
    """Returns the prompt mask for a call of the model: 1 if all tokens are prompt, None if none are.

    Raises:
        AdapterError: the arguments aren't those of the model's method.
    """
    if prompt_mask is not None:
        return prompt_mask if isinstance(prompt_mask, int) else jnp.asarray(prompt_mask)
    method = type(model).__call__
    if isinstance(model, nn.Module):
        method = kwargs.get("method") or method
        method = getattr(type(model), method) if isinstance(method, str) else getattr(method, "__func__", method)
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_APPLY}
    try:
        given = {**inspect.signature(method).bind_partial(model, *args, **kwargs).arguments, **kwargs}
    except TypeError as error:
        raise AdapterError(f"intervene: expected the arguments of {type(model).__name__}, found {error}") from None
    if given.get("cache") is not None:
        return None
    mask = given.get("attention_mask")
    return 1 if mask is None else mask


def hidden_states(where: str, result: Any) -> jax.Array:
    """Returns the first output of a block.

    Raises:
        AdapterError: it doesn't have three axes.
    """
    h = result[0] if isinstance(result, tuple) else result
    if (shape := jnp.shape(h) if hasattr(h, "shape") else None) is None or len(shape) != 3:
        raise AdapterError(
            f"{where}: expected a block that gives hidden states [batch, length, hidden] first, "
            f"found {type(h).__name__ if shape is None else list(shape)}"
        )
    return h


def at_prompt(
    where: str,
    result: Any,
    rotate: Callable[[jax.Array], jax.Array],
    config: InterventionConfig,
    mask: jax.Array | int | None,
) -> Any:
    """Returns a block's result with its hidden states rotated at the chosen tokens; ``mask`` is `prompt_of`'s."""
    if config.spans is not None and mask is None:
        return result
    h, *rest = result if isinstance(result, tuple) else (result,)
    turned = rotate(h)
    if config.spans is not None and mask is not None:
        mask = jnp.ones(h.shape[:-1], jnp.int32) if isinstance(mask, int) else mask
        if mask.shape != h.shape[:-1]:
            raise AdapterError(
                f"{where}: expected a prompt mask {list(h.shape[:-1])}, as the block's output, found {list(mask.shape)}"
            )
        turned = jnp.where(_chosen(mask, *config.spans)[..., None], turned, h)
    return (turned, *rest) if isinstance(result, tuple) else turned


def check_choice(config: InterventionConfig, blocks: Any) -> None:
    """Refuses a config of another type, and ``blocks`` that isn't callable.

    Raises:
        AdapterError: one of the two is wrong.
    """
    expect("config", config, InterventionConfig)
    if not callable(blocks):
        raise AdapterError(f"blocks: expected a class of modules or a function, found {type(blocks).__name__}")


def check_blocks(model: Any, config: InterventionConfig, total: int, hidden: Mapping[str, int]) -> None:
    """Refuses a model whose blocks, ``total`` in number with outputs of the sizes ``hidden``, don't fit the config.

    Raises:
        AdapterError: there are no blocks, one of the config's is missing, their hidden sizes differ, or the group size
            doesn't divide these.
    """
    if not hidden:
        raise AdapterError(
            f"intervene: expected blocks in {type(model).__name__}, found none; say by blocks=… which modules they are"
        )
    if config.layers[-1] >= total:
        raise AdapterError(
            f"InterventionConfig.layers: expected indices from 0 to {total - 1}, found {config.layers[-1]}"
        )
    if len(sizes := set(hidden.values())) > 1:
        raise AdapterError(f"intervene: expected blocks of one hidden size, found {sorted(sizes)}")
    where, size = next(iter(hidden.items()))
    check_group_size(size, config.group_size, where)


def parameters(intervention: Tree, config: InterventionConfig, hidden: int) -> tuple[jax.Array, jax.Array]:
    """Returns θ and α, each ``[layers, size]``, or ``[layers, size, interventions]`` from `road_jax.stack_adapters`.

    Raises:
        AdapterError: the intervention doesn't fit the config and this hidden size.
    """
    leaves = flatten(intervention, "intervention")
    size = parameter_size(config.variant, hidden)
    rows = {jnp.shape(leaf)[1:] for leaf in leaves.values()}
    shape = (size, *rows.pop()) if len(rows) == 1 else (size,)
    expected: dict[Path, tuple[int, ...]] = {
        ("layers", str(i), name): shape for i in config.layers for name in ROAD_LEAVES
    }
    found = {path: jnp.shape(leaf) for path, leaf in leaves.items()}
    if found != expected or len(shape) > 2:
        wrong = sorted(dotted(p) for p in found.keys() | expected.keys() if found.get(p) != (size,))
        raise AdapterError(
            f"intervention: expected road_theta and road_alpha [{size}] of layers.<index> for "
            f"{list(config.layers)!s:.80}, found a difference in {', '.join(wrong[:5])}"
        )
    for path, leaf in leaves.items():
        check_floating(path, leaf)
    theta, alpha = (jnp.stack([leaves["layers", str(i), name] for i in config.layers]) for name in ROAD_LEAVES)
    return theta, alpha


def _chosen(prompt_mask: jax.Array, first: int, last: int) -> jax.Array:
    """Returns `road_core.position_mask`, bool ``[batch, length]``."""
    texts = prompt_mask.astype(jnp.int32)
    # How many tokens of the same text come before each token, and after it.
    same = texts[:, :, None] == texts[:, None, :]
    place = jnp.arange(texts.shape[1])
    before, behind = (
        jnp.sum(same & side[None], axis=-1) for side in (place[None] < place[:, None], place[None] > place[:, None])
    )
    return (texts > 0) & ((before < first) | (behind < last))
