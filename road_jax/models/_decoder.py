"""A decoder of the Llama family in Linen, in the variants of `DecoderConfig`. Names and maths are Hugging Face's.

Shapes: ``batch``, ``length`` (new tokens), ``places`` (of a cache), ``heads``, ``kv_heads``, ``head_dim``.
"""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from road_core import AdapterError
from road_core._errors import expect
from road_jax.models import _mesh
from road_jax.models._config import DecoderConfig, MixtureConfig
from road_jax.models._experts import PRODUCT, Experts
from road_jax.models._rope import Rope

_ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": nn.gelu,
}

# The norms before and after attention, and those before and after the MLP, by what `DecoderConfig.norms` says.
_NORMS = {
    "before": ("input", None, "post_attention", None),
    "after": (None, "post_attention", None, "post_feedforward"),
    "both": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
}

# "none" recomputes nothing but the scores of attention in parts, and repeats the gathers of what fsdp stores in shares.
# "linears" keeps the results of products with kernels; rotations, norms, activations and attention, a few per cent of
# the arithmetic, are computed twice, and memory falls to a third.
Remat = Literal["none", "linears", "full"]
_POLICIES = {
    # A gather over fsdp is pinned by these two operations, see `_mesh.gathered`.
    "none": lambda primitive, *_, **__: primitive.name not in ("sharding_constraint", "optimization_barrier"),
    "linears": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def check_remat(remat: str) -> None:
    """Refuses an unknown choice.

    Raises:
        AdapterError: it is unknown.
    """
    if remat not in get_args(Remat):
        raise AdapterError(f"remat: expected one of {', '.join(get_args(Remat))}, found {remat!r}")


class Cache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
        keys: ``[layers, batch, places, kv_heads, head_dim]``.
        values: the same.
        positions: int32 ``[batch, places]``, a token's position in its row; -1 where there is no token.
        used: int32, the number of places taken; it is the same in every row, because padding counts.
        longest: int32 ``[batch]``, how many positions a row has if all places are taken. LongRoPE depends on it.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    used: jax.Array
    longest: jax.Array


# Attention is computed for at least this many tokens of a row at a time, and in at most this many parts, for each of
# which there is a program of its own.
PART, PARTS = 128, 8


def part_of(length: int) -> int:
    """Returns for how many tokens of a row attention is computed at a time."""
    return min(length, -(-length // (PART * PARTS)) * PART)


class _Context(NamedTuple):
    """Values that all layers share in one call."""

    # float32 [batch, length, 1, rotary pairs], for each of the config's ropes
    cosines: list[jax.Array]
    sines: list[jax.Array]
    # bool [batch, length, places + length]: what a token sees of the cache, followed by the new tokens.
    mask: jax.Array
    # The same for layers with a sliding window; None if the model has none.
    windowed_mask: jax.Array | None
    # [batch, length, 1, 1], the factor of each position's query; None if the model has none.
    growth: jax.Array | None


class _Layer(NamedTuple):
    """Whether a layer has the window, and which of the ropes; None where all layers are alike."""

    windowed: jax.Array | None
    rope: jax.Array | None


class RMSNorm(nn.Module):
    """``x / rms(x) · weight``; the quotient is computed in float32."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        start = nn.initializers.constant(1 - c.norm_offset)
        weight = self.param("weight", start, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + c.rms_norm_eps)
        dtype = jnp.float32 if c.norm_in_float32 else self.dtype
        weight = weight.astype(dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide.astype(dtype) * (weight + c.norm_offset if c.norm_offset else weight)).astype(self.dtype)


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped key-value heads."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, past: tuple[jax.Array, jax.Array] | None, layer: _Layer, context: _Context
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        c = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        counts = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}
        sizes = {name: count * c.head_dim for name, count in counts.items()}
        products = _products(x, sizes, c.qkv_bias, "qkv" if c.fused else None, types)

        def heads(name: str) -> jax.Array:
            norm = RMSNorm(c, **types, name=f"{name}_norm") if c.qk_norm else None
            y = norm(products[name]) if norm and c.qk_norm == "all" else products[name]
            y = y.reshape(*x.shape[:2], counts[name], c.head_dim)
            return _turn(norm(y) if norm and c.qk_norm == "head" else y, layer, context)

        query, key = heads("q"), heads("k")
        if context.growth is not None:
            query = query * context.growth.astype(query.dtype)
        value = products["v"].reshape(key.shape)
        mask = context.mask
        if context.windowed_mask is not None:
            mask = context.windowed_mask
            if layer.windowed is not None:
                mask = jnp.where(layer.windowed, mask, context.mask)
        query = query.swapaxes(1, 2)
        if past:
            # A separate product for each part avoids copying the cache together with the new tokens.
            result = _attend(c, query, (past[0], key), (past[1], value), mask)
        else:
            result = _attend_in_parts(c, query, key, value, mask)
        y = nn.Dense(c.hidden_size, use_bias=c.o_bias, name="o_proj", **types)(result)
        return y, (key, value)


def _attend_in_parts(
    config: DecoderConfig, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
    """`_attend` for tokens without a cache, some at a time.

    No token sees a later one, so a part needs only the keys up to its end. The backward pass computes scores again, so
    that those of a whole row needn't be kept.
    """
    length = query.shape[2]
    part = part_of(length)
    if part == length:
        return _attend(config, query, (key,), (value,), mask)
    attend = jax.checkpoint(functools.partial(_attend, config))
    # Where all layers have a window, keys before that of a part's first token are left out too.
    reach = config.sliding_window if config.sliding_window and all(config.windowed_layers) else length
    results = []
    for start in range(0, length, part):
        of, seen = slice(start, start + part), slice(max(0, start + 1 - reach), start + part)
        results.append(attend(query[:, :, of], (key[:, seen],), (value[:, seen],), mask[:, of, seen]))
    return jnp.concatenate(results, axis=1)


def _attend(
    config: DecoderConfig,
    query: jax.Array,
    keys: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...],
    mask: jax.Array,
) -> jax.Array:
    """Returns ``[batch, length, heads · head_dim]``.

    Args:
        config: the decoder's.
        query: ``[batch, heads, length, head_dim]``.
        keys: parts of ``[batch, tokens, kv_heads, head_dim]``.
        values: the same.
        mask: bool ``[batch, length, tokens]``, which of the tokens of all parts each token sees.
    """
    # [batch, kv_heads, tokens of the heads that share a key head, head_dim]: scores come in the order in which they
    # are masked and summed, so that only small arrays are transposed.
    by_head, grouped = query.shape[:3], (len(query), config.num_key_value_heads, -1)
    query = query.reshape(*grouped, config.head_dim)
    scores = [jnp.einsum("bkmd,bskd->bkms", query, k, preferred_element_type=jnp.float32) for k in keys]
    logits = jnp.concatenate(scores, axis=-1).reshape(*by_head, -1) * config.attention_scale
    logits = _capped(logits, config.attention_softcap)
    logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype).reshape(*grouped, logits.shape[-1])
    parts = jnp.split(weights, [keys[0].shape[1]], axis=-1) if len(keys) > 1 else [weights]
    results = [jnp.einsum("bkms,bskd->bkmd", w, v) for w, v in zip(parts, values, strict=True)]
    result = functools.reduce(jnp.add, results).reshape(*by_head, config.head_dim).swapaxes(1, 2)
    return result.reshape(*result.shape[:2], -1)


class MLP(nn.Module):
    """``down(act(gate(x)) · up(x))``, with ``width`` hidden values."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        sizes = {"gate": self.width, "up": self.width}
        wide = _products(x, sizes, c.mlp_bias, "gate_up" if c.fused else None, types)
        wide = _ACTIVATIONS[c.hidden_act](wide["gate"]) * wide["up"]
        return nn.Dense(c.hidden_size, use_bias=c.mlp_bias, name="down_proj", **types)(wide)


class Router(nn.Module):
    """The probabilities of experts. Like Hugging Face's it is no linear layer, and no adapter rotates it."""

    experts: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns float32 ``[batch, length, experts]``."""
        weight = self.param("weight", nn.initializers.lecun_normal(1, 0), (self.experts, x.shape[-1]), self.param_dtype)
        return jax.nn.softmax(jnp.dot(x, weight.astype(self.dtype).T).astype(jnp.float32), axis=-1)


class Mixture(nn.Module):
    """A mixture of experts: those that each token chooses, and one that all tokens take if the model has it."""

    config: DecoderConfig
    mixture: MixtureConfig
    dtype: Any
    param_dtype: Any
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        m, types = self.mixture, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        probabilities = Router(m.experts, **types, name="gate")(x)
        activation = _ACTIVATIONS[self.config.hidden_act]
        y = Experts(m, activation, self.param_dtype, self.mesh, name="experts")(x, probabilities)
        if m.shared_width is None:
            return y
        gate = nn.Dense(1, use_bias=False, **types, name="shared_expert_gate")(x)
        return y + nn.sigmoid(gate) * MLP(self.config, **types, width=m.shared_width, name="shared_expert")(x)


class Block(nn.Module):
    """One layer: attention and MLP, each with norms and its input added to the result."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    # Whether keys and values are returned for a cache.
    keep: bool
    mesh: Mesh | None

    @nn.compact
    def __call__(
        self, x: jax.Array, past: tuple[jax.Array, jax.Array] | None, layer: _Layer, context: _Context
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        c = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        before_attention, after_attention, before_mlp, after_mlp = _NORMS[c.norms]

        def norm(name: str | None, x: jax.Array) -> jax.Array:
            return x if name is None else RMSNorm(c, **types, name=f"{name}_layernorm")(x)

        y, new = Attention(c, **types, name="self_attn")(norm(before_attention, x), past, layer, context)
        x = x + _scaled(norm(after_attention, y), c.residual_scale)
        if c.mixture is None:
            mlp: Any = MLP(c, **types, width=c.intermediate_size, name="mlp")
        else:
            mlp = Mixture(c, c.mixture, **types, mesh=self.mesh, name="mlp")
        y = mlp(norm(before_mlp, x))
        x = x + _scaled(norm(after_mlp, y), c.residual_scale)
        x = _mesh.by_rows(x, self.mesh)
        return x, new if self.keep else None


class Unrolled(nn.Module):
    """Numbered layers, each compiled on its own; called like the scanned stack."""

    block: type[nn.Module]
    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    keep: bool
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x: jax.Array, past: Any, layers: _Layer, context: _Context) -> tuple[jax.Array, Any]:
        kept = []
        for number in range(self.config.num_hidden_layers):
            block = self.block(self.config, self.dtype, self.param_dtype, self.keep, self.mesh, name=str(number))
            x, new = block(x, *jax.tree.map(lambda array, number=number: array[number], (past, layers)), context)
            kept.append(new)
        return x, jax.tree.map(lambda *layers: jnp.stack(layers), *kept)


class Trunk(nn.Module):
    """The decoder without its head."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    scan: bool
    remat: Remat
    mesh: Mesh | None

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, segments: jax.Array, cache: Cache | None, cache_size: int | None
    ) -> tuple[jax.Array, jax.Array, Cache | None]:
        """Returns the last hidden state, the embedding (which a tied head shares) and the cache."""
        c = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = nn.Embed(c.vocab_size, c.hidden_size, **types, name="embed_tokens").embedding
        if self.mesh is not None:
            embed = _mesh.gathered({"embedding": embed}, self.mesh, under=("embed_tokens",))["embedding"]
        keep = cache is not None or cache_size is not None
        context, positions, longest = _context(c, segments, cache, cache_size)
        block = Block
        if self.mesh is not None:
            block = _gathering(block, self.mesh)
        if self.remat != "none" or self.mesh is not None:
            # Under scan, XLA can't merge common subexpressions of the forward and the backward pass anyway.
            block = nn.remat(block, prevent_cse=not self.scan, policy=_POLICIES[self.remat])
        if self.scan:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, 0, nn.broadcast),
                length=c.num_hidden_layers,
            )(c, **types, keep=keep, mesh=self.mesh, name="layers")
        else:
            stack = Unrolled(block, c, **types, keep=keep, mesh=self.mesh, name="layers")
        past = (cache.keys, cache.values) if cache is not None else None
        layers = _Layer(*(jnp.asarray(of) if len(set(of)) > 1 else None for of in (c.windowed_layers, c.rope_by_layer)))
        x = _mesh.by_rows(jnp.take(embed, input_ids, axis=0).astype(self.dtype), self.mesh)
        # Gemma was trained with this factor in the embedding's dtype.
        scale = c.embedding_scale
        x = _scaled(x, float(np.asarray(scale, self.dtype)) if c.model_type.startswith("gemma") else scale)
        x, new = stack(x, past, layers, context)
        x = RMSNorm(c, **types, name="norm")(x)
        kept = _extend(cache, new[0], new[1], positions, longest, cache_size) if keep else None
        return x, embed.astype(self.dtype), kept


class WithVision(nn.Module):
    """The level of names that a model with vision has around its language model; its other parts aren't here."""

    language_model: Trunk

    def __call__(self, *inputs: Any) -> tuple[jax.Array, jax.Array, Cache | None]:
        """Returns what the language model returns."""
        return self.language_model(*inputs)


class Decoder(nn.Module):
    """A decoder whose params have the names of Hugging Face's checkpoints; made by `road_jax.models.load`.

    Attributes:
        config: sizes and variants.
        dtype: the dtype of the computation.
        param_dtype: the dtype of the params.
        scan: True for layers stacked under ``params/model/layers`` and compiled once, False for numbered ones
            (``params/model/layers/0``), each compiled on its own. In the language model of a model with vision it is
            ``params/model/language_model/layers``.
        remat: which of a layer's activations are kept for the backward pass: ``"none"`` keeps all but
            attention's scores in rows of more than 128 tokens, ``"linears"`` the outputs of its linear layers,
            ``"full"`` only its input. The rest is recomputed.
        mesh: a mesh with the axes data, fsdp and tensor, for params that are sharded as `road_jax.models.shardings`
            says: rows of the batch stay split over data and fsdp, and each layer's params are gathered over fsdp when
            it begins.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan: bool = True
    remat: Remat = "linears"
    mesh: Mesh | None = None

    def setup(self) -> None:
        expect("Decoder.config", self.config, DecoderConfig)
        check_remat(self.remat)
        if self.mesh is not None:
            _mesh.check_axes(self.mesh)
        c, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # Params that are just being made aren't sharded yet.
        mesh = None if self.is_initializing() else self.mesh
        kwargs = {**types, "scan": self.scan, "remat": self.remat, "mesh": mesh}
        self.model = WithVision(Trunk(c, **kwargs, parent=None)) if c.language_model else Trunk(c, **kwargs)
        if not c.tie_word_embeddings:
            dense = nn.Dense if mesh is None else _gathering(nn.Dense, mesh, "lm_head")
            self.lm_head = dense(c.vocab_size, use_bias=False, **types)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        logits_at: jax.Array | None = None,
        cache: Cache | None = None,
        cache_size: int | None = None,
    ) -> Any:
        """Returns logits; with a cache, also the cache with the new tokens added.

        Args:
            input_ids: int32 ``[batch, length]``.
            attention_mask: int32 ``[batch, length]``, or one row for all: 0 for padding on either side, 1 for tokens.
                Rows that contain several texts number them 1, 2, …; each text sees only itself, and its positions begin
                with 0.
            logits_at: int32 ``[batch, n]``, the places whose logits are wanted; by default all of them.
            cache: the cache of the tokens before. New tokens go to its next places, of which it must have enough.
            cache_size: starts a new cache with this many places.

        Returns:
            Logits ``[batch, length or n, vocab]`` in ``dtype``, or ``(logits, cache)``.

        Raises:
            AdapterError: ``input_ids`` or ``attention_mask`` has another type or shape, or an attribute can't be used.
        """
        x, embed, kept = self._hidden(input_ids, attention_mask, logits_at, cache, cache_size)
        logits = self.head(x, embed)
        return logits if kept is None else (logits, kept)

    def hidden(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, *, logits_at: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns what `head` takes: hidden states ``[batch, length or n, hidden]`` and the embedding."""
        return self._hidden(input_ids, attention_mask, logits_at, None, None)[:2]

    def head(self, x: jax.Array, embed: jax.Array) -> jax.Array:
        """Returns the logits ``[batch, n, vocab]`` of hidden states, of which it may be given a part at a time."""
        c = self.config
        logits = jnp.dot(x, embed.T) if c.tie_word_embeddings else self.lm_head(x)
        return _capped(_scaled(logits, c.logit_scale), c.logit_softcap)

    def _hidden(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None,
        logits_at: jax.Array | None,
        cache: Cache | None,
        cache_size: int | None,
    ) -> tuple[jax.Array, jax.Array, Cache | None]:
        _check_inputs(input_ids, attention_mask)
        segments = jnp.ones_like(input_ids) if attention_mask is None else attention_mask.astype(jnp.int32)
        segments = jnp.broadcast_to(segments, input_ids.shape)
        x, embed, kept = self.model(input_ids, segments, cache, cache_size)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[..., None], axis=1)
        return x, embed, kept


def _check_inputs(input_ids: jax.Array, attention_mask: jax.Array | None) -> None:
    dtype, shape = getattr(input_ids, "dtype", None), getattr(input_ids, "shape", ())
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer) or len(shape) != 2:
        found = type(input_ids).__name__ if dtype is None else f"{dtype} {list(shape)}"
        raise AdapterError(f"input_ids: expected an array of whole numbers [batch, length], found {found}")
    # One row may be given for all.
    if attention_mask is not None and getattr(attention_mask, "shape", None) not in (shape, (1, *shape[1:])):
        given = list(attention_mask.shape) if hasattr(attention_mask, "shape") else type(attention_mask).__name__
        raise AdapterError(f"attention_mask: expected an array {list(shape)}, as input_ids, found {given}")


def _gathering(module: type[nn.Module], mesh: Mesh, *under: str) -> Any:
    """Returns a module type that gathers its params over fsdp when it is called."""
    return nn.map_variables(
        module, "params", trans_in_fn=lambda found: {"params": _mesh.gathered(found["params"], mesh, under=under)}
    )


def _context(
    config: DecoderConfig, segments: jax.Array, cache: Cache | None, cache_size: int | None
) -> tuple[_Context, jax.Array, jax.Array]:
    """Returns what all layers share, the new tokens' positions and how long each token's text is or may become.

    Both are ``[batch, length]``; positions are -1 for padding.
    """
    length = segments.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)[None]
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    positions = index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    if cache is not None:
        positions = positions + jnp.max(cache.positions, axis=1, keepdims=True) + 1
    positions = jnp.where(segments > 0, positions, -1)

    sees = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    mask = sees & jnp.tril(jnp.ones((1, length, length), bool))
    seen_positions = positions
    if cache is not None:
        there = jnp.broadcast_to((cache.positions >= 0)[:, None, :], (*segments.shape, cache.positions.shape[1]))
        mask = jnp.concatenate([there, mask], axis=-1)
        seen_positions = jnp.concatenate([cache.positions, positions], axis=1)
    windowed = None
    if config.sliding_window is not None:
        windowed = mask & (positions[:, :, None] - seen_positions[:, None, :] < config.sliding_window)
    if cache is not None:
        longest = jnp.broadcast_to(cache.longest[:, None], segments.shape)
    else:
        longest = jnp.max(jnp.where(sees, positions[:, None, :], -1), axis=-1) + 1 + max((cache_size or 0) - length, 0)
    angles = [_angles(rope, positions, longest) for rope in config.ropes]
    cosines = [jnp.cos(a) * rope.scale for a, rope in zip(angles, config.ropes, strict=True)]
    sines = [jnp.sin(a) * rope.scale for a, rope in zip(angles, config.ropes, strict=True)]
    growth = None
    if config.query_growth is not None:
        rate, length = config.query_growth
        growth = (1 + rate * jnp.log1p((jnp.maximum(positions, 0) // length).astype(jnp.float32)))[..., None, None]
    return _Context(cosines, sines, mask, windowed, growth), positions, longest


def _angles(rope: Rope, positions: jax.Array, longest: jax.Array) -> jax.Array:
    """Returns float32 ``[batch, length, 1, rotary pairs]``."""
    frequencies = jnp.asarray(np.asarray(rope.frequencies, np.float32).reshape(1, 1, 1, -1))
    if rope.long_frequencies is not None:
        # Unlike in transformers, a text's frequencies don't depend on other texts, nor change while it grows, for which
        # a cache would have to be computed anew.
        long = jnp.asarray(np.asarray(rope.long_frequencies, np.float32).reshape(1, 1, 1, -1))
        frequencies = jnp.where((longest > rope.trained_length)[..., None, None], long, frequencies)
    return jnp.maximum(positions, 0).astype(jnp.float32)[..., None, None] * frequencies


def _turn(x: jax.Array, layer: _Layer, context: _Context) -> jax.Array:
    """Applies rotary positions to ``[batch, length, heads, head_dim]``; in what is turned, halves are paired."""
    cosines, sines = context.cosines[0], context.sines[0]
    if layer.rope is not None:
        cosines, sines = (jnp.stack(of)[layer.rope] for of in (context.cosines, context.sines))
    pairs = cosines.shape[-1]
    a, b, rest = jnp.split(x, [pairs, 2 * pairs], axis=-1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    turned = [(a * cosines - b * sines).astype(x.dtype), (b * cosines + a * sines).astype(x.dtype)]
    return jnp.concatenate([*turned, rest] if rest.size else turned, axis=-1)


def _products(
    x: jax.Array, sizes: dict[str, int], bias: bool, fused: str | None, types: dict[str, Any]
) -> dict[str, jax.Array]:
    """Returns ``{name}_proj(x)`` by name: of one layer each, or of one that has the outputs of all side by side."""
    if fused is None:
        return {name: nn.Dense(size, use_bias=bias, name=f"{name}_proj", **types)(x) for name, size in sizes.items()}
    whole = nn.Dense(sum(sizes.values()), use_bias=bias, name=f"{fused}_proj", **types)(x)
    return dict(zip(sizes, jnp.split(whole, np.cumsum([*sizes.values()])[:-1], axis=-1), strict=True))


def _scaled(x: jax.Array, factor: float) -> jax.Array:
    """Multiplies in float32 and rounds once."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def _capped(x: jax.Array, cap: float | None) -> jax.Array:
    """Returns ``cap · tanh(x / cap)``, computed in float32."""
    return x if cap is None else (jnp.tanh(x.astype(jnp.float32) / cap) * cap).astype(x.dtype)


def _extend(
    cache: Cache | None,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    longest: jax.Array,
    cache_size: int | None,
) -> Cache:
    """Puts new tokens into the next places of a cache, which is made if there is none."""
    if cache is None:
        shape = (*keys.shape[:2], cache_size, *keys.shape[3:])
        empty = jnp.full((positions.shape[0], cache_size or 0), -1, jnp.int32)
        zeros = jnp.zeros(shape, keys.dtype), jnp.zeros(shape, values.dtype)
        cache = Cache(*zeros, empty, jnp.int32(0), jnp.max(longest, axis=1))
    used = cache.used
    return Cache(
        jax.lax.dynamic_update_slice_in_dim(cache.keys, keys, used, 2),
        jax.lax.dynamic_update_slice_in_dim(cache.values, values, used, 2),
        jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, used, 1),
        used + positions.shape[1],
        cache.longest,
    )
