import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _compare import assert_close, named_values
from flax import nnx

import road_core
import road_jax
from road_core import AdapterError, RoadConfig
from road_jax.nnx import RoadLayer, RoadParam, unwrap, wrap


class Net(nnx.Module):
    """A shared layer, a list, a sequence and attention: what models are made of."""

    def __init__(self, rngs):
        self.first = nnx.Linear(16, 64, rngs=rngs)
        self.again = self.first
        self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(num_heads=4, in_features=64, decode=False, rngs=rngs)
        self.mix = nnx.Einsum("btd,dhk->bthk", (64, 4, 16), (4, 16), rngs=rngs)
        self.lm_head = nnx.Linear(64, 5, rngs=rngs)

    def __call__(self, x):
        x = self.first(x) + self.again(2 * x)
        for layer in self.layers:
            x = nnx.gelu(layer(x))
        x = x + self.attention(x)
        return self.lm_head(self.mix(x).reshape(x.shape))


def set_values(model):
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, RoadParam):
            name = ".".join(map(str, path))
            variable[...] = jnp.asarray(named_values(name, *variable.shape, mean=float("alpha" in name)))
    return model


@pytest.fixture
def x():
    return jnp.asarray(named_values("x", 2, 3, 16))


@pytest.mark.parametrize("group_size", [2, 8, 64])
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_a_layer_gives_the_references_rotation(variant, group_size, x):
    model = nnx.Sequential(nnx.Linear(16, 128, rngs=nnx.Rngs(0)))
    config = RoadConfig(variant=variant, group_size=group_size, target_modules=["layers.0"])
    adapted = set_values(wrap(model, config))
    layer = adapted.layers[0]
    bare = np.asarray(model(x))
    expected = road_core.rotate(
        bare, layer.road_theta[...], layer.road_alpha[...], variant=variant, group_size=group_size
    )
    assert_close(adapted(x), expected, "float32", moved_from=bare)


def test_wrap_leaves_the_model_as_it_is_and_unwrap_gives_it_back(x):
    model = Net(nnx.Rngs(0))
    before, structure = nnx.state(model), nnx.graphdef(model)
    adapted = wrap(model, RoadConfig(target_modules="all-linear", group_size=8))
    np.testing.assert_array_equal(adapted(x), model(x))
    assert nnx.graphdef(model) == structure
    assert adapted.first is adapted.again
    assert isinstance(adapted.attention.query, RoadLayer)
    assert isinstance(adapted.mix, RoadLayer)
    assert not isinstance(adapted.lm_head, RoadLayer)
    assert adapted.first.base.kernel is model.first.kernel
    set_values(adapted)
    assert float(jnp.abs(adapted(x) - model(x)).max()) > 0.1
    back = unwrap(adapted)
    assert nnx.graphdef(back) == structure
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(back), before))


@pytest.mark.steps_optax
def test_only_the_adapter_is_trained(x):
    adapted = wrap(Net(nnx.Rngs(0)), RoadConfig(target_modules="all-linear", group_size=8))
    base = jax.tree.map(jnp.copy, nnx.state(adapted, nnx.Param))
    optimizer = nnx.Optimizer(adapted, optax.adam(1e-2), wrt=RoadParam)
    target = jnp.asarray(named_values("target", 2, 3, 5))

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean(jnp.square(model(x) - target))

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, RoadParam))(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(adapted, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(adapted, nnx.Param), base))


def test_a_stack_of_layers_gets_stacked_parameters(x):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return nnx.Linear(64, 64, rngs=rngs)

    class Stack(nnx.Module):
        def __init__(self):
            self.layers = make(nnx.Rngs(0))

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def run(layer, x):
                return jnp.tanh(layer(x))

            return run(self.layers, x)

    x = jnp.asarray(named_values("x", 2, 64))
    model = Stack()
    adapted = set_values(wrap(model, RoadConfig(target_modules=["layers"], group_size=8)))
    assert adapted.layers.road_theta.shape == (3, 32)
    expected = np.asarray(x, np.float64)
    for i in range(3):
        y = expected @ np.asarray(model.layers.kernel[i], np.float64) + np.asarray(model.layers.bias[i])
        turned = road_core.rotate(
            y, adapted.layers.road_theta[i], adapted.layers.road_alpha[i], variant="road_1", group_size=8
        )
        expected = np.tanh(turned)
    assert_close(adapted(x), expected, "float32", moved_from=model(x))


def test_split_and_merge(x):
    adapted = set_values(wrap(Net(nnx.Rngs(0)), RoadConfig(target_modules=["first"], group_size=8)))
    structure, adapter, rest = nnx.split(adapted, RoadParam, ...)
    assert len(jax.tree.leaves(adapter)) == 2
    np.testing.assert_array_equal(nnx.merge(structure, adapter, rest)(x), adapted(x))


def test_what_does_not_fit_is_refused():
    model = Net(nnx.Rngs(0))
    with pytest.raises(AdapterError, match="nearest: first"):
        wrap(model, RoadConfig(target_modules=["firsst"]))
    with pytest.raises(AdapterError, match="first: expected a number of outputs that group_size 48 divides, found 64"):
        wrap(model, RoadConfig(target_modules=["first"], group_size=48))
    with pytest.raises(
        AdapterError, match=r"attention: expected nnx\.Linear, nnx\.LinearGeneral or nnx\.Einsum, found Multi"
    ):
        wrap(model, RoadConfig(target_modules=["attention"]))
    with pytest.raises(AdapterError, match="expected rngs"):
        wrap(model, RoadConfig(target_modules=["first"], init_weights=False))
    noisy = road_jax.nnx.wrap(model, RoadConfig(target_modules=["first"], init_weights=False), rngs=nnx.Rngs(3))
    assert 0.2 < float(jnp.std(noisy.first.road_alpha[...])) < 0.8
