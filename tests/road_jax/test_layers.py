"""Layers and lifts that a Flax model may use: each adapted as the same layers written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _compare import assert_close, named_values
from flax import linen as nn

import road_core
import road_jax
from road_core import RoadConfig

GROUP = 8


def filled(adapter):
    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        return jnp.asarray(named_values(name, *leaf.shape, mean=float("alpha" in name), std=0.3))

    return jax.tree_util.tree_map_with_path(fill, adapter)


def turn(y, leaves, axes=1):
    """The reference on the last axes of ``y``, flattened."""
    theta, alpha = (np.asarray(leaves[name], np.float64) for name in ("road_theta", "road_alpha"))
    flat = np.asarray(y, np.float64).reshape(*y.shape[: y.ndim - axes], -1)
    return road_core.rotate(flat, theta, alpha, variant="road_1", group_size=GROUP).reshape(y.shape)


def adapt(model, *inputs, **fields):
    variables = model.init(jax.random.key(0), *inputs)
    road = road_jax.transform(model, RoadConfig(**{"target_modules": "all-linear", "group_size": GROUP, **fields}))
    return road, variables, filled(road.init(jax.random.key(1), variables, *inputs))


def check_merge(road, variables, adapter, *inputs):
    """What `apply` gives is what the merged model gives, and another thing than the base's."""
    found = jax.jit(road.apply)(variables, adapter, *inputs)
    merged = jax.jit(road.merge)(variables, adapter)
    assert_close(road.model.apply(merged, *inputs), found, "float32", moved_from=road.model.apply(variables, *inputs))
    return found


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(named_values("x", 2, 6, 32))


def test_flaxs_own_attention(x):
    """Query, key and value are DenseGeneral to heads × head_dim, the output is one from both."""
    model = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=64, out_features=32)
    road, variables, adapter = adapt(model, x)
    assert sorted(adapter) == ["key", "out", "query", "value"]
    found = check_merge(road, variables, adapter, x)

    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    heads = {
        name: turn(np.einsum("btd,dhk->bthk", np.asarray(x), p[name]["kernel"]) + p[name]["bias"], adapter[name], 2)
        for name in ("query", "key", "value")
    }
    scores = np.einsum("bthk,bshk->bhts", heads["query"], heads["key"]) / np.sqrt(16)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mixed = np.einsum("bhts,bshk->bthk", weights, heads["value"])
    expected = turn(np.einsum("bthk,hkd->btd", mixed, p["out"]["kernel"]) + p["out"]["bias"], adapter["out"])
    assert_close(found, expected, "float32")


class Twice(nn.Module):
    """One layer called twice: one kernel, one adapter."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(32, name="shared")
        return shared(nn.tanh(shared(x)))


def test_a_shared_layer_has_one_adapter(x):
    road, variables, adapter = adapt(Twice(), x)
    found = check_merge(road, variables, adapter, x)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"]["shared"])

    def layer(x):
        return turn(x @ p["kernel"] + p["bias"], adapter["shared"])

    assert_close(found, layer(np.tanh(layer(np.asarray(x, np.float64)))), "float32")


class Branches(nn.Module):
    """Two copies of a layer, side by side under vmap, each with its own params."""

    @nn.compact
    def __call__(self, x):
        dense = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)(
            16, name="branches"
        )
        return jnp.sum(dense(x), axis=0)


def test_a_vmapped_layer_has_an_adapter_a_copy(x):
    road, variables, adapter = adapt(Branches(), x)
    assert adapter["branches"]["road_theta"].shape == (2, 8)
    found = check_merge(road, variables, adapter, x)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"]["branches"])
    expected = sum(
        turn(np.asarray(x) @ p["kernel"][i] + p["bias"][i], jax.tree.map(lambda v, i=i: v[i], adapter["branches"]))
        for i in range(2)
    )
    assert_close(found, expected, "float32")


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(32, name="dense")(x)), None


class Outer(nn.Module):
    """A scan in a scan: 3 groups of 2 layers."""

    @nn.compact
    def __call__(self, x, _=None):
        scan = nn.scan(Inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan(name="inner")(x, None)


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(nn.remat(Outer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(name="outer")(x, None)[0]


def test_nested_scans(x):
    road, variables, adapter = adapt(Nested(), x)
    leaves, p = adapter["outer"]["inner"]["dense"], variables["params"]["outer"]["inner"]["dense"]
    assert leaves["road_theta"].shape == (3, 2, 16)
    found = check_merge(road, variables, adapter, x)
    y = np.asarray(x, np.float64)
    for i in range(3):
        for j in range(2):
            kernel, bias = (np.asarray(p[name][i, j], np.float64) for name in ("kernel", "bias"))
            y = np.tanh(turn(y @ kernel + bias, jax.tree.map(lambda v, i=i, j=j: v[i, j], leaves)))
    assert_close(found, y, "float32")


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(Inner)(name="block")(x, None)[0]


def test_a_jitted_module(x):
    """`nn.jit` keeps what it traced: calls without, with, and again without an adapter must not mix."""
    road, variables, adapter = adapt(Jitted(), x)
    plain = road.model.apply(variables, x)
    found = check_merge(road, variables, adapter, x)
    np.testing.assert_array_equal(road.model.apply(variables, x), plain)
    assert_close(road.apply(variables, adapter, x), found, "float32", moved_from=plain)


class Halved(nn.Module):
    """A layer that sees its kernel through a function, as weight norm does."""

    @nn.compact
    def __call__(self, x):
        def halve(variables):
            return jax.tree_util.tree_map_with_path(
                lambda path, leaf: leaf / 2 if path[-1].key == "kernel" else leaf, variables
            )

        mapped = nn.map_variables(Inner, "params", trans_in_fn=halve, init=self.is_initializing())
        return mapped(name="block")(x, None)[0]


def test_params_seen_through_a_function(x):
    road, variables, adapter = adapt(Halved(), x)
    found = check_merge(road, variables, adapter, x)
    p = variables["params"]["block"]["dense"]
    y = np.asarray(x, np.float64) @ (np.asarray(p["kernel"], np.float64) / 2) + np.asarray(p["bias"], np.float64)
    assert_close(found, np.tanh(turn(y, adapter["block"]["dense"])), "float32")


class Boxed(nn.Module):
    """Params with the names of their axes, as sharded models have them."""

    @nn.compact
    def __call__(self, x):
        kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        bias = nn.with_partitioning(nn.initializers.ones, ("model",))
        return nn.Dense(64, kernel_init=kernel, bias_init=bias, name="dense")(x)


def test_boxed_params_stay_boxed(x):
    road, variables, adapter = adapt(Boxed(), x)
    assert isinstance(variables["params"]["dense"]["kernel"], nn.Partitioned)
    found = check_merge(road, variables, adapter, x)
    merged = road.merge(variables, adapter)
    assert merged["params"]["dense"]["kernel"].names == variables["params"]["dense"]["kernel"].names
    p = nn.meta.unbox(variables)["params"]["dense"]
    y = np.asarray(x, np.float64) @ np.asarray(p["kernel"], np.float64) + 1
    assert_close(found, turn(y, adapter["dense"]), "float32")


class Tied(nn.Module):
    """An embedding that is the output head as well: no linear layer, so nothing of it turns."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(40, 32, name="embed")
        return embed.attend(nn.Dense(32, name="dense")(embed(ids)))


def test_a_tied_head_stays_as_it_is():
    ids = jnp.arange(10).reshape(2, 5)
    road, variables, adapter = adapt(Tied(), ids)
    assert sorted(adapter) == ["dense"]
    found = check_merge(road, variables, adapter, ids)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    y = turn(p["embed"]["embedding"][np.asarray(ids)] @ p["dense"]["kernel"] + p["dense"]["bias"], adapter["dense"])
    assert_close(found, y @ p["embed"]["embedding"].T, "float32")


def test_a_layer_named_in_vain_is_told(x):
    with pytest.raises(road_core.AdapterError, match="nearest: "):
        adapt(Twice(), x, target_modules=["sharde"])
