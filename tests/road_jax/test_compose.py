"""Subspaces and composition in JAX, against road_core's float64."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _compare import assert_close, named_values
from _models import small_checkpoint
from flax import linen as nn
from flax import nnx
from rich.console import Console

import road_core
import road_jax
from road_core import AdapterError, RoadConfig, parameter_size, read_flax, subspace_mask
from road_jax._io import to_record
from road_jax.train import TrainOptions, train

VARIANTS = ["road_1", "road_2", "road_4"]
PAIRS = [("road_1", "road_1"), ("road_1", "road_2"), ("road_2", "road_2"), ("road_4", "road_1")]
OUT, LAYERS = 64, 3
X = jnp.asarray(named_values("x", 4, 5, OUT))


class Net(nn.Module):
    """A stack, on either axis, and a layer beside it."""

    axis: int = 0
    layers: int = LAYERS

    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return layer(x), None

        scan = nn.scan(body, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=self.layers)
        x, _ = scan(nn.Dense(OUT, name="stack"), x, None)
        return nn.Dense(OUT, name="top")(x)


def config(variant="road_1", **fields):
    return RoadConfig(**{"variant": variant, "group_size": 8, "target_modules": ["stack", "top"], **fields})


def values(name, variant="road_1", modules=("stack", "top"), std=0.4, layers=LAYERS):
    """An adapter of `Net` whose values depend on its name."""
    size = parameter_size(variant, OUT)
    shapes = {"stack": (layers, size), "top": (size,)}
    return {
        module: {
            "road_theta": jnp.asarray(named_values(f"{name} {module} t", *shapes[module], std=std)),
            "road_alpha": jnp.asarray(named_values(f"{name} {module} a", *shapes[module], mean=1, std=0.1)),
        }
        for module in modules
    }


@pytest.fixture(scope="module")
def net():
    model = Net()
    return model, model.init(jax.random.key(0), X)


def expected(variables, *pairs):
    """The net's output with adapters applied one after the other, in float64."""
    y = np.asarray(X, np.float64)
    params = variables["params"]
    for layer in [("stack", i) for i in range(len(params["stack"]["bias"]))] + [("top", None)]:
        name, i = layer
        kernel, bias = (np.asarray(params[name][leaf], np.float64) for leaf in ("kernel", "bias"))
        y = y @ (kernel if i is None else kernel[i]) + (bias if i is None else bias[i])
        for adapter, c in pairs:
            if name in adapter:
                both = (adapter[name][leaf] for leaf in ("road_theta", "road_alpha"))
                theta, alpha = (v if i is None else v[i] for v in both)
                y = road_core.rotate(y, theta, alpha, variant=c.variant, group_size=c.group_size, subspace=c.subspace)
    return y


def same(found, other):
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(one, two)


# Subspaces


@pytest.mark.parametrize("variant", VARIANTS)
def test_apply_merge_and_mixed_batches_know_the_subspace(variant, net):
    model, variables = net
    road = road_jax.transform(model, config(variant, subspace=(0.25, 0.6)))
    fresh = road.init(jax.random.key(1), variables, X)
    adapter = values("a", variant)
    assert jax.tree.map(jnp.shape, adapter) == jax.tree.map(jnp.shape, fresh)
    found = jax.jit(road.apply)(variables, adapter, X)
    assert_close(found, expected(variables, (adapter, road.config)), "float32", moved_from=expected(variables))
    everywhere = expected(variables, (adapter, config(variant)))
    assert not np.allclose(found, everywhere, atol=1e-2)
    merged = road.merge(variables, adapter)
    assert_close(model.apply(merged, X), found, "float32")
    assert_close(model.apply(road.unmerge(merged, adapter), X), expected(variables), "float32")
    mixed = road.apply(variables, road_jax.stack_adapters([adapter]), X, adapter_ids=np.asarray([1, 0, 1, 0], np.int32))
    assert_close(mixed[0], found[0], "float32")
    assert_close(mixed[1], expected(variables)[1], "float32")


@pytest.mark.parametrize(("axis", "variant"), [(0, "road_1"), (1, "road_2"), (0, "road_4")])
def test_training_touches_its_blocks_only(variant, axis):
    model = Net(axis)
    variables = model.init(jax.random.key(0), X)
    road = road_jax.transform(model, config(variant, subspace=(0, 0.5)))
    adapter = road.init(jax.random.key(1), variables, X)
    tx = optax.adamw(0.1, weight_decay=0.5)
    state = tx.init(adapter)

    @jax.jit
    def step(adapter, state):
        gradient = jax.grad(lambda adapter: jnp.sum(jnp.square(road.apply(variables, adapter, X) - 1)))(adapter)
        # optax needs dtype promotion.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(gradient, state, adapter)
            return optax.apply_updates(adapter, updates), state, gradient

    mask = subspace_mask(OUT, variant=variant, group_size=8, subspace=(0, 0.5))
    for _ in range(2):
        adapter, state, gradient = step(adapter, state)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
            # Under a scan over axis 1, θ has its layers last.
            rows = np.moveaxis(leaf, 0, -1) if axis and "stack" in jax.tree_util.keystr(path) else leaf
            np.testing.assert_array_equal(rows[..., ~mask], 0)
            assert np.abs(rows[..., mask]).max() > 0
    # Weight decay has changed α outside, but not the function.
    assert (adapter["top"]["road_alpha"][~mask] != 1).all()
    cleared, back = road_jax.compose([{"top": adapter["top"]}], [road.config])
    assert back.subspace == (0, 0.5)
    np.testing.assert_array_equal(cleared["top"]["road_alpha"][~mask], 1)
    same(jax.tree.map(lambda v: v[mask], cleared), jax.tree.map(lambda v: v[mask], {"top": adapter["top"]}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_nnx(variant):
    model = nnx.Sequential(nnx.Linear(OUT, OUT, rngs=nnx.Rngs(0)))
    fields = {"target_modules": ["layers.0"], "subspace": (0.5, 1)}
    adapted = road_jax.nnx.wrap(model, config(variant, **fields))
    layer, (theta, alpha) = adapted.layers[0], values("a", variant)["top"].values()
    layer.road_theta[...], layer.road_alpha[...] = theta, alpha
    reference = road_core.rotate(model(X), theta, alpha, variant=variant, group_size=8, subspace=(0.5, 1))
    assert_close(adapted(X), reference, "float32", moved_from=model(X))
    gradient = nnx.grad(lambda m: jnp.sum(jnp.square(m(X))), argnums=nnx.DiffState(0, road_jax.nnx.RoadParam))(adapted)
    mask = subspace_mask(OUT, variant=variant, group_size=8, subspace=(0.5, 1))
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf[~mask], 0)
        assert np.abs(leaf[mask]).max() > 0
    with pytest.raises(AdapterError, match=r"layers.0: expected a subspace that .* one of 32 blocks"):
        road_jax.nnx.wrap(model, config(variant, target_modules=["layers.0"], subspace=(0, 0.01)))


def test_a_layer_too_small_is_named(net):
    model, variables = net
    road = road_jax.transform(model, config(subspace=(0.99, 1)))
    with pytest.raises(AdapterError, match=r"stack: expected a subspace that .* one of 32 blocks, found \(0.99, 1.0\)"):
        road.init(jax.random.key(0), variables, X)


def test_road_train(tmp_path):
    base, data = small_checkpoint(tmp_path / "base", num_hidden_layers=1), tmp_path / "data.jsonl"
    data.write_text('{"prompt": "one two", "completion": "three four"}\n' * 8)
    options = TrainOptions(
        base=base,
        data=data,
        out=tmp_path / "run",
        max_length=32,
        steps=2,
        learning_rate=0.1,
        weight_decay=0.5,
        eval_lines=0,
        variant="road_2",
        subspace=(0.5, 1),
    )
    result = train(options, console=Console(file=io.StringIO()))
    adapter = read_flax(options.out)
    assert adapter.config.subspace == (0.5, 1)
    assert result.parameters == sum(theta.size for theta, _ in adapter.modules.values())
    for theta, alpha in adapter.modules.values():
        mask = subspace_mask(theta.shape[-1], variant="road_2", group_size=64, subspace=(0.5, 1))
        assert (theta[..., ~mask] == 0).all()
        assert (alpha[..., ~mask] == 1).all()
        assert (theta[..., mask] != 0).any()


# Composition


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_one_after_the_other(first, second, net):
    model, variables = net
    pairs = [
        (values("a", first), config(first)),
        (values("b", second, ["top"]), config(second, target_modules=["top"])),
    ]
    adapters, configs = zip(*pairs, strict=True)
    composed, both = road_jax.compose(adapters, configs)
    assert both == config(max(first, second))
    traced = jax.jit(lambda adapters: road_jax.compose(adapters, configs)[0])(adapters)
    found = road_jax.transform(model, both).apply(variables, composed, X)
    assert_close(found, expected(variables, *pairs), "float32", moved_from=expected(variables, pairs[0]))
    record = road_core.compose([to_record(*pair) for pair in pairs])
    assert record.config == both
    for module, arrays in record.modules.items():
        for leaf, array in zip(("road_theta", "road_alpha"), arrays, strict=True):
            assert_close(composed[module][leaf], array, "float32")
            assert_close(traced[module][leaf], array, "float32")


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_disjoint_subspaces_compose_exactly_in_any_order(first, second):
    a, b = (
        (values("a", first), config(first, subspace=(0, 0.3))),
        (values("b", second), config(second, subspace=(0.3, 1))),
    )
    one, both = road_jax.compose([a[0], b[0]], [a[1], b[1]])
    other, _ = road_jax.compose([b[0], a[0]], [b[1], a[1]])
    assert both.subspace is None
    same(one, other)
    record = road_core.compose([to_record(*a), to_record(*b)])
    for module, arrays in record.modules.items():
        for leaf, array in zip(("road_theta", "road_alpha"), arrays, strict=True):
            np.testing.assert_array_equal(one[module][leaf], array)


def turn(tree):
    """Moves a stack's layers from axis 0 to axis 1, or back."""
    return {**tree, "stack": {name: jnp.swapaxes(leaf, 0, 1) for name, leaf in tree["stack"].items()}}


@pytest.mark.parametrize(("first", "second"), [("road_1", "road_1"), ("road_1", "road_2"), ("road_2", "road_2")])
def test_a_stack_on_another_axis(first, second):
    """As many layers as could be outputs: taken for them, they'd be composed without an error."""
    model = Net(axis=1, layers=8)
    variables = model.init(jax.random.key(0), X)
    pairs = [
        (values("a", first, layers=8), config(first, subspace=(0, 0.5))),
        (values("b", second, layers=8), config(second, subspace=(0.25, 1))),
    ]
    configs = [c for _, c in pairs]
    plain = {"params": turn(variables["params"])}
    found, both = road_jax.compose([turn(a) for a, _ in pairs], configs, [1, -1], axis=0)
    traced = jax.jit(lambda adapters: road_jax.compose(adapters, configs, [1, -1], axis=0)[0])(
        [turn(a) for a, _ in pairs]
    )
    undone, _ = road_jax.compose([pairs[1][0]], [configs[1]], [-1])
    reference = expected(plain, pairs[0], (undone, config(second)))
    assert_close(
        road_jax.transform(model, both).apply(variables, found, X), reference, "float32", moved_from=expected(plain)
    )
    jax.tree.map(lambda one, other: assert_close(one, other, "float32"), traced, found)
    record = road_core.compose([to_record(turn(a), c) for a, c in pairs], [1, -1], axis=0)
    for module, arrays in record.modules.items():
        for leaf, array in zip(("road_theta", "road_alpha"), arrays, strict=True):
            assert_close(found[module][leaf], array, "float32")
    # Of road_4 so few layers can't be outputs.
    with pytest.raises(
        AdapterError, match=r"stack: expected outputs .* axis -1 of θ \[128, 8\], found 4 there and 64 on"
    ):
        road_jax.compose([turn(values("a", "road_4", layers=8))], [config("road_4")])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_on_several_subspaces_in_a_batch(variant, axis):
    model = Net(axis, layers=8)
    variables = model.init(jax.random.key(0), X)
    pairs = [
        (values("a", variant, layers=8), config(variant, subspace=(0, 0.5))),
        (values("b", variant, ["top"]), config(variant, subspace=(0.5, 1), target_modules=["top"])),
        (values("c", variant, layers=8), config(variant)),
    ]
    plain = {"params": turn(variables["params"])} if axis else variables
    laid = [turn(a) if axis and "stack" in a else a for a, _ in pairs]
    # In a Dense's stack θ has its layers where the kernel has them.
    several = road_jax.stack_adapters(laid, configs=[c for _, c in pairs], axis=0 if axis else -1)
    road = road_jax.transform(model, config(variant))
    found = jax.jit(road.apply)(variables, several, X, adapter_ids=np.asarray([2, 1, 0, 3], np.int32))
    for row, chosen in enumerate([pairs[1:2], pairs[:1], [], pairs[2:]]):
        reference = expected(plain, *chosen)[row]
        assert_close(found[row], reference, "float32", moved_from=expected(plain)[row] if chosen else None)


def test_configs_that_do_not_stack_are_refused():
    a, b = values("a"), values("b")

    def refused(message, *configs):
        with pytest.raises(AdapterError, match=message) as caught:
            road_jax.stack_adapters([a, b], configs=configs[0] if len(configs) == 1 else configs)
        assert "\n" not in str(caught.value)

    refused("one variant and group size, found road_1 and 8 in adapter 0, road_2 and 8 in", config(), config("road_2"))
    refused("found road_1 and 8 in adapter 0, road_1 and 16 in adapter 1", config(), config(group_size=16))
    refused("stack_adapters: expected a config for each of 2 adapters, found RoadConfig", config())
    refused("stack_adapters: expected a config for each of 2 adapters, found 3", config(), config(), config())
    refused("config of adapter 1: expected RoadConfig, found dict", config(), {})
    with pytest.raises(AdapterError, match=r"stack: expected outputs .* found 6 there and 64 on axis 0: say axis=0"):
        road_jax.stack_adapters([turn(a)], configs=[config()])


def test_weights(net):
    a, b = values("a"), values("b")
    found, _ = road_jax.compose([a, b], [config(), config()], [0.7, -1])
    record = road_core.compose([to_record(a, config()), to_record(b, config())], [0.7, -1])
    assert_close(found["stack"]["road_theta"], record.modules["stack"][0], "float32")
    assert_close(found["stack"]["road_alpha"], record.modules["stack"][1], "float32")
    for variant in ("road_2", "road_4"):
        c, d = values("a", variant, std=0.15), values("b", variant)
        found, both = road_jax.compose([c, d, c], [config(variant)] * 3, [3, 0, -2.0])
        whole = road_jax.transform(net[0], both).apply(net[1], found, X)
        assert_close(whole, expected(net[1], (c, config(variant))), "float32")
    # Known numbers as arrays are numbers, under jit too, around adapters that aren't its arguments.
    for weights in ([jnp.float32(0.5), jnp.int32(2)], jnp.asarray([0.5, 2])):
        found = [road_jax.compose([a, b], [config()] * 2, w)[0] for w in (weights, [0.5, 2])]
        found.append(jax.jit(lambda: road_jax.compose([a, b], [config()] * 2, [0.5, 2])[0])())
        same(found[0], found[1])
        jax.tree.map(lambda one, other: assert_close(one, other, "float32"), found[2], found[1])
    # Weights may be learned.
    loss = jax.jit(
        jax.grad(lambda w: jnp.sum(road_jax.compose([a, b], [config()] * 2, [w, 1 - w])[0]["top"]["road_theta"]))
    )
    assert_close(loss(jnp.float32(0.3)), jnp.sum(a["top"]["road_theta"] - b["top"]["road_theta"]), "float32")


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_is_trained_behind_a_frozen_one(variant, net):
    model, variables = net
    frozen, both = values("a", "road_2"), [config("road_2"), config(variant)]
    fresh = road_jax.transform(model, config(variant)).init(jax.random.key(0), variables, X)
    road = road_jax.transform(model, road_jax.compose([frozen, fresh], both)[1])

    def loss(adapter):
        # Not a norm, which pure rotations don't change.
        return jnp.mean(jnp.sin(road.apply(variables, road_jax.compose([frozen, adapter], both)[0], X)))

    gradient = jax.jit(jax.grad(loss))(fresh)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 1e-5


@pytest.mark.parametrize(("first", "second"), [("road_1", "road_2"), ("road_4", "road_1")])
def test_halves_trained_at_once_get_the_gradients_of_each_alone(first, second, net):
    model, variables = net
    halves = [config(first, subspace=(0, 0.5)), config(second, subspace=(0.5, 1))]
    both, ids = config(max(first, second)), np.asarray([1, 2, 2, 1], np.int32)

    def rows_loss(y):
        return jnp.sum(jnp.sin(y))

    @jax.jit
    @jax.grad
    def at_once(adapters):
        pairs = zip(adapters, halves, strict=True)
        several = [road_jax.compose([a], [c], variant=both.variant)[0] for a, c in pairs]
        road = road_jax.transform(model, both)
        return rows_loss(road.apply(variables, road_jax.stack_adapters(several), X, adapter_ids=ids))

    a, b = values("a", first), values("b", second)
    found = at_once([a, b])
    for i, (adapter, half) in enumerate(zip([a, b], halves, strict=True)):
        road, rows = road_jax.transform(model, half), X[ids == i + 1]
        alone = jax.jit(jax.grad(lambda v, road=road, rows=rows: rows_loss(road.apply(variables, v, rows))))(adapter)
        jax.tree.map(lambda one, other: assert_close(one, other, "float32"), found[i], alone)
        mask = subspace_mask(OUT, variant=half.variant, group_size=8, subspace=half.subspace)
        for leaf in jax.tree.leaves(found[i]):
            np.testing.assert_array_equal(leaf[..., ~mask], 0)
            assert np.abs(leaf[..., mask]).max() > 0.1
    # One half's gradient doesn't depend on the other half, not even in the last bit.
    same(found[0], at_once([a, values("c", second)])[0])
    same(found[1], at_once([values("c", first), b])[1])


def test_compositions_mix_in_a_batch(net):
    model, variables = net
    a, b, c = values("a"), values("b"), values("c", "road_2")
    ab, _ = road_jax.compose([a, b], [config()] * 2, variant="road_2")
    ac, both = road_jax.compose([a, c], [config(), config("road_2")])
    plain, _ = road_jax.compose([a], [config()], variant="road_2")
    several = road_jax.stack_adapters([ab, ac, plain])
    road = road_jax.transform(model, both)
    found = jax.jit(road.apply)(variables, several, X, adapter_ids=np.asarray([1, 2, 3, 0], np.int32))
    pairs = {name: (values(name), config()) for name in "ab"} | {"c": (c, config("road_2"))}
    for row, names in enumerate(["ab", "ac", "a", ""]):
        assert_close(found[row], expected(variables, *(pairs[name] for name in names))[row], "float32")


def singular(variant):
    return jax.tree_util.tree_map_with_path(lambda p, v: v if "theta" in str(p) else 0 * v, values("s", variant))


def call(*pairs, weights=None, **options):
    adapters, configs = zip(*pairs, strict=True) if pairs else ((), ())
    return road_jax.compose(adapters, configs, weights, **options)


A = (values("a"), config())
HEAD = ({**values("h"), "head": {"kernel": jnp.ones((2, 2))}}, config(modules_to_save=["head"]))
REFUSED = {
    "none": (lambda: call(), "expected adapters, and a config for each, found 0 and 0"),
    "one": (lambda: road_jax.compose(*A), "^compose: expected a list of adapters, found dict$"),
    "one config": (
        lambda: road_jax.compose([A[0]] * 2, config()),
        "^compose: expected a list of configs, one for each adapter, found RoadConfig$",
    ),
    "one number": (lambda: call(A, weights=0.5), "^weights: expected one for each of 1 adapters, found float$"),
    "config": (lambda: call((values("a"), {})), "config of adapter 1: expected RoadConfig, found dict"),
    "number": (lambda: call(A, weights=[1, 2]), "one for each of 1 adapters, found 2"),
    "finite": (lambda: call(A, weights=[float("nan")]), "finite numbers, found nan"),
    "group sizes": (
        lambda: call(A, (values("b"), config(group_size=16))),
        "one group size, found 8 in adapter 1 and 16 in adapter 2",
    ),
    "shapes": (
        lambda: call(A, ({"top": values("b")["stack"]}, config())),
        r"top: expected θ and α for one layer in all adapters, found road_1 \[32\] and road_1 \[3, 32\]",
    ),
    "variant": (
        lambda: call((values("b", "road_2"), config("road_2")), variant="road_1"),
        "a variant that holds road_2",
    ),
    "saved": (lambda: call(HEAD, HEAD), "one adapter at most with modules saved whole, found adapter 1, adapter 2"),
    "saved weight": (lambda: call(HEAD, weights=[2]), "weight 1 for adapter 1, which brings head whole, found 2"),
    "power": (
        lambda: call((singular("road_1"), config()), weights=[0.5]),
        r"stack: expected scales .* power 0.5, found α = 0",
    ),
    "power as an array": (
        lambda: call((singular("road_1"), config()), weights=[jnp.float32(0.5)]),
        r"stack: expected scales .* power 0.5, found α = 0",
    ),
    "finite array": (lambda: call(A, weights=jnp.asarray([float("nan")])), "finite numbers, found nan"),
    "inverse": (
        lambda: call((singular("road_2"), config("road_2")), weights=[-1]),
        "stack: expected blocks that have an inverse for weight -1, found a singular one",
    ),
    "whole": (
        lambda: call((values("b", "road_4"), config("road_4")), weights=[0.5]),
        "expected whole numbers for an adapter of road_4, found 0.5",
    ),
    "array": (
        lambda: call((values("b", "road_4"), config("road_4")), weights=[jnp.float32(1)]),
        "expected a number for an adapter of road_4, found an array",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    function, message = REFUSED[case]
    with pytest.raises(AdapterError, match=message) as caught:
        function()
    assert "\n" not in str(caught.value)
    assert call(A, HEAD)[0]["head"]["kernel"].shape == (2, 2)
