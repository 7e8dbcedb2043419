import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _compare import assert_close, named_values
from flax import linen, nnx

import road_core
import road_jax
from road_core import AdapterError, RoadConfig
from road_jax.nnx import RoadLayer, RoadParam, unwrap, wrap


class Net(nnx.Module):
    """A shared layer, a list, a sequence and attention, as real models have them."""

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


ALL = RoadConfig(target_modules="all-linear", group_size=2)


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


def test_all_linear_leaves_out_an_odd_number_of_outputs():
    model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 1, rngs=nnx.Rngs(1)))
    adapted = wrap(model, RoadConfig(target_modules="all-linear", group_size=4))
    assert [type(layer) for layer in adapted.layers] == [RoadLayer, nnx.Linear]


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
        # optax needs dtype promotion.
        with jax.numpy_dtype_promotion("standard"):
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


class ByKind(nnx.Module):
    """A scan that says by kind which Variables are stacked."""

    def __init__(self, *kinds):
        make = nnx.vmap(lambda rngs: nnx.Linear(16, 16, rngs=rngs), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=3)(make)(nnx.Rngs(0))
        self.kinds = kinds

    def __call__(self, x):
        axes = nnx.StateAxes({self.kinds: 0, ...: None})
        return nnx.scan(lambda layer, x: jnp.tanh(layer(x)), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)(
            self.layers, x
        )


def test_a_scan_that_names_kinds_of_variables_must_name_road_params():
    config, x = RoadConfig(target_modules=["layers"], group_size=8), jnp.asarray(named_values("x", 2, 3, 16))
    with pytest.raises(AdapterError, match=r"found shape \[3, 8\] of a whole stack; StateAxes .* must name RoadParam"):
        wrap(ByKind(nnx.Param), config)(x)
    model = ByKind(nnx.Param, RoadParam)
    adapted = set_values(wrap(model, config))
    loop = nnx.List([nnx.Linear(16, 16, rngs=nnx.Rngs(0)) for _ in range(3)])
    for i, layer in enumerate(loop):
        layer.kernel[...], layer.bias[...] = model.layers.kernel[i], model.layers.bias[i]
    in_loop = wrap(nnx.Sequential(*loop), RoadConfig(target_modules=["0", "1", "2"], group_size=8))
    for i, layer in enumerate(in_loop.layers):
        for name in ("road_theta", "road_alpha"):
            getattr(layer, name)[...] = getattr(adapted.layers, name)[i]
    expected = x
    for layer in in_loop.layers:
        expected = jnp.tanh(layer(expected))
    assert_close(adapted(x), expected, "float32", moved_from=model(x))
    road_jax.nnx.set_adapter(adapted, road_jax.stack_adapters([road_jax.nnx.get_adapter(adapted)]))
    mixed = road_jax.nnx.apply(adapted, x, adapter_ids=jnp.asarray([0, 1]))
    assert_close(mixed, jnp.stack([model(x)[0], expected[1]]), "float32")
    # Rotated blocks carry the ids along too, and which blocks of the stack are chosen.
    chosen = road_jax.InterventionConfig(layers=[1], positions="last", group_size=8)
    intervened = road_jax.nnx.intervene(model, chosen, x, blocks=nnx.Linear)
    tree = road_jax.nnx.get_intervention(intervened)
    tree["layers"]["1"]["road_theta"] = jnp.asarray(named_values("theta", 8))
    road_jax.nnx.set_intervention(intervened, tree)
    listed = road_jax.nnx.intervene(
        nnx.Sequential(*[f for layer in loop for f in (layer, jnp.tanh)]), chosen, x, blocks=nnx.Linear
    )
    road_jax.nnx.set_intervention(listed, tree)
    assert_close(intervened(x), listed(x), "float32", moved_from=model(x))


def test_an_intervention_on_a_wrapped_model_leaves_its_adapter(x):
    model = nnx.Sequential(nnx.Linear(16, 64, rngs=nnx.Rngs(0)), nnx.Linear(64, 64, rngs=nnx.Rngs(1)))
    wrapped = set_values(
        wrap(model, RoadConfig(target_modules=["layers.0"], group_size=8, modules_to_save=["layers.1"]))
    )
    adapter = road_jax.nnx.get_adapter(wrapped)
    config = road_jax.InterventionConfig(layers=[0], positions="all", group_size=8)
    both = road_jax.nnx.intervene(wrapped, config, x, blocks=nnx.Linear)
    intervention = jax.tree.map(lambda leaf: leaf + 0.5, road_jax.nnx.get_intervention(both))
    road_jax.nnx.set_intervention(both, intervention)
    assert jax.tree.structure(road_jax.nnx.get_adapter(both)) == jax.tree.structure(adapter)
    road_jax.nnx.set_adapter(both, adapter)
    # The layer's own rotation first, then the block's.
    turned = road_core.rotate(
        wrapped.layers[0](x),
        *(intervention["layers"]["0"][name] for name in ("road_theta", "road_alpha")),
        variant="road_1",
        group_size=8,
    )
    assert_close(both(x), wrapped.layers[1](jnp.asarray(turned, x.dtype)), "float32", moved_from=wrapped(x))
    assert nnx.graphdef(unwrap(both)) == nnx.graphdef(model)
    for adapted in (wrapped, both):
        with pytest.raises(
            AdapterError, match=r"wrap: expected a model that isn't adapted, found RoadLayer at layers\.0"
        ):
            wrap(adapted, RoadConfig(target_modules="all-linear", group_size=8))
    with pytest.raises(
        AdapterError, match=r"intervene: expected a model without interventions, found one at base\.lay"
    ):
        road_jax.nnx.intervene(both, config, x, blocks=nnx.Linear)


def test_a_kernel_that_qwix_quantised_is_not_merged():
    import qwix

    x = jnp.ones((2, 16))
    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8)]
    model = qwix.quantize_model(nnx.Sequential(nnx.Linear(16, 64, rngs=nnx.Rngs(0))), qwix.PtqProvider(rules), x)
    adapted = wrap(model, RoadConfig(target_modules=["layers.0"], group_size=8))
    np.testing.assert_array_equal(adapted(x), model(x))
    with pytest.raises(AdapterError, match=r"layers\.0: expected a plain kernel to merge into, found WithAux"):
        road_jax.nnx.merge(adapted)


@pytest.mark.no_leaks
def test_no_tracer_leaks():
    x = jnp.asarray(named_values("x", 2, 3, 16))
    _, adapted, _ = small()

    @nnx.jit
    def gradient(model, x):
        return nnx.grad(lambda model: jnp.sum(model(x)), argnums=nnx.DiffState(0, RoadParam))(model)

    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient(adapted, x)))
    road_jax.nnx.set_adapter(adapted, road_jax.stack_adapters([road_jax.nnx.get_adapter(adapted)]))
    run = nnx.jit(lambda model, x, ids: road_jax.nnx.apply(model, x, adapter_ids=ids))
    assert run(adapted, x, jnp.asarray([1, 0])).shape == (2, 3, 6)


def test_split_and_merge(x):
    adapted = set_values(wrap(Net(nnx.Rngs(0)), RoadConfig(target_modules=["first"], group_size=8)))
    structure, adapter, rest = nnx.split(adapted, RoadParam, ...)
    assert len(jax.tree.leaves(adapter)) == 2
    np.testing.assert_array_equal(nnx.merge(structure, adapter, rest)(x), adapted(x))


def small(**fields):
    """Two layers of two types under a scan, with an output head."""

    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return Block(rngs)

    class Small(nnx.Module):
        def __init__(self):
            self.blocks = make(nnx.Rngs(0))
            self.head = nnx.Linear(16, 6, rngs=nnx.Rngs(1))

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def run(block, x):
                return block(x)

            return self.head(run(self.blocks, x))

    model = Small()
    config = RoadConfig(**{"target_modules": ["heads", "out"], "group_size": 8, **fields})
    return model, set_values(wrap(model, config)), config


class Block(nnx.Module):
    def __init__(self, rngs):
        # Outputs come first in the kernel.
        self.heads = nnx.Einsum("btd,hkd->bthk", (4, 8, 16), (4, 8), rngs=rngs)
        self.out = nnx.LinearGeneral((4, 8), 16, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return x + self.out(jnp.tanh(self.heads(x)))


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_merge_in_place_and_back(variant, x):
    model, adapted, _ = small(variant=variant)
    base, before = model(x), jax.tree.map(jnp.copy, nnx.state(model))
    turned = adapted(x)
    road_jax.nnx.merge(adapted)
    assert_close(adapted(x), turned, "float32", moved_from=base)
    # The model that was wrapped has the same kernels.
    assert_close(model(x), turned, "float32")
    assert_close(unwrap(adapted)(x), turned, "float32")
    with pytest.raises(AdapterError, match=r"blocks\.heads: expected a layer that isn't merged"):
        road_jax.nnx.merge(adapted)
    road_jax.nnx.unmerge(adapted)
    for found, expected in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(before), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert_close(adapted(x), turned, "float32")
    with pytest.raises(AdapterError, match="expected a merged layer"):
        road_jax.nnx.unmerge(adapted)


def test_rows_with_their_own_adapters(x):
    model, adapted, _ = small()
    a = road_jax.nnx.get_adapter(adapted)
    b = jax.tree.map(lambda leaf: 1.5 * leaf - 0.2, a)
    x = jnp.asarray(named_values("x", 4, 3, 16))
    base, with_a = model(x), adapted(x)
    road_jax.nnx.set_adapter(adapted, b)
    with_b = adapted(x)
    road_jax.nnx.set_adapter(adapted, road_jax.stack_adapters([a, b]))
    traces = []

    @nnx.jit
    def run(model, x, ids):
        traces.append(1)
        return road_jax.nnx.apply(model, x, adapter_ids=ids)

    for ids in ([1, 0, 2, 1], [2, 2, 0, 1]):
        expected = jnp.stack([(base, with_a, with_b)[number][row] for row, number in enumerate(ids)])
        assert_close(run(adapted, x, jnp.asarray(ids)), expected, "float32", moved_from=base)
    assert len(traces) == 1
    with pytest.raises(AdapterError, match=r"found theta .* and outputs"):
        road_jax.nnx.apply(adapted, x, adapter_ids=jnp.asarray([1, 0]))
    for wrong in (3, -1):
        with pytest.raises(AdapterError, match=f"adapter_ids: expected numbers from 0 to 2, found {wrong}"):
            road_jax.nnx.apply(adapted, x, adapter_ids=[1, 0, wrong, 2])
        np.testing.assert_array_equal(
            run(adapted, x, jnp.asarray([1, 0, wrong, 2])), run(adapted, x, jnp.asarray([1, 0, 0, 2]))
        )
    with pytest.raises(AdapterError, match=r"adapter_ids: expected whole numbers \[batch\], found float32 \[4\]"):
        road_jax.nnx.apply(adapted, x, adapter_ids=jnp.ones(4))
    with pytest.raises(AdapterError, match="called without adapter_ids"):
        adapted(x)
    with pytest.raises(AdapterError, match=r"blocks\.heads: expected one adapter to merge"):
        road_jax.nnx.merge(adapted)
    road_jax.nnx.set_adapter(adapted, a)
    np.testing.assert_array_equal(adapted(x), with_a)


class Plain(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.dense(x))


class Jitted(Plain):
    @nnx.jit
    def __call__(self, x):
        return jnp.tanh(self.dense(x))


class Remat(Plain):
    @nnx.remat
    def __call__(self, x):
        return jnp.tanh(self.dense(x))


@pytest.mark.parametrize("kind", [Plain, Jitted, Remat])
def test_ids_reach_layers_in_transforms_of_the_models_own(kind, x):
    model = nnx.Sequential(kind(nnx.Rngs(0)), kind(nnx.Rngs(1)))
    adapted = set_values(wrap(model, RoadConfig(target_modules=["dense"], group_size=8)))
    a = road_jax.nnx.get_adapter(adapted)
    b = jax.tree.map(lambda leaf: 1.5 * leaf - 0.2, a)
    alone = [model(x), adapted(x)]
    road_jax.nnx.set_adapter(adapted, b)
    alone.append(adapted(x))
    road_jax.nnx.set_adapter(adapted, road_jax.stack_adapters([a, b]))
    structure, state = nnx.split(adapted)

    def mixed(model, x, ids):
        return road_jax.nnx.apply(model, x, adapter_ids=ids)

    def loss(model, x, ids):
        return jnp.sum(jnp.square(mixed(model, x, ids)))

    gradient = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, RoadParam)))
    run = nnx.jit(mixed)
    merged = jax.jit(lambda state, x, ids: mixed(nnx.merge(structure, state), x, ids))
    calls = [
        lambda x, ids: mixed(adapted, x, ids),
        lambda x, ids: run(adapted, x, ids),
        lambda x, ids: merged(state, x, ids),
    ]
    if kind is Plain:
        # A function that closes over the model, which Flax refuses if the model has transforms of its own.
        calls.append(jax.jit(calls[0]))
    for ids in ([1, 2], [0, 1], [2, 2]):
        expected = jnp.stack([alone[number][row] for row, number in enumerate(ids)])
        for call in calls:
            assert_close(call(x, jnp.asarray(ids)), expected, "float32", moved_from=alone[0])
        # An adapter that no row uses gets no gradient.
        for leaf in jax.tree.leaves(gradient(adapted, x, jnp.asarray(ids))):
            assert [bool(jnp.any(leaf[:, i] != 0)) for i in (1, 2)] == [1 in ids, 2 in ids]
    with pytest.raises(AdapterError, match=r"found theta .* and outputs"):
        mixed(adapted, x, jnp.asarray([1, 0, 0]))
    assert nnx.graphdef(adapted) == structure
    jax.tree.map(np.testing.assert_array_equal, nnx.state(adapted), state)


def test_two_calls_at_once_are_refused(x):
    class Again(Plain):
        def __call__(self, x):
            return road_jax.nnx.apply(self, x, adapter_ids=jnp.asarray([1, 1]))

    adapted = wrap(Again(nnx.Rngs(0)), RoadConfig(target_modules=["dense"], group_size=8))
    structure = nnx.graphdef(adapted)
    with pytest.raises(AdapterError, match="expected one call at a time outside"):
        road_jax.nnx.apply(adapted, x, adapter_ids=jnp.asarray([1, 0]))
    assert nnx.graphdef(adapted) == structure
    with pytest.raises(AdapterError, match="adapter_ids: expected a model that wrap or intervene gave"):
        road_jax.nnx.apply(unwrap(adapted), x, adapter_ids=jnp.asarray([1, 0]))


def test_save_and_load(x, tmp_path):
    model, adapted, config = small(modules_to_save=["head"])
    adapter = road_jax.nnx.get_adapter(adapted)
    assert adapter["head"]["kernel"].shape == (16, 6)
    road_jax.save_adapter(tmp_path / "a", adapter, config)
    loaded, config = road_jax.load_adapter(tmp_path / "a")
    again = wrap(model, config)
    road_jax.nnx.set_adapter(again, loaded)
    np.testing.assert_array_equal(again(x), adapted(x))
    with pytest.raises(AdapterError, match=r"found no head\.bias, head\.kernel but tail\.bias besides"):
        road_jax.nnx.set_adapter(again, {"blocks": loaded["blocks"], "tail": {"bias": jnp.ones(3)}})
    with pytest.raises(AdapterError, match=r"blocks\.heads\.road_alpha: expected shape \[2, 16\], found \[3, 16\]"):
        road_jax.nnx.set_adapter(again, jax.tree.map(lambda leaf: jnp.ones((3, *leaf.shape[1:])), loaded))


def test_a_name_with_a_dot_is_read_back(tmp_path):
    config = RoadConfig(target_modules="all-linear", group_size=8)
    model = nnx.Dict({"a.b": nnx.Linear(16, 16, rngs=nnx.Rngs(0))})
    adapter = road_jax.nnx.get_adapter(set_values(wrap(model, config)))
    road_jax.save_adapter(tmp_path / "a", adapter, config)
    again = wrap(model, config)
    road_jax.nnx.set_adapter(again, road_jax.load_adapter(tmp_path / "a")[0])
    for a, b in zip(jax.tree.leaves(road_jax.nnx.get_adapter(again)), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(a, b)


def test_saved_modules_are_trained_whole(x):
    model, adapted, _ = small(modules_to_save=["head"])
    before = jax.tree.map(jnp.copy, nnx.state(model))
    optimizer = nnx.Optimizer(adapted, optax.adam(1e-2), wrt=RoadParam)
    gradients = nnx.grad(lambda model: jnp.sum(jnp.square(model(x))), argnums=nnx.DiffState(0, RoadParam))(adapted)
    with jax.numpy_dtype_promotion("standard"):
        optimizer.update(adapted, gradients)
    assert float(jnp.abs(adapted.head.kernel[...] - model.head.kernel[...]).min()) > 1e-3
    same = jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(model), before)
    assert jax.tree.all(same)
    plain = unwrap(adapted)
    assert isinstance(plain.head.kernel, nnx.Param)
    assert not isinstance(plain.head.kernel, RoadParam)
    np.testing.assert_array_equal(plain.head.kernel[...], adapted.head.kernel[...])
    with pytest.raises(AdapterError, match="found no 'tail'"):
        wrap(model, RoadConfig(target_modules=["out"], group_size=8, modules_to_save=["tail"]))


def test_a_kernel_that_two_layers_share_is_not_merged(x):
    model = Net(nnx.Rngs(0))
    model.layers[1].kernel = model.layers[0].kernel
    adapted = set_values(wrap(model, RoadConfig(target_modules=["first", "layers.0"], group_size=8)))
    before = jnp.copy(model.first.kernel[...])
    with pytest.raises(AdapterError, match=r"layers\.0: expected params of its own .* 'layers\.1'\] share one"):
        road_jax.nnx.merge(adapted)
    np.testing.assert_array_equal(model.first.kernel[...], before)
    model.layers[1].kernel = nnx.Param(jnp.copy(model.layers[0].kernel[...]))
    model.tied = model.layers[0].kernel
    with pytest.raises(AdapterError, match=r"layers\.0: expected params of its own .* 'the model'\] share one"):
        road_jax.nnx.merge(wrap(model, RoadConfig(target_modules=["layers.0"], group_size=8)))
    # A layer in two places has only one kernel.
    adapted = set_values(wrap(model, RoadConfig(target_modules=["first"], group_size=8)))
    turned = adapted(x)
    road_jax.nnx.merge(adapted)
    assert_close(adapted(x), turned, "float32")


def test_what_is_set_on_a_layer_is_set_on_the_base(x):
    plain, model = (nnx.Sequential(nnx.Linear(16, 64, rngs=nnx.Rngs(0))) for _ in range(2))
    block = road_jax.InterventionConfig(layers=[0], positions="all", group_size=8)
    adapted = road_jax.nnx.wrap(model, RoadConfig(target_modules=["layers.0"], group_size=8))
    theta, kernel = jnp.asarray(named_values("theta", 32)), jnp.asarray(named_values("new", 16, 64))
    adapted.layers[0].road_theta = RoadParam(theta)
    turned = road_jax.nnx.intervene(adapted, block, x, blocks=nnx.Linear)
    steps = (
        {"kernel": nnx.Param(kernel), "bias": nnx.Param(jnp.ones(64))},
        {"bias": None, "use_bias": False},
        {"dtype": jnp.bfloat16},
    )
    for values in steps:
        for layer in (plain.layers[0], turned.layers[0]):
            for name, value in values.items():
                setattr(layer, name, value)
        y, found = plain(x), turned(x)
        assert found.dtype == y.dtype
        bare = np.asarray(y, np.float64)
        expected = road_core.rotate(bare, np.asarray(theta), np.ones(32), variant="road_1", group_size=8)
        assert_close(np.asarray(found, np.float64), expected, str(y.dtype), moved_from=bare)
    del turned.layers[0].bias
    assert not hasattr(unwrap(turned).layers[0], "bias")


class Tanh(nnx.Linear):
    """A layer that does more than its parent."""

    def __call__(self, x):
        return jnp.tanh(super().__call__(x))


class Backwards(nnx.Module):
    """A layer that isn't Flax's."""

    def __init__(self):
        self.w = nnx.Param(jnp.asarray(named_values("w", 64, 16)))

    def __call__(self, x):
        return x @ self.w[...].T


def test_layer_types_that_are_not_flaxs(x):
    config = RoadConfig(target_modules=["layers.0"], group_size=8)
    with pytest.raises(
        AdapterError, match=r"layers\.0: expected nnx\.Linear, .* that wrap's layers declare, found Tanh"
    ):
        wrap(nnx.Sequential(Tanh(16, 64, rngs=nnx.Rngs(0))), config)
    model = nnx.Sequential(Backwards())
    layers = {Backwards: lambda _: road_jax.Layout(kernel_axes=(0,), kernel="w")}
    adapted = set_values(wrap(model, config, layers=layers))
    layer = adapted.layers[0]
    bare = np.asarray(model(x))
    theta, alpha = layer.road_theta[...], layer.road_alpha[...]
    expected = road_core.rotate(bare, theta, alpha, variant="road_1", group_size=8)
    assert_close(adapted(x), expected, "float32", moved_from=bare)
    road_jax.nnx.merge(adapted)
    assert_close(unwrap(adapted)(x), expected, "float32")


def test_a_model_may_be_one_layer(x):
    model = nnx.Linear(16, 64, rngs=nnx.Rngs(0))
    adapted = set_values(wrap(model, RoadConfig(target_modules="all-linear", group_size=8)))
    arrays = [np.asarray(road_jax.nnx.get_adapter(adapted)[name]) for name in ("road_theta", "road_alpha")]
    bare = np.asarray(model(x), np.float64)
    expected = road_core.rotate(bare, *arrays, variant="road_1", group_size=8)
    assert_close(adapted(x), expected, "float32", moved_from=bare)
    several = wrap(model, RoadConfig(target_modules=".*", group_size=8))
    road_jax.nnx.set_adapter(several, road_jax.stack_adapters([road_jax.nnx.get_adapter(adapted)]))
    found = road_jax.nnx.apply(several, x, adapter_ids=[1, 0])
    assert_close(found, np.stack([expected[0], bare[1]]), "float32")
    assert unwrap(adapted)(x).tolist() == model(x).tolist()
    road_jax.nnx.merge(adapted)
    assert_close(unwrap(adapted)(x), expected, "float32")


class Tree(nnx.Pytree):
    def __init__(self):
        self.up = nnx.Linear(4, 64, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.up(x)


def test_trees_that_are_no_modules_are_wrapped():
    config = RoadConfig(target_modules=["up"], group_size=8)
    adapted = road_jax.nnx.wrap(Tree(), config)
    assert adapted(jnp.ones((2, 4))).shape == (2, 64)
    for tree in (adapted, road_jax.nnx.wrap({"up": nnx.Linear(4, 64, rngs=nnx.Rngs(0))}, config)):
        assert road_jax.nnx.get_adapter(tree)["up"]["road_theta"].shape == (32,)


class Containers(nnx.Module):
    """Layers in plain containers, which need no wrapper where a module is no pytree."""

    def __init__(self, rngs):
        self.blocks = nnx.data([nnx.Linear(16, 16, rngs=rngs), {"inner": nnx.Linear(16, 16, rngs=rngs)}])
        self.last = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        return self.last(self.blocks[1]["inner"](nnx.gelu(self.blocks[0](x))))


class NoTree(Containers, pytree=False):
    def __init__(self, rngs):
        self.blocks = [nnx.Linear(16, 16, rngs=rngs), {"inner": nnx.Linear(16, 16, rngs=rngs)}]
        self.last = nnx.Linear(16, 16, rngs=rngs)


@pytest.mark.parametrize("kind", [Containers, NoTree])
def test_layers_in_plain_containers(kind, x):
    model = kind(nnx.Rngs(0))
    adapted = set_values(wrap(model, ALL))
    adapter = road_jax.nnx.get_adapter(adapted)
    assert jax.tree.map(jnp.shape, adapter["blocks"]["1"]["inner"]) == {"road_alpha": (8,), "road_theta": (8,)}
    assert adapter.keys() == {"blocks", "last"}
    y, bare = adapted(x), model(x)
    second = wrap(model, ALL)
    np.testing.assert_array_equal(second(x), bare)
    road_jax.nnx.set_adapter(second, adapter)
    assert_close(second(x), y, "float32", moved_from=bare)
    road_jax.nnx.merge(second)
    assert_close(unwrap(second)(x), y, "float32", moved_from=bare)


def test_layers_in_tuples_are_refused(x):
    model = Containers(nnx.Rngs(0))
    model.blocks = nnx.data((model.blocks[0], model.blocks[1]))
    said = r"^blocks\.0: expected a module in an attribute, a list or a dict, found one in a tuple$"
    with pytest.raises(AdapterError, match=said):
        wrap(model, ALL)
    config = road_jax.InterventionConfig(layers=[0], group_size=2)
    with pytest.raises(AdapterError, match=said):
        road_jax.nnx.intervene(model, config, x, blocks=nnx.Linear)
    wrap(model, RoadConfig(target_modules=["last"], group_size=2))


@pytest.mark.parametrize("bias", [True, False])
def test_a_stack_on_another_axis_is_refused(bias):
    @nnx.vmap(in_axes=0, out_axes=nnx.StateAxes({nnx.Param: 1}))
    def make(rngs):
        return nnx.Linear(16, 8, use_bias=bias, rngs=rngs)

    # With the depth of the inputs' number, the bias alone shows it.
    for depth in (3, 16) if bias else (3,):
        model = nnx.Sequential(make(nnx.Rngs(0).fork(split=depth)))
        with pytest.raises(AdapterError, match=r"layers\.0: expected stack axes first, found a kernel of shape"):
            wrap(model, ALL)


def test_what_does_not_fit_is_refused():
    model = Net(nnx.Rngs(0))
    with pytest.raises(AdapterError, match="nearest: first"):
        wrap(model, RoadConfig(target_modules=["firsst"]))
    with pytest.raises(AdapterError, match="first: expected a number of outputs that group_size 48 divides, found 64"):
        wrap(model, RoadConfig(target_modules=["first"], group_size=48))
    with pytest.raises(
        AdapterError, match=r"attention: expected nnx\.Linear, nnx\.LinearGeneral or nnx\.Einsum, .* found Multi"
    ):
        wrap(model, RoadConfig(target_modules=["attention"]))
    with pytest.raises(AdapterError, match="expected rngs"):
        wrap(model, RoadConfig(target_modules=["first"], init_weights=False))
    with pytest.raises(AdapterError, match="rngs: expected Rngs, found ArrayImpl"):
        wrap(model, RoadConfig(target_modules=["first"]), rngs=jax.random.PRNGKey(0))
    with pytest.raises(AdapterError, match=r"model: expected an NNX module \(for Linen: .*\), found Dense"):
        wrap(linen.Dense(2), RoadConfig(target_modules=["first"]))
    with pytest.raises(AdapterError, match="config: expected RoadConfig, found dict"):
        wrap(model, {})
    with pytest.raises(AdapterError, match="adapter: expected a nested dict of arrays, found NoneType"):
        road_jax.nnx.set_adapter(wrap(model, RoadConfig(target_modules=["first"])), None)
    noisy = road_jax.nnx.wrap(model, RoadConfig(target_modules=["first"], init_weights=False), rngs=nnx.Rngs(3))
    assert 0.2 < float(jnp.std(noisy.first.road_alpha[...])) < 0.8


@pytest.mark.parametrize("norm", [nnx.WeightNorm, nnx.SpectralNorm])
def test_a_layer_in_a_norm_of_its_params_is_refused(norm):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(norm(nnx.Linear(16, 16, rngs=rngs), rngs=rngs), nnx.Linear(16, 16, rngs=rngs))
    config = RoadConfig(target_modules="all-linear", group_size=8)
    said = rf"layers\.0\.layer_instance: expected a layer in no norm of its params, found one in nnx\.{norm.__name__}"
    with pytest.raises(AdapterError, match=said):
        wrap(model, config)
    adapted = wrap(model, RoadConfig(target_modules="all-linear", group_size=8, exclude_modules=["layer_instance"]))
    assert list(road_jax.nnx.get_adapter(adapted)["layers"]) == ["1"]
    assert adapted(jnp.ones((4, 16))).shape == (4, 16)
    whole = RoadConfig(target_modules=["layers.1"], group_size=8, modules_to_save=["layers.0"])
    if norm is nnx.SpectralNorm:
        said = r"modules_to_save: expected modules without nnx\.SpectralNorm, found \['layers\.0'\] with params in one"
        with pytest.raises(AdapterError, match=said):
            wrap(model, whole)
    else:
        np.testing.assert_array_equal(wrap(model, whole)(jnp.ones((4, 16))), model(jnp.ones((4, 16))))


def test_theta_and_alpha_that_do_not_go_together_are_refused():
    adapted = road_jax.nnx.wrap(Net(nnx.Rngs(0)), RoadConfig(target_modules=["layers.0"]))
    leaves = road_jax.nnx.get_adapter(adapted)["layers"]["0"]
    for theta, said in (
        (jnp.zeros((32, 3)), r"layers\.0: expected .* of one shape, found \[32, 3\] and \[32\]"),
        (jnp.zeros(32, int), r"layers\.0\.road_theta: expected an array of floating-point numbers, found int32"),
        (None, r"layers\.0\.road_theta: expected an array of floating-point numbers, found NoneType"),
    ):
        with pytest.raises(AdapterError, match=said):
            road_jax.nnx.set_adapter(adapted, {"layers": {"0": {**leaves, "road_theta": theta}}})
    np.testing.assert_array_equal(adapted.layers[0].road_theta[...], leaves["road_theta"])
