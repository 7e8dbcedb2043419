"""What merging accepts, what it knows and what it refuses to guess."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from _compare import assert_close, named_values
from flax import linen as nn
from flax.core import FrozenDict, freeze

import road_jax
from road_core import AdapterError, RoadConfig


class Stack(nn.Module):
    """As many layers as each has inputs and outputs, so that sizes don't show which axis is the stack's."""

    axis: int = 0
    size: int = 16

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return jnp.tanh(nn.Dense(x.shape[-1], name="up")(x)), None

        lifted = nn.scan(Layer, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=self.size)
        return lifted(name="layers")(x, None)[0]


def adapt(model, *inputs, noise=0.05, **fields):
    variables = model.init(jax.random.key(0), *inputs)
    road = road_jax.transform(model, RoadConfig(**{"target_modules": "all-linear", "group_size": 8, **fields}))
    adapter = road.init(jax.random.key(1), variables, *inputs)
    leaves, tree = jax.tree.flatten(adapter)
    leaves = [
        leaf + noise * jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)
    ]
    return road, variables, jax.tree.unflatten(tree, leaves)


def check(road, merged, variables, adapter, *inputs):
    expected = road.apply(variables, adapter, *inputs)
    assert_close(
        road.model.apply(merged, *inputs), expected, "float32", moved_from=road.model.apply(variables, *inputs)
    )


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_trace_tells_a_stacks_axis_where_sizes_do_not(axis):
    x = jnp.asarray(named_values("x", 2, 16))
    road, variables, adapter = adapt(Stack(axis), x, variant="road_2")
    assert adapter["layers"]["up"]["road_theta"].shape == (16, 16)
    merged = jax.jit(road.merge)(variables, adapter)
    check(road, merged, variables, adapter, x)
    back = road.unmerge(merged, adapter)
    for old, new in zip(jax.tree.leaves(variables), jax.tree.leaves(back), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-5)

    fresh = road_jax.transform(road.model, road.config)
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"layers\.up\.kernel: expected sample inputs of the model, to find"):
            fresh.merge(variables, adapter)
        # This reveals the layer's layout, but not the stack's axis.
        fresh.apply(variables, adapter, x)
    merged = fresh.merge(variables, adapter, x)
    check(road, merged, variables, adapter, x)

    # A singular block in the last layer, to show that the stack's axis is known here too.
    theta, alpha = (np.moveaxis(np.array(adapter["layers"]["up"][n]), axis, 0) for n in ("road_theta", "road_alpha"))
    theta[-1, :], alpha[-1, ::8] = 0, 0
    singular = {"layers": {"up": {"road_theta": theta, "road_alpha": alpha}}}
    singular = jax.tree.map(lambda leaf: jnp.asarray(np.moveaxis(leaf, 0, axis)), singular)
    with pytest.raises(AdapterError, match=r"layers\.up: expected 2x2 blocks that have an inverse, found 2 with"):
        road.unmerge(merged, singular)


def test_a_square_kernel_is_in_out_unless_the_model_is_seen():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Einsum((16, 16), "...d,od->...o", name="out")(nn.Dense(16, name="dense")(x))

    x = jnp.asarray(named_values("x", 2, 16))
    road, variables, adapter = adapt(Model(), x)
    fresh = road_jax.transform(road.model, road.config)
    dense = {"dense": adapter["dense"]}
    check(road, fresh.merge(variables, dense), variables, dense, x)
    check(road, fresh.merge(variables, adapter, x), variables, adapter, x)


def test_sample_inputs_are_as_for_init():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, *, deterministic):
            return nn.Dropout(0.5, deterministic=deterministic)(nn.Einsum((16, 16), "...d,od->...o")(x))

    x = jnp.asarray(named_values("x", 2, 16))
    variables = Model().init(jax.random.key(0), x, deterministic=True)
    config = RoadConfig(target_modules=["Einsum_0"], group_size=8, init_weights=False)
    road = road_jax.transform(Model(), config)
    adapter = road.init(jax.random.key(1), variables, x, deterministic=True)
    expected = jax.tree.leaves(road.merge(variables, adapter))
    fresh = road_jax.transform(Model(), config)
    merged = fresh.merge(variables, adapter, x, deterministic=False, rngs={"dropout": jax.random.key(2)})
    for found, leaf in zip(jax.tree.leaves(merged), expected, strict=True):
        np.testing.assert_array_equal(found, leaf)
    options = {"deterministic": False, "rngs": {"dropout": jax.random.key(2)}, "mutable": ["intermediates"]}
    again = road_jax.transform(Model(), config).init(jax.random.key(1), variables, x, **options)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, adapter))
    merged = road_jax.transform(Model(), config).merge(variables, adapter, x, **options)
    for found, leaf in zip(jax.tree.leaves(merged), expected, strict=True):
        np.testing.assert_array_equal(found, leaf)
    with pytest.raises(AdapterError, match="quantize: expected kernels of Dense layers, found none"):
        road_jax.transform(Model(), config).quantize(variables, "int8", x, **options)
    with pytest.raises(AdapterError, match="other: expected a linear layer of the model, found none"):
        fresh.merge(variables, {"other": adapter["Einsum_0"]}, x, deterministic=True)


def test_a_kernel_of_another_kind_is_refused():
    x = jnp.asarray(named_values("x", 2, 16))
    road, variables, adapter = adapt(nn.Sequential([nn.Dense(16)]), x)
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8)
    quantized = qwix.quantize_model(road.model, qwix.PtqProvider([rule]))
    shapes = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    params = qwix.quantize_params(variables["params"], shapes)
    with pytest.raises(AdapterError, match=r"layers_0\.kernel: expected a floating-point array .*, found a WithAux"):
        road.merge({"params": params}, adapter)
    codes = {"params": {"layers_0": {"kernel": jnp.ones((16, 16), jnp.int8)}}}
    for change in (road.merge, road.unmerge):
        with pytest.raises(
            AdapterError, match=r"layers_0\.kernel: expected a floating-point array .*, found one of int8"
        ):
            change(codes, adapter)


def test_a_wide_kernel_is_rotated_in_its_own_dtype():
    with jax.enable_x64(True):
        model = nn.Sequential([nn.Dense(16, dtype=jnp.float64, param_dtype=jnp.float64)])
        x = jnp.asarray(named_values("x", 2, 16), jnp.float64)
        road, variables, adapter = adapt(model, x, noise=0.0)
        for old, new in zip(jax.tree.leaves(variables), jax.tree.leaves(road.merge(variables, adapter)), strict=True):
            np.testing.assert_array_equal(new, old)


@pytest.mark.no_leaks
@pytest.mark.parametrize("frozen", [False, True])
def test_the_structure_stays(frozen):
    x = jnp.asarray(named_values("x", 2, 16))
    road, variables, adapter = adapt(nn.Sequential([nn.Dense(16)]), x)
    variables = {"params": {**variables["params"], "empty": {}}, "cache": {}}
    variables = freeze(variables) if frozen else variables
    merged = road.merge(variables, adapter)
    assert isinstance(merged, FrozenDict) == frozen
    assert jax.tree.structure(merged) == jax.tree.structure(variables)
    assert jax.tree.structure(road.unmerge(merged, adapter)) == jax.tree.structure(variables)
    check(road, merged, variables, adapter, x)
