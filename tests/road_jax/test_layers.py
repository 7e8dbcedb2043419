"""Layers and lifted transforms that a Flax model may use, each adapted like the same layers written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _compare import assert_close, named_values
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

import road_core
import road_jax
from road_core import AdapterError, RoadConfig

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
    """The merged model computes what `apply` computes, which differs from the base."""
    found = jax.jit(road.apply)(variables, adapter, *inputs)
    merged = jax.jit(road.merge)(variables, adapter)
    assert_close(road.model.apply(merged, *inputs), found, "float32", moved_from=road.model.apply(variables, *inputs))
    return found


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(named_values("x", 2, 6, 32))


@pytest.mark.no_leaks
def test_flaxs_own_attention(x):
    """Query, key and value are DenseGeneral to heads × head_dim; the output is one from both axes."""
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


@pytest.mark.no_leaks
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


@pytest.mark.no_leaks
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


def test_copies_of_another_number_are_refused(x):
    road, variables, adapter = adapt(Branches(), x)
    wrong = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), adapter)
    said = r"branches\.road_theta: expected the stack axes of the layer's kernel \[2, 32, 16\], found \[4, 8\]"
    for known in (road, road_jax.transform(road.model, road.config)):
        with pytest.raises(AdapterError, match=said):
            known.apply(variables, wrong, x)


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
    """`nn.jit` caches its traces: calls without, with, and again without an adapter must not mix."""
    road, variables, adapter = adapt(Jitted(), x)
    plain = road.model.apply(variables, x)
    found = check_merge(road, variables, adapter, x)
    np.testing.assert_array_equal(road.model.apply(variables, x), plain)
    assert_close(road.apply(variables, adapter, x), found, "float32", moved_from=plain)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(32, name="dense")(jnp.tanh(x))


KeptBlock = nn.jit(Plain)


class KeptMethod(nn.Module):
    """Like `Plain`, with a method that is jitted once for all instances."""

    @nn.jit
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(32, name="dense")(jnp.tanh(x))


class Scannable(nn.Module):
    block: type[nn.Module]

    @nn.compact
    def __call__(self, x, _):
        return self.block(name="block")(x), None


class Blocks(nn.Module):
    """Blocks of one structure, which `nn.jit` treats as one program."""

    block: type[nn.Module]
    scan: bool = False

    @nn.compact
    def __call__(self, x):
        if self.scan:
            stack = nn.scan(Scannable, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return stack(self.block, name="blocks")(x, None)[0]
        return self.block(name="b")(self.block(name="a")(x))


@pytest.mark.parametrize(("block", "scan"), [(KeptBlock, False), (KeptMethod, True)])
def test_a_program_that_jit_kept_is_not_taken_for_another(block, scan, x):
    """Jitted where the module is defined, so that the cache outlives every call, even the plain one before `init`."""
    model = Blocks(block, scan)
    variables = model.init(jax.random.key(0), x)
    plain = model.apply(variables, x)
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=GROUP))
    bare = road_jax.transform(Blocks(Plain, scan), road.config)
    adapter = road.init(jax.random.key(1), variables, x)
    assert jax.tree.structure(adapter) == jax.tree.structure(bare.init(jax.random.key(1), variables, x))
    adapter = filled(adapter)
    for twice in (adapter, jax.tree.map(jnp.sin, adapter)):
        expected = bare.apply(variables, twice, x)
        for apply in (road.apply, jax.jit(road.apply)):
            assert_close(apply(variables, twice, x), expected, "float32", moved_from=plain)
    np.testing.assert_array_equal(model.apply(variables, x), plain)
    np.testing.assert_array_equal(model.init(jax.random.key(0), x)["params"].keys(), variables["params"].keys())
    check_merge(road, variables, adapter, x)


class Halved(nn.Module):
    """A layer that sees its kernel through a function, as in weight norm."""

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


class Pair(nn.Module):
    """Called by `Hyper`; one layer has the path of a layer there, and the other an odd number of outputs."""

    out: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(33)(nn.Dense(self.out)(x))


class Hyper(nn.Module):
    """Initialises another model within itself: for its params, for their number, and for its result alone."""

    def setup(self):
        shapes = jax.eval_shape(Pair(16, parent=None).init, jax.random.key(0), jnp.ones((1, 32)))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
        flat, self.unravel = ravel_pytree(zeros)
        self.made = nn.Dense(-(-flat.size // GROUP) * GROUP)
        self.count = flat.size
        self.kept = self.param("kept", lambda key: Pair(16, parent=None).init(key, jnp.ones((1, 32)))["params"])
        self.Dense_0 = nn.Dense(64)

    def __call__(self, x):
        y, _ = Pair(16, parent=None).init_with_output(jax.random.key(0), x)
        y = y + Pair(16, parent=None).apply({"params": self.kept}, x)
        params = self.unravel(self.made(x[0, 0])[: self.count])
        return self.Dense_0(x)[..., :33] + y + Pair(16, parent=None).apply(params, x)


def test_a_model_that_is_initialised_within_another_is_not_adapted(x):
    road, variables, adapter = adapt(Hyper(), x)
    assert {path: leaf.shape[-1] for path, leaf in flatten_dict(adapter).items() if path[-1] == "road_theta"} == {
        ("Dense_0", "road_theta"): 32,
        ("made", "road_theta"): variables["params"]["made"]["kernel"].shape[1] // 2,
    }
    check_merge(road, variables, adapter, x)
    # A method may be named, or given in any form.
    for method in ("__call__", Hyper.__call__, road.model.__call__, lambda model, x: model(x)):
        again = road.init(jax.random.key(1), variables, x, method=method)
        assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, adapter)


class Normed(nn.Module):
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        how = {"update_stats": False} if self.norm is nn.SpectralNorm else {}
        x = self.norm(nn.Dense(64, name="first"))(x, **how)
        x = nn.Dense(32, name="plain")(nn.relu(x))
        return self.norm(nn.DenseGeneral((4, 8), name="heads"))(x, **how)


@pytest.mark.parametrize("norm", [nn.WeightNorm, nn.SpectralNorm])
def test_layers_in_norms_of_their_params(norm, x):
    """The rotation is of what the layer gives with its normed kernel, also where rows have their own adapters."""
    road, variables, adapter = adapt(Normed(norm), x)
    bare = road.model.apply(variables, x)
    expected = turn(bare, adapter["heads"], axes=2)
    assert_close(road.apply(variables, {"heads": adapter["heads"]}, x), expected, "float32", moved_from=bare)
    second = jax.tree.map(lambda leaf: leaf + 0.2, adapter)
    several = road_jax.stack_adapters([adapter, second])
    mixed = road.apply(variables, several, x, adapter_ids=jnp.asarray([2, 1]))
    for row, alone in enumerate((second, adapter)):
        assert_close(mixed[row], road.apply(variables, alone, x)[row], "float32")
    quantized = road.quantize(variables, "int8")
    kinds = {name: type(layer["kernel"]).__name__ for name, layer in quantized["params"].items() if "kernel" in layer}
    assert kinds == {"first": "ArrayImpl", "plain": "QuantizedKernel", "heads": "ArrayImpl"}
    assert_close(road.apply(quantized, adapter, x), road.apply(road_jax.dequantize(quantized), adapter, x), "float32")


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


def test_boxed_params_under_a_mesh(x):
    """Boxes constrain what they hold there; saved modules are merged into boxes too."""
    config = RoadConfig(target_modules=["dense"], group_size=GROUP)
    rules = nn.logical_axis_rules([("embed", None), ("mlp", "model")])
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("model",))
    with jax.set_mesh(mesh), rules:
        variables = jax.jit(Boxed().init)(jax.random.key(0), x)
        road = road_jax.transform(Boxed(), config)
        adapter = filled(road.init(jax.random.key(1), variables, x))
        found = jax.jit(road.apply)(variables, adapter, x)
    assert_close(np.asarray(found), road.apply(jax.device_get(variables), adapter, x), "float32")

    model = nn.Sequential([nn.Dense(32), Boxed()])
    road, variables, adapter = adapt(model, x, target_modules=["layers_0"], modules_to_save=["layers_1"])
    merged = road.merge(variables, adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(variables)
    check_merge(road, variables, adapter, x)


class Tied(nn.Module):
    """An embedding that is also the output head: it isn't a linear layer, so it isn't rotated."""

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
    with pytest.raises(AdapterError, match="nearest: "):
        adapt(Twice(), x, target_modules=["sharde"])


class Mixed(nn.Module):
    """Einsums whose outputs don't come last, in the kernel or in the result."""

    @nn.compact
    def __call__(self, x):
        heads = nn.Einsum((4, 32, 8), "btd,hdk->bthk", name="heads")(x)
        pair = nn.Einsum((2, 4, 32, 8), "btd,chdk->cbthk", name="pair")(x)
        return nn.Einsum((32, 32), "...d,od->...o", name="out")(inputs=(heads + pair[0] * pair[1]).reshape(x.shape))


def test_einsums_with_outputs_anywhere(x):
    road, variables, adapter = adapt(Mixed(), x)
    found = check_merge(road, variables, adapter, x)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    heads = turn(np.einsum("btd,hdk->bthk", x, p["heads"]["kernel"]) + p["heads"]["bias"], adapter["heads"], 2)
    # Paired in the order of the result's axes: c, h, k.
    pair = np.einsum("btd,chdk->btchk", x, p["pair"]["kernel"]) + p["pair"]["bias"]
    pair = turn(pair, adapter["pair"], 3)
    mixed = (heads + pair[:, :, 0] * pair[:, :, 1]).reshape(x.shape)
    expected = turn(mixed @ p["out"]["kernel"].T + p["out"]["bias"], adapter["out"])
    assert_close(found, expected, "float32")


@pytest.mark.parametrize(("equation", "shape"), [("btd,hdk->bthk", (4, 32, 8)), ("btd,hkd->bthk", (4, 8, 32))])
def test_a_kernel_that_does_not_show_its_outputs_is_not_guessed(equation, shape, x):
    model = nn.Einsum(shape, equation)
    road, variables, adapter = adapt(nn.Sequential([model]), x)
    merged = road.merge(variables, adapter)
    fresh = road_jax.transform(road.model, road.config)
    with pytest.raises(AdapterError, match=r"layers_0\.kernel: expected sample inputs of the model, to find"):
        fresh.merge(variables, adapter)
    found = fresh.merge(variables, adapter, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(merged), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("equation", ["", "td,df", "td->t", "a,b,c->abc"])
def test_an_equation_of_other_operands_is_refused(equation):
    with pytest.raises(AdapterError, match="einsum: expected two operands and a result, as in 'btd,df->btf', found '"):
        road_jax.einsum_layout(equation)


class DenseRelu(nn.Dense):
    """A layer derived from Flax's own: what it does with the product comes after the rotation."""

    @nn.compact
    def __call__(self, x):
        return nn.relu(super().__call__(x))


def test_a_subclass_is_rotated_once_where_its_product_is(x):
    road, variables, adapter = adapt(nn.Sequential([DenseRelu(64)]), x)
    found = check_merge(road, variables, adapter, x)
    p = variables["params"]["layers_0"]
    y = np.asarray(x, np.float64) @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"], np.float64)
    assert_close(found, np.maximum(turn(y, adapter["layers_0"]), 0), "float32")


class Backwards(nn.Module):
    """A layer that isn't Flax's: its weight has other names and its outputs first."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(0.2), (64, x.shape[-1]))
        return x @ w.T + self.param("b", nn.initializers.ones, (64,)).reshape(1, 1, 64)


def checked(method):
    """A decorator of the kind that libraries put on their calls, to check types or names."""

    @functools.wraps(method)
    def call(*args, **kwargs):
        return method(*args, **kwargs)

    return call


class Decorated(nn.Module):
    @nn.compact
    @checked
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.normal(0.2), (x.shape[-1], 64))


class Own(nn.Module):
    """A head that calls a layer on an array of its own choice, which isn't that layer's param."""

    @nn.compact
    def __call__(self, x):
        y = Decorated(name="up.0")(x)
        table = self.param("table", nn.initializers.normal(0.2), (64, 16))
        return nn.Dense(16, use_bias=False, parent=None).apply({"params": {"kernel": table}}, y)


def test_what_libraries_do(x, tmp_path):
    """Decorated calls, dots in names, layers called by `apply`."""
    config = RoadConfig(target_modules="all-linear", group_size=GROUP)
    layers = {Decorated: lambda *_: road_jax.Layout(kernel="w")}
    road = road_jax.transform(Own(), config, layers=layers)
    variables = road.model.init(jax.random.key(0), x)
    adapter = filled(road.init(jax.random.key(1), variables, x))
    assert list(adapter) == ["up.0"]
    found = check_merge(road, variables, adapter, x)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    assert_close(found, turn(np.asarray(x) @ p["up.0"]["w"], adapter["up.0"]) @ p["table"], "float32")
    road_jax.save_adapter(tmp_path / "a", adapter, config)
    loaded, _ = road_jax.load_adapter(tmp_path / "a")
    np.testing.assert_array_equal(check_merge(road, variables, loaded, x), found)


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        first = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return first(name="blocks")(x, None)[0]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(32, name="down")(jnp.tanh(Backwards(name="up")(x))), None


@pytest.mark.parametrize("ids", [None, [1, 0]])
def test_a_layer_type_that_is_declared(x, ids):
    layout = road_jax.Layout(kernel_axes=(0,), kernel="w", bias="b")
    model, config = Stacked(), RoadConfig(target_modules="all-linear", group_size=GROUP)
    road = road_jax.transform(model, config, layers={Backwards: lambda module, x: layout})
    variables = model.init(jax.random.key(0), x)
    adapter = filled(road.init(jax.random.key(1), variables, x))
    assert adapter["blocks"]["up"]["road_theta"].shape == (2, 32)
    if ids is None:
        found = check_merge(road, variables, adapter, x)
        back = road.unmerge(road.merge(variables, adapter), adapter)
        up = back["params"]["blocks"]["up"]
        assert_close(up["w"], variables["params"]["blocks"]["up"]["w"], "float32")
    else:
        several = road_jax.stack_adapters([adapter])
        found = road.apply(variables, several, x, adapter_ids=jnp.asarray(ids))
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"]["blocks"])
    y = np.asarray(x, np.float64)
    for i in range(2):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], (p, adapter["blocks"]))
        up = turn(y @ layer[0]["up"]["w"].T + layer[0]["up"]["b"], layer[1]["up"])
        y = y + turn(np.tanh(up) @ layer[0]["down"]["kernel"] + layer[0]["down"]["bias"], layer[1]["down"])
    if ids is not None:
        y[1] = model.apply(variables, x)[1]
    assert_close(found, y, "float32")


class Shared(nn.Module):
    """Two layers that keep their kernels in the same scope."""

    @nn.compact
    def __call__(self, x):
        for name in ("up", "down"):
            layer = Named(name)
            nn.share_scope(self, layer)
            x = layer(x)
        return x


class Named(nn.Module):
    kernel: str

    @nn.compact
    def __call__(self, x):
        return x @ self.param(self.kernel, nn.initializers.normal(), (32, 32))


def test_layer_types_that_can_not_be_adapted_are_refused(x):
    config = RoadConfig(target_modules=["layers_0"], group_size=GROUP)
    model = nn.Sequential([Backwards()])
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(AdapterError, match=r"layers_0: expected a Dense, .* that transform's layers declare, found Ba"):
        road_jax.transform(model, config).init(jax.random.key(0), variables, x)
    layers = {Backwards: lambda *_: road_jax.Layout(kernel_axes=(0,), kernel="w", bias="b")}
    adapter = road_jax.transform(model, config, layers=layers).init(jax.random.key(0), variables, x)
    with pytest.raises(AdapterError, match="layers_0: expected sample inputs"):
        road_jax.transform(model, config, layers=layers).merge(variables, adapter)

    model = nn.Sequential([Shared()])
    layers = {Named: lambda module, x: road_jax.Layout(kernel=module.kernel)}
    road = road_jax.transform(model, config, layers=layers)
    with pytest.raises(AdapterError, match="layers_0: expected one kernel that is always used alike, found up with ou"):
        road.init(jax.random.key(0), model.init(jax.random.key(0), x), x)
