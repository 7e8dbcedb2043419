"""Mixed batches in JAX: each row gets the same result as with its adapter alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _compare import assert_close, named_values
from _models import small_checkpoint
from flax import linen as nn
from flax import nnx
from jax import export

import road_core
import road_jax
from road_core import AdapterError, RoadConfig
from road_jax import models

IDS = np.asarray([2, 0, 1, 2, 3], np.int32)
TOKENS = np.random.default_rng(0).integers(6, 160, (5, 9)).astype(np.int32)


def filled(adapter, name):
    def fill(path, leaf):
        key = name + jax.tree_util.keystr(path)
        return jnp.asarray(named_values(key, *leaf.shape, mean=float("alpha" in key), std=0.3))

    return jax.tree_util.tree_map_with_path(fill, adapter)


@pytest.fixture(scope="module", params=["road_1", "road_2", "road_4"])
def mixed(request, tmp_path_factory):
    """A road and three adapters, the last of which adapts other modules; under scan with remat, as in training."""
    module, variables = models.load(small_checkpoint(tmp_path_factory.mktemp("base")))
    config = RoadConfig(variant=request.param, group_size=8, target_modules="all-linear")
    road = road_jax.transform(module, config)
    few = road_jax.transform(module, RoadConfig(variant=request.param, group_size=8, target_modules=["q_proj"]))
    whole = road.init(jax.random.key(0), variables, TOKENS[:1])
    part = few.init(jax.random.key(0), variables, TOKENS[:1])
    return road, variables, [filled(whole, "a"), filled(whole, "b"), filled(part, "c")]


def test_each_row_is_as_with_its_adapter_alone(mixed):
    road, variables, adapters = mixed
    apply = jax.jit(road.apply)
    stacked = road_jax.stack_adapters(adapters)
    found = apply(variables, stacked, TOKENS, adapter_ids=IDS)
    base = road.model.apply(variables, TOKENS)
    for row, number in enumerate(IDS):
        alone = base if number == 0 else apply(variables, adapters[number - 1], TOKENS)
        moved_from = base[row] if number else None
        assert_close(found[row], alone[row], "float32", moved_from=moved_from)


@pytest.mark.no_leaks
def test_one_program_for_any_mix(mixed):
    road, variables, adapters = mixed
    stacked = road_jax.stack_adapters(adapters)
    traces = []

    @jax.jit
    def apply(adapter, ids):
        traces.append(1)
        return road.apply(variables, adapter, TOKENS, adapter_ids=ids)

    apply(stacked, IDS)
    apply(jax.tree.map(lambda leaf: leaf / 2, stacked), IDS[::-1].copy())
    assert len(traces) == 1


def test_gradients_reach_each_rows_adapter_only(mixed):
    road, variables, adapters = mixed
    stacked = road_jax.stack_adapters(adapters)
    ids = np.asarray([1, 1, 0, 0, 0], np.int32)

    def loss(adapter, **options):
        return jnp.sum(jnp.square(road.apply(variables, adapter, TOKENS, **options)[:2]))

    gradient = jax.jit(jax.grad(lambda adapter: loss(adapter, adapter_ids=ids)))(stacked)
    alone = jax.jit(jax.grad(loss))(adapters[0])
    for found, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(alone), strict=True):
        assert_close(found[..., 1], expected, "float32", moved_from=np.zeros_like(expected))
        np.testing.assert_array_equal(found[..., 2:], 0)


def test_generation_mixes_too(mixed):
    road, variables, adapters = mixed
    prompts = [row.tolist() for row in TOKENS]
    options = {"max_new_tokens": 6}
    stacked = road_jax.stack_adapters(adapters)
    said = road_jax.generate(road, variables, prompts, adapter=stacked, adapter_ids=IDS.tolist(), **options)
    for row, number in enumerate(IDS):
        adapter = {} if number == 0 else adapters[number - 1]
        assert said[row] == road_jax.generate(road, variables, prompts, adapter=adapter, **options)[row]
    with pytest.raises(AdapterError, match="adapter_ids: expected numbers from 0 to 3, found 4"):
        road_jax.generate(road, variables, prompts, adapter=stacked, adapter_ids=[4] * 5)
    with pytest.raises(AdapterError, match="adapter_ids: expected one for each of 5 prompts, and adapters, found 2"):
        road_jax.generate(road, variables, prompts, adapter=stacked, adapter_ids=[1, 2])


def test_what_does_not_fit_is_refused(mixed):
    road, variables, adapters = mixed
    stacked = road_jax.stack_adapters(adapters)
    with pytest.raises(AdapterError, match="found none"):
        road_jax.stack_adapters([])
    with pytest.raises(AdapterError, match="stack_adapters: expected a list of adapters, found a dict"):
        road_jax.stack_adapters(adapters[0])
    with pytest.raises(AdapterError, match="adapter: expected a nested dict of arrays, found NoneType"):
        road_jax.stack_adapters([adapters[0], None])
    with pytest.raises(AdapterError, match=r"a\.road_theta: expected an array of floating-point numbers, found list"):
        road_jax.stack_adapters([{"a": {"road_theta": [0.0], "road_alpha": [1.0]}}])
    other = jax.tree.map(lambda leaf: leaf[..., :4], adapters[0])
    with pytest.raises(AdapterError, match=r"mlp\.down_proj\.road_alpha: expected one shape in all adapters"):
        road_jax.stack_adapters([adapters[0], other])
    with pytest.raises(AdapterError, match="found the saved module lm_head in adapter 0"):
        road_jax.stack_adapters([{**adapters[0], "lm_head": {"kernel": jnp.ones((2, 2))}}])
    with pytest.raises(AdapterError, match="expected an output with the 3 rows of adapter_ids first"):
        road.apply(variables, stacked, TOKENS, adapter_ids=IDS[:3])
    with pytest.raises(AdapterError, match=r"road_theta: expected .* \[size\] without, found \[\d+, 4\]"):
        road.apply(variables, stacked, TOKENS)
    with pytest.raises(
        AdapterError, match=r"road_theta: expected \[size, adapters\] \(stack_adapters\) with adapter_ids"
    ):
        road.apply(variables, adapters[0], TOKENS, adapter_ids=IDS % 2)
    for wrong in (4, -1):
        with pytest.raises(AdapterError, match=rf"adapter_ids: expected numbers from 0 to 3, found {wrong}"):
            road.apply(variables, stacked, TOKENS, adapter_ids=np.full(5, wrong, np.int32))


@pytest.mark.parametrize("wrong", [7, -1, np.iinfo(np.int32).max, np.iinfo(np.int32).min])
def test_an_id_beyond_the_adapters_is_the_base_under_jit(wrong):
    x = jnp.asarray(named_values("x", 3, 5, 32))
    model = nn.Sequential([nn.Dense(64)])
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules=["layers_0"]))
    adapter = road.init(jax.random.key(0), variables, x)
    several = road_jax.stack_adapters([filled(adapter, "a"), filled(adapter, "b")])
    apply = jax.jit(lambda adapter, ids: road.apply(variables, adapter, x, adapter_ids=ids))
    base, found = model.apply(variables, x), apply(several, jnp.asarray([1, wrong, 2]))
    np.testing.assert_array_equal(found, apply(several, jnp.asarray([1, 0, 2])))
    assert_close(found[1], base[1], "float32")
    assert_close(found[2], apply(several, jnp.asarray([0, 0, 2]))[2], "float32", moved_from=base[2])
    gradient = jax.jit(jax.grad(lambda adapter, ids: jnp.sum(jnp.square(apply(adapter, ids)))))
    for leaf in jax.tree.leaves(gradient(several, jnp.asarray([wrong] * 3))):
        np.testing.assert_array_equal(leaf, 0)


class Turned(nn.Module):
    """Three layers in a stack, or four stacks of these, on axes that Flax counts from either end."""

    axis: int
    around: int | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        dense, bias = nn.Dense, self.use_bias

        class Inner(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return jnp.tanh(dense(16, use_bias=bias)(x)), None

        def scan(kind, axis, length):
            return nn.scan(kind, variable_axes={"params": axis}, split_rngs={"params": True}, length=length)

        stack = scan(Inner, self.axis, 3)
        return (stack if self.around is None else scan(stack, self.around, 4))(name="stack")(x, None)[0]


@pytest.mark.parametrize(
    ("model", "known"),
    [
        (Turned(1), True),
        (Turned(-1), True),
        (Turned(-1), False),
        (Turned(-2, use_bias=False), True),
        (Turned(-1, 0), True),
        (Turned(0, -1), False),
    ],
    ids=lambda value: f"{value.axis}, {value.around}" if isinstance(value, Turned) else f"init {value}",
)
def test_stacks_on_any_axis(model, known):
    """The number of adapters makes their axis look like the stack's."""
    x = jnp.asarray(named_values("x", 5, 16))
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=8))
    adapter = road.init(jax.random.key(0), variables, x)
    adapters = [filled(adapter, name) for name in "abc"[: 2 if model.around is None else 3]]
    several, ids = road_jax.stack_adapters(adapters), np.asarray([2, 0, 1, 2, 0])

    def loss(adapter, x, **options):
        one = road if known else road_jax.transform(model, road.config)
        y = one.apply(variables, adapter, x, **options)
        return jnp.sum(jnp.sin(y)), y

    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(several, x, adapter_ids=ids)
    base = model.apply(variables, x)
    assert_close(found[ids == 0], base[ids == 0], "float32")
    for number in (1, 2):
        rows = ids == number
        (_, alone), expected = jax.value_and_grad(loss, has_aux=True)(adapters[number - 1], x[rows])
        assert_close(found[rows], alone, "float32", moved_from=base[rows])
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            assert_close(a[..., number], b, "float32", moved_from=np.zeros_like(b))


def forms(x):
    """One model in Linen and NNX, adapted and intervened: how it runs, three adapters together, and its base."""
    model = nn.Sequential([nn.Dense(64)])
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules=["layers_0"]))
    blocks = road_jax.InterventionConfig(layers=[0], positions="all")
    linen = road_jax.intervene(model, blocks, blocks=nn.Dense)
    plain = nnx.Sequential(nnx.Linear(32, 64, rngs=nnx.Rngs(0)))

    def run(laid, adapted, lay):
        def call(several, ids):
            model = nnx.clone(adapted)
            lay(model, several)
            return road_jax.nnx.apply(model, x, adapter_ids=ids)

        return call, laid(adapted), plain(x)

    yield (
        lambda several, ids: road.apply(variables, several, x, adapter_ids=ids),
        road.init(jax.random.key(0), variables, x),
        model.apply(variables, x),
    )
    yield (
        lambda several, ids: linen.apply(variables, several, x, adapter_ids=ids),
        linen.init(x),
        model.apply(variables, x),
    )
    wrapped = road_jax.nnx.wrap(plain, RoadConfig(target_modules=["layers.0"]))
    yield run(road_jax.nnx.get_adapter, wrapped, road_jax.nnx.set_adapter)
    turned = road_jax.nnx.intervene(plain, blocks, x, blocks=nnx.Linear)
    yield run(road_jax.nnx.get_intervention, turned, road_jax.nnx.set_intervention)


@pytest.mark.parametrize("form", range(4), ids=["linen", "linen blocks", "nnx", "nnx blocks"])
def test_none_is_the_base_whatever_a_step_did_to_its_place(form):
    x = jnp.asarray(named_values("x", 4, 5, 32))
    apply, one, base = list(forms(x))[form]
    several = road_jax.stack_adapters([filled(one, "a"), filled(one, "b")])
    gradient = jax.grad(lambda several: jnp.sum(jnp.sin(apply(several, np.asarray([0, 1, 0, 2])))))(several)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf[..., 0], 0)
        assert (np.abs(leaf[..., 1:]) > 1e-3).any(0).all()
    decayed = jax.tree.map(lambda leaf: 0.9 * leaf + 0.1, several)
    found = apply(decayed, np.asarray([0, 1, 0, 2]))
    np.testing.assert_array_equal(found[0::2], base[0::2])
    assert np.abs(found - base)[1::2].max() > 0.1


@pytest.mark.parametrize("form", range(4), ids=["linen", "linen blocks", "nnx", "nnx blocks"])
@pytest.mark.parametrize("ids", [[], np.zeros(0, np.int32)], ids=["list", "array"])
def test_batches_without_rows(ids, form):
    x = jnp.zeros((0, 5, 32))
    apply, one, base = list(forms(x))[form]
    several = road_jax.stack_adapters([one])
    found = apply(several, ids)
    assert (found.shape, found.dtype) == (base.shape, base.dtype)
    for leaf in jax.tree.leaves(jax.grad(lambda several: jnp.sum(apply(several, ids)))(several)):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("form", range(4), ids=["linen", "linen blocks", "nnx", "nnx blocks"])
def test_a_batch_of_any_size_is_exported(form):
    """`jax.export` with a symbolic batch size gives a program, and its gradient, for a batch of any size."""
    x = jnp.asarray(named_values("x", 4, 5, 32))
    batch = export.symbolic_shape("batch")
    symbols = jax.ShapeDtypeStruct((*batch, 5, 32), jnp.float32), jax.ShapeDtypeStruct(batch, jnp.int32)
    ids = jnp.asarray([2, 0, 1, 2], jnp.int32)
    apply, one, _ = list(forms(x))[form]
    several = road_jax.stack_adapters([filled(one, "a"), filled(one, "b")])

    def run(several, x, ids):
        return list(forms(x))[form][0](several, ids)

    def loss(*arguments):
        return jnp.sum(jnp.sin(run(*arguments)))

    expected = jax.jit(apply)(several, ids), jax.jit(jax.grad(loss))(several, x, ids)
    for function, value in zip((run, jax.grad(loss)), expected, strict=True):
        found = export.export(jax.jit(function))(several, *symbols).call(several, x, ids)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(value), strict=True):
            assert_close(a, b, "float32", moved_from=np.zeros_like(b))


@pytest.mark.parametrize("form", range(4), ids=["linen", "linen blocks", "nnx", "nnx blocks"])
def test_ids_lie_as_the_batch_on_a_mesh_with_explicit_axes(form):
    x, ids = jnp.asarray(named_values("x", 8, 5, 32)), jnp.asarray([0, 1, 2, 0, 1, 2, 9, 1])
    _, one, base = list(forms(x))[form]
    several = road_jax.stack_adapters([filled(one, "a"), filled(one, "b")])

    @jax.jit
    def run(several, x, ids):
        y = list(forms(x))[form][0](several, ids)
        return y, jax.grad(lambda several: jnp.sum(jnp.sin(list(forms(x))[form][0](several, ids))))(several)

    expected, gradient = run(several, x, ids)
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        rows = jax.sharding.PartitionSpec("data")
        found, dealt = run(several, jax.device_put(x, rows), jax.device_put(ids, rows))
    assert jax.typeof(found).sharding.spec[0] == "data"
    assert_close(found, expected, "float32", moved_from=base)
    for a, b in zip(jax.tree.leaves(dealt), jax.tree.leaves(gradient), strict=True):
        assert_close(a, b, "float32", moved_from=np.zeros_like(b))


def test_float64_stays():
    with jax.enable_x64(True):
        x = jnp.asarray(named_values("x", 2, 32), jnp.float64)
        model = nn.Dense(16, param_dtype=jnp.float64)
        variables = model.init(jax.random.key(0), x)
        road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=8))
        one = jax.tree.map(lambda leaf: leaf / 3, filled(road.init(jax.random.key(0), variables, x), "a"))
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) / 3, one)
        several = road_jax.stack_adapters([one, wide])
        assert {leaf.dtype for leaf in jax.tree.leaves(several)} == {jnp.dtype(jnp.float64)}
        found = road.apply(variables, several, x, adapter_ids=[2, 2])
        bare = np.asarray(model.apply(variables, x))
        arrays = [np.asarray(wide[name]) for name in ("road_theta", "road_alpha")]
        assert_close(found, road_core.rotate(bare, *arrays, variant="road_1", group_size=8), "float64", moved_from=bare)


def test_ids_may_be_a_list_and_are_checked(mixed):
    road, variables, adapters = mixed
    stacked = road_jax.stack_adapters(adapters)
    apply = jax.jit(road.apply)
    expected = apply(variables, stacked, TOKENS, adapter_ids=IDS)
    said = jax.jit(lambda adapter: road.apply(variables, adapter, TOKENS, adapter_ids=IDS.tolist()))(stacked)
    np.testing.assert_array_equal(said, expected)
    np.testing.assert_array_equal(apply(variables, stacked, TOKENS, adapter_ids=IDS.tolist()), expected)
    np.testing.assert_array_equal(apply(variables, stacked, TOKENS, adapter_ids=IDS.astype(np.int8)), expected)
    said = r"adapter_ids: expected whole numbers \[batch\], found float32 \[5\]"
    with pytest.raises(AdapterError, match=said):
        road.apply(variables, stacked, TOKENS, adapter_ids=IDS.astype(np.float32))
    with pytest.raises(AdapterError, match=r"adapter_ids: expected whole numbers \[batch\], found int32 \[1, 5\]"):
        road.apply(variables, stacked, TOKENS, adapter_ids=IDS[None])
    with pytest.raises(AdapterError, match="adapter_ids: expected numbers from 0 to 3, found 4"):
        jax.jit(lambda: road.apply(variables, stacked, TOKENS, adapter_ids=[4, 0, 0, 0, 0]))()
    with pytest.raises(AdapterError, match="adapter_ids: expected numbers from 0 to 0, found 9"):
        road.apply(variables, {}, TOKENS, adapter_ids=np.full(5, 9))
    with pytest.raises(AdapterError, match=r"adapter_ids: expected whole numbers \[batch\], found float64 \[5\]"):
        road_jax.generate(road, variables, TOKENS.tolist(), adapter=stacked, adapter_ids=[1.5] * 5)
    with pytest.raises(AdapterError, match="adapter_ids: expected numbers from 0 to 0, found 9"):
        road_jax.generate(road, variables, TOKENS.tolist(), adapter={}, adapter_ids=[9] * 5)
