"""Interventions in NNX against the float64 reference and against Linen, on the same blocks."""

import _blocks as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _compare import assert_close, named_values
from flax import nnx

import road_core
import road_jax
from road_core import AdapterError
from road_jax import InterventionConfig
from road_jax.nnx import RoadParam, get_intervention, set_intervention, unwrap

PROMPT = jnp.asarray(linen.PROMPT)
# Two of the four blocks in a stack.
CONFIG = InterventionConfig(layers=(1, 2), positions="last:2", group_size=8, subspace=(0.5, 1))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(linen.WIDTH, linen.WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.dense(x))


class Stack(nnx.Module):
    """The Linen net, with its blocks in a list or scanned as one stack."""

    def __init__(self, how):
        if how == "loop":
            self.blocks = nnx.List([Block(nnx.Rngs(i)) for i in range(linen.LAYERS)])
            for block, (kernel, bias) in zip(self.blocks, linen.weights(), strict=True):
                block.dense.kernel[...], block.dense.bias[...] = jnp.asarray(kernel), jnp.asarray(bias)
        else:
            make = nnx.vmap(Block, in_axes=0, out_axes=0)
            self.blocks = nnx.split_rngs(splits=linen.LAYERS)(make)(nnx.Rngs(0))
            kernels, biases = map(jnp.stack, zip(*linen.weights(), strict=True))
            self.blocks.dense.kernel[...], self.blocks.dense.bias[...] = kernels, biases

    def __call__(self, x, attention_mask=None, cache=None):
        if isinstance(self.blocks, nnx.List):
            for block in self.blocks:
                x = block(x)
            return x
        return nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(named_values("x", *PROMPT.shape, linen.WIDTH))


@nnx.jit
def run(model, x, prompt):
    with jax.default_matmul_precision("highest"):
        return model(x, prompt_mask=prompt)


@pytest.mark.parametrize(("how", "kind"), [("loop", "ends"), ("scan", "last"), ("scan", "all")])
def test_it_is_the_reference_between_blocks_and_linens_function(how, kind, x):
    config = InterventionConfig(group_size=8, **linen.FIELDS[kind])
    model = Stack(how)
    structure, plain = nnx.graphdef(model), nnx.jit(type(model).__call__)(model, x)
    adapted = road_jax.nnx.intervene(model, config, x, blocks=Block)
    np.testing.assert_allclose(run(adapted, x, PROMPT), plain, rtol=1e-4, atol=1e-5)
    in_linen = road_jax.intervene(linen.Stack(how), config, blocks=linen.Block)
    tree = linen.with_values(in_linen.init(x))
    set_intervention(adapted, tree)
    actual = run(adapted, x, PROMPT)
    assert_close(actual, linen.by_hand(x, config, tree), "float32", moved_from=plain)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(
            actual, jax.jit(in_linen.apply)(linen.variables_of(how), tree, x, prompt_mask=PROMPT), rtol=1e-4, atol=1e-5
        )
    back = unwrap(adapted)
    assert nnx.graphdef(back) == structure
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(model))


@pytest.mark.no_leaks
@pytest.mark.parametrize("how", ["loop", "scan"])
def test_gradients_are_linens_and_reach_road_params_alone(how, x):
    in_linen = road_jax.intervene(linen.Stack("scan"), CONFIG, blocks=linen.Block)
    tree = linen.with_values(in_linen.init(x))
    variables = linen.variables_of("scan")
    adapted = road_jax.nnx.intervene(Stack(how), CONFIG, x, blocks=Block)
    set_intervention(adapted, tree)

    @nnx.jit
    def gradient(model):
        def loss(model):
            return jnp.sum(jnp.sin(model(x, PROMPT)))

        return nnx.grad(loss, argnums=nnx.DiffState(0, RoadParam))(model)

    with jax.default_matmul_precision("highest"):
        of_linen = jax.grad(lambda tree: jnp.sum(jnp.sin(in_linen.apply(variables, tree, x, prompt_mask=PROMPT))))
        expected = jax.jit(of_linen)(tree)
        found = gradient(adapted)
    assert len(jax.tree.leaves(found)) == (4 if how == "loop" else 2)
    # The blocks of the stack that aren't chosen have no gradient at all.
    for i in (0, 3) if how == "scan" else ():
        np.testing.assert_array_equal(found["base"]["blocks"]["road_theta"][...][i], 0)
    nnx.update(adapted, found)
    for a, b in zip(*map(jax.tree.leaves, (get_intervention(adapted), expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


class RematBlock(Block):
    @nnx.remat
    def __call__(self, x):
        return x + jnp.tanh(self.dense(x))


class JittedNet(nnx.Module):
    """Blocks that trace their contents once."""

    def __init__(self):
        self.blocks = nnx.List([RematBlock(nnx.Rngs(i)) for i in range(2)])

    @nnx.jit
    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_second_mask_reaches_blocks_in_transforms_of_the_models_own(x):
    model = JittedNet()
    config = InterventionConfig(layers=(0,), positions="last", group_size=8)
    adapted = road_jax.nnx.intervene(model, config, x, blocks=lambda module: isinstance(module, nnx.Linear))
    tree = jax.tree.map(lambda leaf: leaf + 0.5, get_intervention(adapted))
    set_intervention(adapted, road_jax.stack_adapters([tree]))
    structure, state = nnx.split(adapted)
    ids = jnp.ones(len(x), jnp.int32)
    for mask in (PROMPT, jnp.ones(x.shape[:2], jnp.int32), None):
        touched = np.abs(road_jax.nnx.apply(adapted, x, adapter_ids=ids, prompt_mask=mask) - model(x)).max(-1) > 1e-3
        expected = road_core.position_mask(np.ones(x.shape[:2], int) if mask is None else np.asarray(mask), "last")
        np.testing.assert_array_equal(touched, expected)
    with pytest.raises(AdapterError, match="expected a prompt mask"):
        road_jax.nnx.apply(adapted, x, adapter_ids=ids, prompt_mask=PROMPT[:, :2])
    assert nnx.graphdef(adapted) == structure
    jax.tree.map(np.testing.assert_array_equal, nnx.state(adapted), state)


def test_what_is_decoded_is_no_prompt(x):
    model = Stack("scan")
    for positions in ("last", "all"):
        config = InterventionConfig(layers=(1,), positions=positions, group_size=8)
        adapted = road_jax.nnx.intervene(model, config, x, blocks=Block)
        set_intervention(adapted, jax.tree.map(lambda leaf: leaf + 0.5, get_intervention(adapted)))
        moved = np.abs(adapted(x, cache=()) - model(x)).max()
        assert moved == 0 if positions == "last" else moved > 0.1


def test_files_go_to_linen_and_back(x, tmp_path):
    tree = linen.with_values(road_jax.intervene(linen.Stack("scan"), CONFIG, blocks=linen.Block).init(x))
    scanned, listed = (road_jax.nnx.intervene(Stack(how), CONFIG, x, blocks=Block) for how in ("scan", "loop"))
    set_intervention(scanned, tree)
    road_jax.save_intervention(tmp_path / "it", get_intervention(scanned), CONFIG)
    loaded, config = road_jax.load_intervention(tmp_path / "it")
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    set_intervention(listed, loaded)
    jax.tree.map(np.testing.assert_array_equal, get_intervention(listed), tree)


@pytest.mark.parametrize("how", ["loop", "scan"])
def test_rows_with_their_own_interventions(how, x):
    """In NNX and in Linen, each row gets the result of its own intervention, and any mix runs one program."""
    in_linen = road_jax.intervene(linen.Stack("scan"), CONFIG, blocks=linen.Block)
    one = linen.with_values(in_linen.init(x))
    other = jax.tree.map(lambda leaf: 1.5 * leaf - 0.2, one)
    both, variables = road_jax.stack_adapters([one, other]), linen.variables_of("scan")
    adapted = road_jax.nnx.intervene(Stack(how), CONFIG, x, blocks=Block)
    alone = [Stack(how)(x)]
    for tree in (one, other):
        set_intervention(adapted, tree)
        alone.append(run(adapted, x, PROMPT))
    set_intervention(adapted, both)
    traces = []

    @nnx.jit
    def mixed(model, ids):
        traces.append(1)
        with jax.default_matmul_precision("highest"):
            return (
                road_jax.nnx.apply(model, x, adapter_ids=ids, prompt_mask=PROMPT),
                in_linen.apply(variables, both, x, prompt_mask=PROMPT, adapter_ids=ids),
            )

    for ids in ([1, 0, 2], [2, 2, 1]):
        expected = jnp.stack([alone[number][row] for row, number in enumerate(ids)])
        for actual in mixed(adapted, jnp.asarray(ids)):
            assert_close(actual, expected, "float32", moved_from=alone[0])
    assert len(traces) == 1
    with pytest.raises(AdapterError, match="called without adapter_ids"):
        adapted(x)
    with pytest.raises(AdapterError, match=r"expected several \(stack_adapters\) with adapter_ids and one without"):
        in_linen.apply(variables, both, x)
    with pytest.raises(AdapterError, match=r"expected several .* found θ \[16\] and 3 adapter_ids"):
        in_linen.apply(variables, one, x, adapter_ids=jnp.asarray([1, 0, 2]))


def test_what_does_not_fit_is_refused(x):
    def made(sample=x, blocks=Block, **fields):
        config = InterventionConfig(**{"layers": (1,), "group_size": 8, **fields})
        return road_jax.nnx.intervene(Stack("scan"), config, sample, blocks=blocks)

    with pytest.raises(AdapterError, match=r"layers: expected indices from 0 to 3, found 4"):
        made(layers=(4,))
    with pytest.raises(AdapterError, match="expected a number of outputs that group_size 64 divides, found 32"):
        made(group_size=64)
    with pytest.raises(AdapterError, match="expected blocks in Stack, found none; say by blocks="):
        made(blocks=nnx.Conv)
    with pytest.raises(AdapterError, match="blocks: expected a class of modules or a function, found str"):
        made(blocks="Block")
    for other in (None, linen.Stack("scan"), Stack):
        said = rf"^model: expected an NNX module \(for Linen: road_jax\.intervene\), found {type(other).__name__}$"
        with pytest.raises(AdapterError, match=said):
            road_jax.nnx.intervene(other, InterventionConfig(layers=(1,)), x, blocks=Block)
    with pytest.raises(AdapterError, match=r"blocks: expected a block that gives hidden states .* found \[5, 32\]"):
        made(sample=x[0, :5])
    adapted = made()
    before = get_intervention(adapted)
    with pytest.raises(AdapterError, match=r"expected a prompt mask \[3, 6\].* found \[3, 5\]"):
        adapted(x, prompt_mask=jnp.ones((3, 5), jnp.int32))
    with pytest.raises(AdapterError, match=r"road_alpha \[16\] of layers\.<index> for \[1\]"):
        set_intervention(adapted, {"layers": {"2": before["layers"]["1"]}})
    jax.tree.map(np.testing.assert_array_equal, get_intervention(adapted), before)
    with pytest.raises(AdapterError, match="expected blocks that intervene has adapted, found none"):
        get_intervention(Stack("loop"))
    with pytest.raises(AdapterError, match="expected a call of the model that intervene gave"):
        adapted.base(x)
