"""Linen models that we did not write: adapted, trained, merged and turned back, without a change to them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import road_jax
from road_core import AdapterError, RoadConfig

IDS = np.random.default_rng(0).integers(0, 96, (2, 12)).astype(np.int32)
TARGETS = np.random.default_rng(1).integers(0, 96, (2, 12)).astype(np.int32)


def gpt2():
    """Hugging Face's: linear layers are a type of its own, whose kernel is stored transposed."""
    from transformers import FlaxGPT2LMHeadModel, GPT2Config
    from transformers.models.gpt2.modeling_flax_gpt2 import FlaxConv1D

    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    model = FlaxGPT2LMHeadModel(config, _do_init=False).module
    places = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    layers = {FlaxConv1D: lambda *_: road_jax.Layout(kernel_axes=(0,))}
    return model, (IDS, jnp.ones_like(IDS), places), lambda y: y.logits, {"layers": layers}, 8


def bert():
    from transformers import BertConfig, FlaxBertForMaskedLM

    config = BertConfig(96, 64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    model = FlaxBertForMaskedLM(config, _do_init=False).module
    ones, zeros = jnp.ones_like(IDS), jnp.zeros_like(IDS)
    places = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    return model, (IDS, ones, zeros, places, None), lambda y: y.logits, {}, 13


def llama():
    from transformers import FlaxLlamaForCausalLM, LlamaConfig

    config = LlamaConfig(96, 64, 128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = FlaxLlamaForCausalLM(config, _do_init=False).module
    places = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    return model, (IDS, jnp.ones_like(IDS), places), lambda y: y.logits, {}, 14


def griffin():
    """Google DeepMind's RecurrentGemma: dots in names, remat, and an einsum whose result has an output axis first."""
    from recurrentgemma import common
    from recurrentgemma.jax import griffin, layers

    blocks = (common.TemporalBlockType.RECURRENT, common.TemporalBlockType.ATTENTION)
    config = common.GriffinConfig(96, 64, 128, 4, blocks, True, 8, 30.0, scan_type=common.ScanType.LINEAR_NATIVE)
    places = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)

    def einsum(module, x):
        layout = road_jax.einsum_layout(module.eqn, kernel="w", bias="b")
        return dataclasses.replace(layout, bias_axes=(0, 3))

    return griffin.Griffin(config), (jnp.asarray(IDS), places), lambda y: y[0], {"layers": {layers.Einsum: einsum}}, 11


def diffusion():
    """FlaxDiff's transformer on images, with the time that a diffusion model is told."""
    from flaxdiff.models.simple_dit import SimpleDiT

    model = SimpleDiT(output_channels=3, patch_size=4, emb_features=64, num_layers=2, num_heads=4, mlp_ratio=2)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 16, 16, 3)), jnp.float32)
    return model, (x, jnp.asarray([0.1, 0.7])), lambda y: y.reshape(2, -1, 96), {}, 18


@pytest.fixture(scope="module", params=[gpt2, bert, llama, griffin, diffusion], ids=lambda make: make.__name__)
def published(request):
    model, inputs, logits, options, layers = request.param()
    config = RoadConfig(target_modules="all-linear", group_size=8)
    variables = random(jax.jit(model.init)(jax.random.key(0), *inputs))
    return road_jax.transform(model, config, **options), variables, inputs, logits, layers


def random(variables):
    """Some models start with layers of zeros, through which no gradient comes."""

    def fill(path, leaf):
        noise = np.random.default_rng(len(jax.tree_util.keystr(path))).normal(size=leaf.shape) * 0.1
        return leaf + jnp.asarray(noise, leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree_util.tree_map_with_path(fill, variables)


def test_adapted_trained_merged_and_turned_back(published):
    road, variables, inputs, logits, layers = published
    adapter = road.init(jax.random.key(1), variables, *inputs)
    assert len(jax.tree.leaves(adapter)) == 2 * layers

    base = logits(jax.jit(road.model.apply)(variables, *inputs))
    np.testing.assert_array_equal(logits(jax.jit(road.apply)(variables, adapter, *inputs)), base)

    def loss(adapter):
        y = logits(road.apply(variables, adapter, *inputs)).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(y, TARGETS[:, : y.shape[1]]).mean()

    tx = optax.adam(5e-2)

    @jax.jit
    def step(adapter, state):
        value, gradients = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(gradients, state)
        return optax.apply_updates(adapter, updates), state, value

    state, losses = tx.init(adapter), []
    for _ in range(40):
        adapter, state, value = step(adapter, state)
        losses.append(float(value))
    assert losses[-1] < 0.95 * losses[0], losses

    trained = logits(jax.jit(road.apply)(variables, adapter, *inputs))
    scale = float(jnp.abs(trained).max())
    assert float(jnp.abs(trained - base).max()) > 0.05 * scale
    merged = jax.jit(road.merge)(variables, adapter)
    found = logits(jax.jit(road.model.apply)(merged, *inputs))
    np.testing.assert_allclose(found, trained, rtol=0, atol=2e-5 * scale)
    back = road.unmerge(merged, adapter)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))
    # The library's own model is as it was.
    np.testing.assert_array_equal(logits(jax.jit(road.model.apply)(variables, *inputs)), base)


def test_rows_of_a_batch_with_their_own_adapters(published):
    road, variables, inputs, logits, _ = published
    adapter = road.init(jax.random.key(1), variables, *inputs)
    adapter = jax.tree.map(lambda leaf: leaf + 0.3, adapter)
    several = road_jax.stack_adapters([adapter])
    found = logits(road.apply(variables, several, *inputs, adapter_ids=jnp.asarray([1, 0])))
    scale = float(jnp.abs(found).max())
    for row, alone in ((0, road.apply(variables, adapter, *inputs)), (1, road.model.apply(variables, *inputs))):
        np.testing.assert_allclose(found[row], logits(alone)[row], rtol=0, atol=2e-5 * scale)


def test_what_can_not_be_adapted_says_so():
    model, inputs, _, _, _ = gpt2()
    variables = jax.jit(model.init)(jax.random.key(0), *inputs)
    road = road_jax.transform(model, RoadConfig(target_modules=["c_attn"], group_size=8))
    with pytest.raises(
        AdapterError, match=r"c_attn: expected a Dense, .* that transform's layers declare, found FlaxC"
    ):
        road.init(jax.random.key(0), variables, *inputs)
