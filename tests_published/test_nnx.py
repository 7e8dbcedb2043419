"""NNX models that we did not write: wrapped, trained, merged in place and unwrapped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import road_jax
from road_core import RoadConfig
from road_jax.nnx import RoadParam

IDS = np.random.default_rng(0).integers(0, 96, (2, 12)).astype(np.int32)
SIZES = {
    "num_layers": 2,
    "embed_dim": 64,
    "hidden_dim": 128,
    "num_heads": 4,
    "head_dim": 16,
    "num_kv_heads": 2,
}
TARGETS = np.random.default_rng(1).integers(0, 96, (2, 12)).astype(np.int32)


def llama():
    from tunix.models.llama3 import model as library

    config = library.ModelConfig(**SIZES, vocab_size=96, rope_theta=10000, norm_eps=1e-5)
    return library, library.Llama3(config, rngs=nnx.Rngs(0)), 14


def qwen():
    from tunix.models.qwen3 import model as library

    config = library.ModelConfig(**SIZES, vocab_size=96, rope_theta=10000, norm_eps=1e-5)
    return library, library.Qwen3(config, rngs=nnx.Rngs(0)), 14


def gemma():
    from tunix.models.gemma3 import model as library

    config = library.ModelConfig(**SIZES, num_embed=96, sliding_window_size=8, param_dtype=jnp.float32)
    return library, library.Gemma3(config, rngs=nnx.Rngs(0)), 12


def call(model, *, apply=lambda model, *args: model(*args)):
    places = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((12, 12), bool))[None], (2, 12, 12))
    return apply(model, jnp.asarray(IDS), places, None, mask)[0]


@pytest.fixture(params=[llama, qwen, gemma], ids=lambda make: make.__name__)
def published(request):
    library, model, layers = request.param()
    einsum = {library.Einsum: lambda layer: road_jax.einsum_layout(layer.einsum_str, kernel="w")}
    config = RoadConfig(target_modules="all-linear", group_size=8)
    return model, road_jax.nnx.wrap(model, config, layers=einsum), config, layers


def test_adapted_trained_merged_and_unwrapped(published, tmp_path):
    model, adapted, config, layers = published
    assert len(jax.tree.leaves(nnx.state(adapted, RoadParam))) == 2 * layers
    base = call(model)
    np.testing.assert_array_equal(call(adapted), base)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    optimizer = nnx.Optimizer(adapted, optax.adam(5e-2), wrt=RoadParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            y = call(model).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(y, TARGETS).mean()

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, RoadParam))(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(adapted, optimizer)) for _ in range(40)]
    assert losses[-1] < 0.98 * losses[0], losses
    same = jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(model), before)
    assert jax.tree.all(same), "the base was trained"

    trained = call(adapted)
    scale = float(jnp.abs(trained).max())
    assert float(jnp.abs(trained - base).max()) > 0.05 * scale
    several = road_jax.stack_adapters([road_jax.nnx.get_adapter(adapted)])
    road_jax.save_adapter(tmp_path / "a", road_jax.nnx.get_adapter(adapted), config)

    road_jax.nnx.merge(adapted)
    found = call(road_jax.nnx.unwrap(adapted))
    np.testing.assert_allclose(found, trained, rtol=0, atol=2e-5 * scale)
    road_jax.nnx.unmerge(adapted)
    np.testing.assert_allclose(call(model), base, rtol=0, atol=2e-5 * scale)

    road_jax.nnx.set_adapter(adapted, several)
    ids = jnp.asarray([0, 1])
    mixed = call(adapted, apply=lambda *args: road_jax.nnx.apply(*args, adapter_ids=ids))
    np.testing.assert_allclose(mixed, jnp.stack([base[0], trained[1]]), rtol=0, atol=2e-5 * scale)

    road_jax.nnx.set_adapter(adapted, road_jax.load_adapter(tmp_path / "a")[0])
    np.testing.assert_allclose(call(adapted), trained, rtol=0, atol=2e-5 * scale)
