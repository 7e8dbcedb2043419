"""Shardings of adapters on eight pretend devices, and the collectives of the compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _compare import assert_close, named_values
from _hlo import collectives
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import road_jax
from road_core import AdapterError, RoadConfig


class Block(nn.Module):
    """A feed-forward block with its outputs split over ``model``, then summed."""

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(64, name="down")(nn.gelu(nn.Dense(512, name="up")(x))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan(name="blocks")(x, None)[0]


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "model"))


@pytest.fixture(scope="module", params=["block", "stack"])
def case(request, mesh):
    """A model, its variables, their shardings and the input."""
    x = jnp.asarray(named_values("x", 4, 8, 64))
    model = Stack() if request.param == "stack" else Block()
    variables = model.init(jax.random.key(0), x)

    def place(path, leaf):
        up = any(key.key == "up" for key in path)
        stack = (None,) * (request.param == "stack")
        if leaf.ndim - len(stack) == 1:
            return NamedSharding(mesh, P(*stack, "model") if up else P())
        return NamedSharding(mesh, P(*stack, None, "model") if up else P(*stack, "model", None))

    where = jax.tree_util.tree_map_with_path(place, variables)
    return model, variables, where, x


def adapted(model, variables, x, **fields):
    road = road_jax.transform(model, RoadConfig(**{"target_modules": ["up", "down"], "group_size": 64, **fields}))
    adapter = road.init(jax.random.key(1), variables, x)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        return jnp.asarray(named_values(name, *leaf.shape, mean=float("alpha" in name)))

    return road, jax.tree_util.tree_map_with_path(fill, adapter)


def result(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_whole_groups_add_no_collective(variant, case, mesh):
    model, variables, where, x = case
    road, adapter = adapted(model, variables, x, variant=variant)
    along = road_jax.shardings(adapter, where, config=road.config)
    specs = jax.tree.leaves(jax.tree.map(lambda s: s.spec, along, is_leaf=lambda s: isinstance(s, NamedSharding)))
    assert any("model" in spec for spec in specs)
    data = NamedSharding(mesh, P("data"))
    placed = [jax.device_put(v, s) for v, s in ((variables, where), (adapter, along), (x, data))]

    plain = jax.jit(lambda v, x: result(model.apply(v, x)))
    turned = jax.jit(lambda v, a, x: result(road.apply(v, a, x)))
    assert collectives(turned, *placed) == collectives(plain, placed[0], placed[2])
    expected = result(road.apply(variables, adapter, x))
    assert_close(turned(*placed), expected, "float32", moved_from=result(model.apply(variables, x)))

    def bias_loss(biases, variables, x):
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: biases if path[-1].key == "bias" and path[-2].key == "up" else leaf, variables
        )
        return jnp.mean(jnp.square(result(model.apply(params, x))))

    def loss(adapter, variables, x):
        return jnp.mean(jnp.square(result(road.apply(variables, adapter, x))))

    backward = jax.jit(jax.grad(loss), out_shardings=along)
    found = collectives(backward, placed[1], placed[0], placed[2])
    # The base's own, and sums of dθ and dα over the data axis; nothing is gathered or exchanged.
    assert set(found) == {"all-reduce"}
    bias = variables["params"]["blocks"]["up"]["bias"] if "blocks" in variables["params"] else None
    if bias is None:
        bias = variables["params"]["up"]["bias"]
    floor = collectives(jax.jit(jax.grad(bias_loss)), bias, placed[0], placed[2])
    assert found["all-reduce"] <= floor["all-reduce"] + len(jax.tree.leaves(adapter))
    gradient = backward(placed[1], placed[0], placed[2])
    for got, want in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(jax.grad(loss)(adapter, variables, x)), strict=True
    ):
        assert_close(got, want, "float32", moved_from=np.zeros_like(want))


def test_cut_groups_are_told_and_cost_what_is_told(case, mesh):
    model, variables, where, x = case
    road, adapter = adapted(model, variables, x, group_size=256, target_modules=["up"])
    with pytest.raises(AdapterError, match=r"up: expected 4 shards of whole groups of 256 outputs, found 512 outputs"):
        road_jax.shardings(adapter, where, config=road.config)
    along = road_jax.shardings(adapter, where, config=road.config, allow_cut=True)
    data = NamedSharding(mesh, P("data"))
    placed = [jax.device_put(v, s) for v, s in ((variables, where), (adapter, along), (x, data))]
    plain = collectives(jax.jit(lambda v, x: result(model.apply(v, x))), placed[0], placed[2])
    turned = jax.jit(lambda v, a, x: result(road.apply(v, a, x)))
    assert collectives(turned, *placed).total() > plain.total()
    expected = result(road.apply(variables, adapter, x))
    assert_close(turned(*placed), expected, "float32", moved_from=result(model.apply(variables, x)))


def test_merged_kernels_keep_their_place(case, mesh):
    model, variables, where, x = case
    road, adapter = adapted(model, variables, x)
    along = road_jax.shardings(adapter, where)
    placed = jax.device_put(variables, where)
    merged = jax.jit(road.merge, out_shardings=where)(placed, jax.device_put(adapter, along))
    expected = road.merge(variables, adapter)
    for got, want in zip(jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True):
        assert_close(got, want, "float32")
    assert jax.tree.all(jax.tree.map(lambda leaf, s: leaf.sharding.is_equivalent_to(s, leaf.ndim), merged, where))


def test_inputs_sharded_alone_replicate_the_adapter(mesh):
    kernel = {"params": {"proj": {"kernel": NamedSharding(mesh, P("data"))}}}
    adapter = {"proj": {"road_theta": np.zeros(64), "road_alpha": np.ones(64)}}
    assert road_jax.shardings(adapter, kernel)["proj"]["road_theta"].spec == P()
    heads = {"params": {"proj": {"kernel": NamedSharding(mesh, P("data", "model", None))}}}
    assert road_jax.shardings(adapter, heads)["proj"]["road_theta"].spec == P("model")


def test_a_module_without_a_sharding_is_named(mesh):
    adapter = {"proj": {"road_theta": np.zeros(64), "road_alpha": np.ones(64)}}
    with pytest.raises(AdapterError, match=r"variables_shardings: expected a dict with params .* found one with proj"):
        road_jax.shardings(adapter, {"proj": {"kernel": NamedSharding(mesh, P())}})
    with pytest.raises(AdapterError, match=r"proj\.kernel: expected a sharding for it"):
        road_jax.shardings(adapter, {"params": {"other": {"kernel": NamedSharding(mesh, P())}}})


class Heads(nn.Module):
    """Kernels with several output or input axes, and with outputs first."""

    @nn.compact
    def __call__(self, x):
        q = nn.DenseGeneral((4, 64), use_bias=False, name="q")(x)
        k = nn.Einsum((4, 64, 64), "btd,hdk->bthk", use_bias=False, name="k")(x)
        one = nn.DenseGeneral((1, 256), use_bias=False, name="one")(x)
        y = nn.DenseGeneral(64, axis=(-2, -1), use_bias=False, name="o")(q * k + one.reshape(q.shape))
        return nn.Einsum((64, 64), "btd,ed->bte", use_bias=False, name="e")(y)


PLACES = {
    # kernel: spec, θ's spec (None: groups are cut)
    "heads": ("q", P(None, "model", None), P("model")),
    "head_dim": ("q", P(None, None, "model"), None),
    "both": ("q", P(None, "data", "model"), None),
    "one head": ("one", P(None, None, "model"), P("model")),
    "inputs first": ("q", P("data", None, None), P()),
    "outputs around the inputs": ("k", P("model", None, None), P("model")),
    "inputs between": ("k", P(None, "model", None), P()),
    "one of two inputs": ("o", P(None, "model", None), P()),
    "outputs behind two inputs": ("o", P("data", None, "model"), P("model")),
    "outputs first": ("e", P("model", None), P("model")),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_layouts_that_init_saw_decide(name, mesh):
    layer, spec, expected = PLACES[name]
    x = jnp.asarray(named_values("x", 4, 8, 64))
    model = Heads()
    variables = model.init(jax.random.key(0), x)
    group = 16 if layer in "oe" else 64
    road, adapter = adapted(model, variables, x, target_modules=[layer], group_size=group)
    where = jax.tree.map(lambda _: NamedSharding(mesh, P()), variables)
    where["params"][layer]["kernel"] = NamedSharding(mesh, spec)
    if expected is None:
        with pytest.raises(AdapterError, match=f"{layer}: expected a kernel whose outputs are sharded by the first"):
            road.shardings(adapter, where)
        # Assumed to be [in, *out], which is right here.
        with pytest.raises(AdapterError, match=f"{layer}: expected a kernel whose outputs are sharded by the first"):
            road_jax.shardings(adapter, where, config=road.config)
    along = road.shardings(adapter, where, allow_cut=expected is None)
    placed = [jax.device_put(v, s) for v, s in ((variables, where), (adapter, along))]
    turned = jax.jit(road.apply)
    if expected is not None:
        assert along[layer]["road_theta"].spec == expected
        assert collectives(turned, *placed, x) == collectives(jax.jit(model.apply), placed[0], x)
    assert_close(turned(*placed, x), road.apply(variables, adapter, x), "float32", moved_from=model.apply(variables, x))

    several = road_jax.stack_adapters([adapter, adapter])
    spec = road.shardings(several, where, allow_cut=True)[layer]["road_theta"].spec
    assert spec == along[layer]["road_theta"].spec


def test_a_stack_on_another_axis(mesh):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=4)
            return scan(name="blocks")(x, None)[0]

    x = jnp.asarray(named_values("x", 4, 8, 64))
    model = Model()
    variables = model.init(jax.random.key(0), x)
    road, adapter = adapted(model, variables, x)
    assert adapter["blocks"]["up"]["road_theta"].shape == (256, 4)
    where = jax.tree.map(lambda _: NamedSharding(mesh, P()), variables)
    where["params"]["blocks"]["up"]["kernel"] = NamedSharding(mesh, P(None, "data", "model"))
    along = road.shardings(adapter, where)
    assert along["blocks"]["up"]["road_theta"].spec == P("model", "data")
    assert along["blocks"]["down"]["road_theta"].spec == P()
    jax.device_put(adapter, along)


def test_where_no_layer_is_known(mesh):
    adapter = {"proj": {"road_theta": jnp.zeros(64), "road_alpha": jnp.ones(64)}}

    def found(spec, adapter=adapter):
        kernel = {"params": {"proj": {"kernel": NamedSharding(mesh, spec)}}}
        return road_jax.shardings(adapter, kernel)["proj"]["road_theta"].spec

    assert found(P(None, "data", "model")) == P("data")
    assert found(P(None, None, "model")) == P()
    # The shares aren't even: a stack of 3 on another axis, or several adapters.
    assert found(P(None, None, "model"), {"proj": dict.fromkeys(adapter["proj"], jnp.ones((64, 3)))}) == P()

    kernel = {"params": {"proj": {"kernel": jnp.ones((64, 128)).sharding}}}
    assert road_jax.shardings(adapter, kernel)["proj"]["road_theta"] == kernel["params"]["proj"]["kernel"]
    with pytest.raises(AdapterError, match="proj: expected a NamedSharding of its kernel, found a P"):
        road_jax.shardings(adapter, {"params": {"proj": {"kernel": P(None, "model")}}})
    road = road_jax.transform(Heads(), RoadConfig(target_modules=["q"]))
    with pytest.raises(AdapterError, match=r"proj: expected a layer that Road\.init has seen before, found none"):
        road.shardings(adapter, kernel)


def test_a_declared_kernel_by_another_name(mesh):
    class Custom(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", nn.initializers.normal(), (64, x.shape[-1])).T

    x = jnp.ones((2, 64))
    model = nn.Sequential([Custom()])
    variables = model.init(jax.random.key(0), x)
    layers = {Custom: lambda *_: road_jax.Layout(kernel_axes=(0,), kernel="w")}
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=16), layers=layers)
    adapter = jax.eval_shape(road.init, jax.random.key(1), variables, x)
    where = {"params": {"layers_0": {"w": NamedSharding(mesh, P("model", None))}}}
    assert road.shardings(adapter, where)["layers_0"]["road_alpha"].spec == P("model")
