"""The loss over parts of a batch's targets, against all logits at once."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _compare import assert_close, named_values

import road_jax
from road_core import AdapterError, RoadConfig
from road_jax import models
from road_jax.models import Decoder, DecoderConfig, _loss
from road_jax.train import _step

HIDDEN, VOCABULARY = 16, 96
SIZES = {"hidden_size": HIDDEN, "vocab_size": VOCABULARY, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}


def decoder(kind="llama", *, dtype=jnp.float32, **changes):
    fields = {"model_type": kind, **SIZES, **HEADS, **changes}
    model = Decoder(DecoderConfig.from_hugging_face(fields, kind), dtype=dtype, param_dtype=dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 4), np.int32))

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        values = named_values(name, *leaf.shape, mean=float("norm" in name), std=0.2)
        return jnp.asarray(values, leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(fill, shapes)


def batch_of(rows, n):
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, VOCABULARY, (2, rows, 12)).astype(np.int32)
    at = np.sort(rng.integers(0, 12, (rows, n)).astype(np.int32), axis=1)
    weights = (rng.random((rows, n)) > 0.2).astype(np.float32)
    return {
        "input_ids": ids,
        "segments": np.ones_like(ids),
        "logits_at": at,
        "targets": targets[:, :n],
        "weights": weights,
    }


def adapted(model, variables, target_modules="all-linear", **options):
    road = road_jax.transform(model, RoadConfig(target_modules=target_modules, group_size=8, **options))
    adapter = road.init(jax.random.key(0), variables, np.ones((1, 4), np.int32))
    moved = jax.tree.map(lambda leaf: leaf + (0.1 * named_values("moved", *leaf.shape)).astype(leaf.dtype), adapter)
    return road, moved


def parts_loss(road, adapter, variables, batch, **options):
    given = {name: batch[name] for name in ("weights", "logits_at")} | {"attention_mask": batch["segments"]} | options
    return models.cross_entropy(road, variables, adapter, batch["input_ids"], batch["targets"], **given)


def whole_loss(road, adapter, variables, batch):
    logits = road.apply(
        variables, adapter, batch["input_ids"], attention_mask=batch["segments"], logits_at=batch["logits_at"]
    ).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.sum(losses * batch["weights"]), jnp.argmax(logits, axis=-1) == batch["targets"]


def compiled(loss, road):
    return jax.jit(jax.value_and_grad(functools.partial(loss, road), has_aux=True))


@pytest.mark.parametrize(
    ("model", "options", "targets", "n"),
    [
        ({}, {}, 6, 7),
        ({}, {}, 2, 8),
        ({}, {}, 256, 7),
        ({"tie_word_embeddings": True}, {}, 6, 7),
        ({"kind": "gemma2", "final_logit_softcapping": 2.0}, {}, 6, 7),
        ({"kind": "granite", "logits_scaling": 8.0}, {}, 6, 7),
        ({}, {"target_modules": ["q_proj", "lm_head"]}, 6, 7),
        ({}, {"target_modules": ["lm_head"]}, 6, 7),
        ({}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 6, 7),
        ({"tie_word_embeddings": True}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, 6, 7),
    ],
    ids=[
        "padded",
        "a place a part",
        "one part",
        "tied",
        "capped",
        "scaled",
        "rotated head",
        "head alone",
        "trained head",
        "trained embedding",
    ],
)
def test_it_is_the_loss_of_all_logits(model, options, targets, n, monkeypatch):
    monkeypatch.setattr(_loss, "TARGETS", targets)
    model, variables = decoder(**model)
    road, adapter = adapted(model, variables, **options)
    batch = batch_of(3, n)
    (loss, right), gradients = compiled(parts_loss, road)(adapter, variables, batch)
    (expected, theirs), wanted = compiled(whole_loss, road)(adapter, variables, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(right, theirs)
    assert jax.tree.structure(gradients) == jax.tree.structure(wanted)
    for found, leaf in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert np.abs(leaf).max() > 0
        assert_close(found, leaf, "float32")
    # Without a gradient, as in evaluation.
    evaluated = jax.jit(functools.partial(parts_loss, road))(adapter, variables, batch)
    np.testing.assert_allclose(evaluated[0], expected, rtol=1e-5)
    np.testing.assert_array_equal(evaluated[1], theirs)


def test_next_tokens_of_whole_rows(monkeypatch):
    """By default every place has a target; those below 0 aren't counted, as in PyTorch's losses."""
    monkeypatch.setattr(_loss, "TARGETS", 6)
    model, variables = decoder()
    road, adapter = adapted(model, variables)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (3, 9)).astype(np.int32)
    targets = np.concatenate([ids[:, 1:], np.full((3, 1), -100, np.int32)], axis=1)

    def whole(adapter):
        logits = road.apply(variables, adapter, ids)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).sum(), logits.argmax(-1)

    def parts(adapter):
        return models.cross_entropy(road, variables, adapter, ids, targets)

    (expected, first), wanted = jax.jit(jax.value_and_grad(whole, has_aux=True))(adapter)
    (loss, right), gradients = jax.jit(jax.value_and_grad(parts, has_aux=True))(adapter)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(right[:, :-1], first == ids[:, 1:])
    assert not right[:, -1].any()
    jax.tree.map(lambda found, leaf: assert_close(found, leaf, "float32"), gradients, wanted)


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "lm_head"]])
def test_rows_with_adapters_of_their_own(target_modules, monkeypatch):
    monkeypatch.setattr(_loss, "TARGETS", 6)
    model, variables = decoder()
    road, adapter = adapted(model, variables, target_modules)
    several = road_jax.stack_adapters([adapter, jax.tree.map(lambda leaf: 2 * leaf, adapter)])
    batch, numbers = batch_of(4, 7), np.asarray([2, 0, 1, 2], np.int32)
    loss, right = parts_loss(road, several, variables, batch, adapter_ids=numbers)
    alone = [{}, adapter, jax.tree.map(lambda leaf: 2 * leaf, adapter)]
    rows = [{name: array[i : i + 1] for name, array in batch.items()} for i in range(4)]
    found = [parts_loss(road, alone[i], variables, row) for i, row in zip(numbers, rows, strict=True)]
    np.testing.assert_allclose(loss, sum(one[0] for one in found), rtol=1e-5)
    np.testing.assert_array_equal(right, np.concatenate([one[1] for one in found]))
    assert len({float(one[0]) for one in found}) == 4


def test_bad_arguments():
    model, variables = decoder()
    road, adapter = adapted(model, variables)
    batch = batch_of(2, 7)
    for call, message in (
        (lambda: parts_loss(model, adapter, variables, batch), "^road: expected one that transform made .* Decoder$"),
        (
            lambda: models.cross_entropy(road, variables, adapter, batch["input_ids"], batch["targets"]),
            r"^targets: expected an array \[2, 12\], as input_ids, found \[2, 7\]$",
        ),
        (
            lambda: parts_loss(road, adapter, variables, batch, weights=np.ones(7)),
            r"^weights: expected an array \[2, 7\], as logits_at, found \[7\]$",
        ),
    ):
        with pytest.raises(AdapterError, match=message):
            call()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_head(kind, monkeypatch):
    monkeypatch.setattr(_loss, "TARGETS", 6)
    model, variables = decoder(hidden_size=64, intermediate_size=64, head_dim=32)
    variables = road_jax.quantize(variables, kind)
    road, adapter = adapted(model, variables, ["q_proj", "lm_head"])
    batch = batch_of(3, 8)
    (loss, _), gradients = compiled(parts_loss, road)(adapter, variables, batch)
    (expected, _), wanted = compiled(whole_loss, road)(adapter, variables, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda found, leaf: assert_close(found, leaf, "float32"), gradients, wanted)


def test_a_trained_head_of_few_bits_sums_its_gradient_in_float32(monkeypatch):
    """Summed in bfloat16, a sum of hundreds of parts doesn't grow any more: each is below half of its last bit."""
    monkeypatch.setattr(_loss, "TARGETS", 1)
    model, variables = decoder(dtype=jnp.bfloat16)
    road, adapter = adapted(model, variables, ["q_proj"], modules_to_save=["lm_head"])
    once = batch_of(1, 2)
    often = once | {name: np.tile(once[name], (1, 512)) for name in ("logits_at", "targets", "weights")}
    gradient = compiled(parts_loss, road)
    found, expected = (gradient(adapter, variables, batch)[1]["lm_head"]["kernel"] for batch in (often, once))
    assert found.dtype == jnp.bfloat16
    assert_close(found, 512 * expected.astype(jnp.float32), "bfloat16")


@pytest.mark.no_leaks
def test_no_tracer_leaks(monkeypatch):
    monkeypatch.setattr(_loss, "TARGETS", 6)
    model, variables = decoder()
    road, adapter = adapted(model, variables, ["q_proj", "lm_head"])
    (loss, _), _ = compiled(parts_loss, road)(adapter, variables, batch_of(3, 7))
    assert np.isfinite(loss)


def test_logits_are_never_whole_and_no_product_is_computed_twice(monkeypatch):
    monkeypatch.setattr(_loss, "TARGETS", 4)
    model, variables = decoder()
    road, adapter = adapted(model, variables)
    text = compiled(parts_loss, road).lower(adapter, variables, batch_of(2, 12)).compile().as_text()
    # A loop over parts of two places of two rows, with one product for logits and one for hidden states' gradient.
    products = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
    assert sorted(size for size in products if size.split(",")[0] in ("4", "16")) == ["4,16", "4,96"]
    shapes = [[int(size) for size in found.split(",")] for found in re.findall(r"\w\d+\[([\d,]+)\]", text)]
    assert not any(VOCABULARY in shape and np.prod(shape) > HIDDEN * VOCABULARY for shape in shapes)


@pytest.mark.parametrize("tied", [True, False])
def test_a_mesh_gathers_the_head_once_for_all_parts(tied, monkeypatch):
    monkeypatch.setattr(_loss, "TARGETS", 2)
    model, variables = decoder(tie_word_embeddings=tied)
    mesh = models.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    road, adapter = adapted(model, variables)
    batch = batch_of(8, 8)
    (expected, theirs), wanted = compiled(whole_loss, road)(adapter, variables, batch)
    placed = jax.device_put(variables, models.shardings(variables, mesh))
    batch = jax.device_put(batch, models._mesh.rows_sharding(mesh))
    program = compiled(parts_loss, _step.on_mesh(road, mesh))
    (loss, right), gradients = program(adapter, placed, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(right, theirs)
    jax.tree.map(lambda found, leaf: assert_close(found, leaf, "float32"), gradients, wanted)
    text = program.lower(adapter, placed, batch).compile().as_text()
    once, in_loops = [], []
    for computation in text.split("\n\n"):
        sizes = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", computation)
        (once if computation.startswith("ENTRY") else in_loops).extend(size.split(",") for size in sizes)
    # A device has half of the vocabulary.
    half = str(VOCABULARY // 2)
    assert sum(half in sizes for sizes in once) == (1 if tied else 2)
    # Layers are gathered there.
    assert in_loops
    assert not any(half in sizes for sizes in in_loops)
