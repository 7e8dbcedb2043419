"""Interventions in Flax against the float64 reference, applied by hand between blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _blocks import FIELDS, LAYERS, PROMPT, WIDTH, Block, Stack, by_hand, variables_of, with_values
from _compare import assert_close, named_values
from _models import small_checkpoint
from flax import linen as nn

import road_core
import road_jax
from road_core import AdapterError, intervene, read_intervention
from road_jax import InterventionConfig, models


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(named_values("x", *PROMPT.shape, WIDTH))


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("loop", "last"),
        ("loop, remat", "ends"),
        ("scan", "last"),
        ("scan", "all"),
        ("scan, remat", "last"),
        ("scan, axis1", "ends"),
        ("scan, last axis", "ends"),
    ],
)
def test_it_is_the_reference_between_blocks(how, kind, x):
    config = InterventionConfig(group_size=8, **FIELDS[kind])
    model, variables = Stack(how), variables_of(how)
    intervened = road_jax.intervene(model, config, blocks=Block)
    tree = intervened.init(x)
    assert sorted(tree["layers"]) == [str(i) for i in config.layers]
    plain = model.apply(variables, x)
    prompt = jnp.asarray(PROMPT)
    np.testing.assert_array_equal(intervened.apply(variables, tree, x, prompt_mask=prompt), plain)
    tree = with_values(tree)
    with jax.default_matmul_precision("highest"):
        actual = jax.jit(intervened.apply)(variables, tree, x, prompt_mask=prompt)
        several = road_jax.stack_adapters([jax.tree.map(jnp.zeros_like, tree), tree])
        mixed = jax.jit(intervened.apply)(variables, several, x, prompt_mask=prompt, adapter_ids=[2, 0, 2])
    assert actual.dtype == jnp.float32
    expected = by_hand(x, config, tree)
    assert_close(actual, expected, "float32", moved_from=plain)
    assert_close(mixed[::2], expected[::2], "float32", moved_from=plain[::2])
    assert_close(mixed[1], plain[1], "float32")


@pytest.mark.no_leaks
@pytest.mark.parametrize("how", ["loop", "scan, remat"])
def test_gradients_are_the_references_and_end_at_the_subspace(how, x):
    config = InterventionConfig(layers=(1, 2), positions="last:2", group_size=8, subspace=(0.5, 1))
    intervened = road_jax.intervene(Stack(how), config, blocks=Block)
    tree = with_values(intervened.init(x))
    prompt = jnp.asarray(PROMPT)

    @jax.jit
    def loss(tree):
        return jnp.sum(jnp.sin(intervened.apply(variables_of(how), tree, x, prompt_mask=prompt)))

    with jax.default_matmul_precision("highest"):
        gradient = jax.grad(loss)(tree)
    for i, name, at in [
        ("1", "road_theta", 9),
        ("1", "road_alpha", 12),
        ("2", "road_theta", 15),
        ("2", "road_alpha", 8),
    ]:
        ends = []
        for step in (-1e-5, 1e-5):
            moved = jax.tree.map(lambda leaf: np.array(leaf, np.float64), tree)
            moved["layers"][i][name][at] += step
            ends.append(np.sin(by_hand(x, config, moved)).sum())
        np.testing.assert_allclose(gradient["layers"][i][name][at], (ends[1] - ends[0]) / 2e-5, rtol=1e-4)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf[:8], 0)
        assert (leaf[8:] != 0).all()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("base"))


def tokens(*shape):
    return np.random.default_rng(0).integers(6, 160, shape).astype(np.int32)


CONFIG = InterventionConfig(layers=(0, 2), positions="first+last:2", group_size=32)


def test_scanned_and_numbered_decoders_agree(base):
    ids, mask = tokens(2, 7), np.array([[0, 0, 1, 1, 1, 1, 1], [1] * 7], np.int32)
    logits, gradients = [], []
    for scan in (True, False):
        module, variables = models.load(base, scan=scan)
        intervened = road_jax.intervene(module, CONFIG)
        tree = with_values(intervened.init(ids))

        @jax.jit
        def run(tree, intervened=intervened, variables=variables):
            return intervened.apply(variables, tree, ids, mask)

        with jax.default_matmul_precision("highest"):
            logits.append(run(tree))
            gradients.append(jax.grad(lambda tree, run=run: jnp.sum(jnp.tanh(run(tree))))(tree))
    plain = module.apply(variables, ids, mask)
    assert_close(logits[0][mask > 0], logits[1][mask > 0], "float32", moved_from=plain[mask > 0])
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_the_side_of_the_padding_makes_no_difference_nor_do_texts_in_one_row(base):
    module, variables = models.load(base)
    intervened = road_jax.intervene(module, CONFIG)
    text, other = tokens(5), tokens(3)[::-1]
    run, tree = jax.jit(intervened.apply), with_values(intervened.init(text[None]))
    with jax.default_matmul_precision("highest"):
        alone = run(variables, tree, text[None])[0]
        zeros = np.zeros(3, np.int32)
        for ids, mask, at in (
            ([*zeros, *text], [0] * 3 + [1] * 5, slice(3, 8)),
            ([*text, *zeros], [1] * 5 + [0] * 3, slice(0, 5)),
            ([*other, *text], [1] * 3 + [2] * 5, slice(3, 8)),
        ):
            both = run(variables, tree, jnp.asarray([ids]), attention_mask=jnp.asarray([mask], jnp.int32))
            assert_close(both[0, at], alone, "float32", moved_from=module.apply(variables, text[None])[0])


@pytest.mark.parametrize(("positions", "ids"), [("last", [0, 1]), ("all", None)])
def test_decoding_with_a_cache_is_the_whole_text_at_once(base, positions, ids):
    """The reference runs all tokens again at each step, with the prompt marked: only "all" rotates new tokens."""
    module, variables = models.load(base)
    config = InterventionConfig(layers=(1,), positions=positions, group_size=32)
    intervened = road_jax.intervene(module, config)
    prompts = [[6, 7, 8], [9] * 6]
    tree = with_values(intervened.init(np.array(prompts[:1])))
    with jax.default_matmul_precision("highest"):
        if ids is not None:
            tree = road_jax.stack_adapters([tree])
        answers = road_jax.generate(intervened, variables, prompts, adapter=tree, adapter_ids=ids, max_new_tokens=6)
        plain = road_jax.generate(module, variables, prompts, max_new_tokens=6)
        assert [a != b for a, b in zip(answers, plain, strict=True)] == [ids is None, True]
        texts = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
        longest = max(map(len, texts))
        tokens = np.array([text + [0] * (longest - len(text)) for text in texts], np.int32)
        mask = (np.arange(longest)[None] < np.array([[len(text)] for text in texts])).astype(np.int32)
        marked = np.arange(longest)[None] < np.array([[len(prompt)] for prompt in prompts])
        rows = None if ids is None else jnp.asarray(ids)
        logits = intervened.apply(
            variables, tree, tokens, attention_mask=mask, prompt_mask=jnp.asarray(marked), adapter_ids=rows
        )
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ends = logits[row, len(prompt) - 1 : len(texts[row]) - 1]
            assert np.argmax(ends, axis=-1).tolist() == answer


def test_a_quantised_base(base):
    module, variables = models.load(base)
    ids = tokens(2, 6)
    quantized = road_jax.quantize(variables, "nf4")
    intervened = road_jax.intervene(module, CONFIG)
    run, tree = jax.jit(intervened.apply), intervened.init(ids)
    with jax.default_matmul_precision("highest"):
        expected = run(road_jax.dequantize(quantized), with_values(tree), ids)
        assert_close(run(quantized, with_values(tree), ids), expected, "float32", moved_from=run(quantized, tree, ids))


def test_training_lowers_the_loss_and_the_file_gives_the_same(base, tmp_path):
    module, variables = models.load(base)
    config = InterventionConfig(layers=(1,), positions="last:2", group_size=32, subspace=(0, 0.5))
    intervened = road_jax.intervene(module, config)
    ids, wanted = tokens(8, 5), tokens(8)
    tree = intervened.init(ids)
    optimiser = optax.adam(0.1)

    @jax.jit
    def step(tree, state):
        def loss(tree):
            logits = intervened.apply(variables, tree, ids)[:, -1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

        value, gradient = jax.value_and_grad(loss)(tree)
        # optax needs dtype promotion.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(gradient, state)
            return optax.apply_updates(tree, updates), state, value

    state, losses = optimiser.init(tree), []
    for _ in range(30):
        tree, state, value = step(tree, state)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]

    road_jax.save_intervention(tmp_path / "it", tree, config)
    loaded, again = road_jax.load_intervention(tmp_path / "it")
    assert again == config
    assert read_intervention(tmp_path / "it").hidden_size == 128
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)


def test_bfloat16_stays_and_is_rounded_once(x):
    config = InterventionConfig(layers=(LAYERS - 1,), positions="all", group_size=8)
    intervened = road_jax.intervene(Stack("loop"), config, blocks=Block)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables_of("loop"))
    tree = with_values(intervened.init(x))
    h = Stack("loop").apply(variables, x.astype(jnp.bfloat16))
    actual = intervened.apply(variables, tree, x.astype(jnp.bfloat16))
    assert actual.dtype == jnp.bfloat16
    leaves = tree["layers"][str(LAYERS - 1)]
    expected = intervene(
        np.asarray(h, np.float64),
        leaves["road_theta"],
        leaves["road_alpha"],
        np.ones(PROMPT.shape),
        variant="road_1",
        group_size=8,
    )
    assert_close(actual, expected, "bfloat16", moved_from=h)


KeptBlock = nn.jit(Block)


class KeptStack(nn.Module):
    """The same blocks, jitted where their class is defined."""

    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x, _ = KeptBlock(name=f"blocks_{i}")(x)
        return x


def test_a_program_that_jit_kept_is_not_taken_for_another(x):
    config = InterventionConfig(layers=(0, 2), positions="last", group_size=8)
    model, variables = KeptStack(), variables_of("loop")
    plain = model.apply(variables, x)
    intervened = road_jax.intervene(model, config, blocks=Block)
    loop = road_jax.intervene(Stack("loop"), config, blocks=Block)
    tree = with_values(intervened.init(x))
    for mask in (PROMPT, np.ones_like(PROMPT)):
        expected = loop.apply(variables, tree, x, prompt_mask=jnp.asarray(mask))
        for _ in range(2):
            found = intervened.apply(variables, tree, x, prompt_mask=jnp.asarray(mask))
            assert_close(found, expected, "float32", moved_from=plain)
    np.testing.assert_array_equal(model.apply(variables, x), plain)


class Halves(nn.Module):
    """Blocks of which some run only in some calls, so that an index can mean different blocks."""

    def setup(self):
        self.encode = [nn.Dense(WIDTH) for _ in range(2)]
        self.blocks = [nn.Dense(WIDTH) for _ in range(2)]

    def decode(self, x):
        for block in self.blocks:
            x = nn.tanh(block(x))
        return x

    def __call__(self, x, skip=False):
        for block in [] if skip else self.encode:
            x = nn.tanh(block(x))
        return self.decode(x)


@pytest.mark.parametrize("first", [{"method": "decode"}, {"method": Halves.decode}, {"skip": True}])
def test_each_way_of_calling_a_model_counts_its_own_blocks(first, x):
    model = Halves()
    variables = model.init(jax.random.key(0), x)
    config = road_jax.InterventionConfig(layers=[1], positions="all", group_size=8)
    road = road_jax.intervene(model, config, blocks=nn.Dense)
    intervention = with_values(road.init(x))
    leaves = intervention["layers"]["1"]
    arrays = [np.asarray(leaves[name], np.float64) for name in ("road_theta", "road_alpha")]

    def expected(names):
        y = np.asarray(x, np.float64)
        for at, name in enumerate(names):
            layer = variables["params"][name]
            y = y @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])
            y = np.tanh(road_core.rotate(y, *arrays, variant="road_1", group_size=8) if at == 1 else y)
        return y

    for _ in range(2):
        found, plain = road.apply(variables, intervention, x, **first), model.apply(variables, x, **first)
        assert_close(found, expected(["blocks_0", "blocks_1"]), "float32", moved_from=plain)
        found = road.apply(variables, intervention, x)
        whole = ["encode_0", "encode_1", "blocks_0", "blocks_1"]
        assert_close(found, expected(whole), "float32", moved_from=model.apply(variables, x))


class Masked(nn.Module):
    """A model with a mask that its blocks don't need, and with what only `apply` takes: rngs, mutable collections."""

    @nn.compact
    def __call__(self, x, attention_mask=None):
        self.sow("intermediates", "mask", attention_mask)
        return Stack("loop")(nn.Dropout(0.5, deterministic=False)(x))


@pytest.mark.no_leaks
def test_a_mask_by_position_is_the_mask_by_name(x):
    config = InterventionConfig(layers=(1,), positions="last", group_size=8)
    intervened = road_jax.intervene(Masked(), config, blocks=Block)
    tree = with_values(intervened.init(x))
    variables = {"params": {"Stack_0": variables_of("loop")["params"]}}
    options = {"rngs": {"dropout": jax.random.key(0)}, "mutable": True}
    mask = jnp.asarray(PROMPT)
    found, state = intervened.apply(variables, tree, x, mask, **options)
    expected, _ = intervened.apply(variables, tree, x, attention_mask=mask, **options)
    np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, state["params"], variables["params"])
    everywhere, _ = intervened.apply(variables, tree, x, **options)
    assert (found != everywhere).any()
    with pytest.raises(AdapterError, match="intervene: expected the arguments of Masked, found too many positional"):
        intervened.apply(variables, tree, x, mask, mask, **options)


def test_what_does_not_fit_is_refused(x, base, tmp_path):
    model, variables = Stack("scan"), variables_of("scan")

    def made(blocks=Block, **fields):
        config = InterventionConfig(**{"layers": (1,), "group_size": 8, **fields})
        return road_jax.intervene(model, config, blocks=blocks)

    with pytest.raises(AdapterError, match=r"layers: expected indices from 0 to 3, found 4"):
        made(layers=(4,)).init(x)
    with pytest.raises(AdapterError, match="expected a number of outputs that group_size 64 divides, found 32"):
        made(group_size=64).init(x)
    with pytest.raises(AdapterError, match="expected blocks in Stack, found none; say by blocks="):
        made(blocks=nn.Conv).init(x)
    with pytest.raises(AdapterError, match="blocks: expected a class of modules or a function, found str"):
        made(blocks="Block")
    with pytest.raises(AdapterError, match="config: expected InterventionConfig, found RoadConfig"):
        road_jax.intervene(model, road_jax.RoadConfig(), blocks=Block)
    # What transform and intervene give has init and apply as well.
    for other in (road_jax.transform(model, road_jax.RoadConfig()), made(), None, Stack):
        found = type(other).__name__
        said = rf"^model: expected a Linen module \(for NNX: road_jax\.nnx\.intervene\), found {found}$"
        with pytest.raises(AdapterError, match=said):
            road_jax.intervene(other, made().config)
        said = rf"^model: expected a Linen module \(for NNX: road_jax\.nnx\.wrap\), found {found}$"
        with pytest.raises(AdapterError, match=said):
            road_jax.transform(other, road_jax.RoadConfig())
    with pytest.raises(AdapterError, match="config: expected InterventionConfig, found RoadConfig"):
        road_jax.save_intervention(tmp_path / "a", made().init(x), road_jax.RoadConfig())
    with pytest.raises(AdapterError, match="intervention: expected a nested dict of arrays, found NoneType"):
        made().apply(variables, None, x)
    with pytest.raises(AdapterError, match=r"expected a block that gives hidden states .* found \[5, 32\]"):
        made().init(jnp.ones((5, WIDTH)))
    intervened = made()
    tree = intervened.init(x)
    with pytest.raises(AdapterError, match=r"expected a prompt mask \[3, 6\].* found \[3, 5\]"):
        intervened.apply(variables, tree, x, prompt_mask=jnp.ones((3, 5), jnp.int32))
    for wrong in (
        {"layers": {"2": tree["layers"]["1"]}},
        {"layers": {"1": {"road_theta": tree["layers"]["1"]["road_theta"]}}},
        {"layers": {"1": jax.tree.map(lambda leaf: leaf[:4], tree["layers"]["1"])}},
    ):
        with pytest.raises(
            AdapterError, match=r"expected road_theta and road_alpha \[16\] of layers\.<index> for \[1\]"
        ):
            intervened.apply(variables, wrong, x)
    whole = {"layers": {"1": {**tree["layers"]["1"], "road_theta": jnp.zeros(16, int)}}}
    with pytest.raises(AdapterError, match=r"layers\.1\.road_theta: expected an array of floating-point .* int32"):
        intervened.apply(variables, whole, x)
    several = road_jax.stack_adapters([tree])
    with pytest.raises(AdapterError, match="adapter_ids: expected numbers from 0 to 1, found 2"):
        intervened.apply(variables, several, x, adapter_ids=[0, 1, 2])
    turned = jax.tree.map(lambda leaf: leaf + 0.3, several)
    apply = jax.jit(lambda ids: intervened.apply(variables, turned, x, adapter_ids=ids))
    np.testing.assert_array_equal(apply(jnp.asarray([-1, 1, 2])), apply(jnp.asarray([0, 1, 0])))
    with pytest.raises(AdapterError, match=r"found a difference in layers\.2\.road_alpha"):
        road_jax.save_intervention(
            tmp_path / "it", {"layers": {**tree["layers"], "2": tree["layers"]["1"]}}, made().config
        )
    assert not (tmp_path / "it").exists()
    module, variables = models.load(base)
    tree = road_jax.intervene(module, CONFIG).init(jnp.ones((1, 2), jnp.int32))
    with pytest.raises(AdapterError, match=r"expected several \(stack_adapters\) with adapter_ids and one without"):
        road_jax.generate(
            road_jax.intervene(module, CONFIG), variables, [[6, 7]], adapter=tree, adapter_ids=[1], max_new_tokens=1
        )
