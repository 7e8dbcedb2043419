"""The decoder against Hugging Face's own PyTorch models, in float32, and what the loader refuses."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from _compare import assert_close
from _models import small_checkpoint, small_model
from safetensors.torch import load_file, save_file

from road_core import AdapterError
from road_jax import models
from road_jax.models import _decoder, _load

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
MINISTRAL = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 6}
MINISTRAL["llama_4_scaling_beta"] = 0.5
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + i / 8 for i in range(12)],
    "long_factor": [2.0 + i for i in range(12)],
}
KINDS = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, scaled rotations": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear rotations": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    ),
    "llama, gelu": ("llama", {"hidden_act": "gelu"}),
    "llama, one kv head": ("llama", {"num_key_value_heads": 1, "head_dim": 64}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "ministral3": ("ministral3", {"rope_parameters": MINISTRAL}),
    "qwen2": ("qwen2", {}),
    "qwen2, some windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("qwen3", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 48, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {"sliding_window": 6, "query_pre_attn_scalar": 48, "num_hidden_layers": 7}),
    "gemma3, scaled rotations": (
        "gemma3_text",
        {"rope_parameters": GEMMA3, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "gemma3, windows in all layers": ("gemma3_text", {}),
    "gemma3 with vision": ("gemma3", {"sliding_window": 6, "num_hidden_layers": 7}),
    "mistral3": ("mistral3", {"sliding_window": None, "tie_word_embeddings": False}),
    "mistral3 of ministral3": ("mistral3", {"model_type": "ministral3", "rope_parameters": MINISTRAL}),
    "phi3": ("phi3", {}),
    "phi3, half of each head turned": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}, "sliding_window": 6},
    ),
    "phi3, long": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 12}),
    "phi3, short": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 20}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "olmo3": ("olmo3", {"sliding_window": 6, "num_hidden_layers": 5}),
    "olmo3, scaled rotations": (
        "olmo3",
        {
            "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}},
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "mixtral": ("mixtral", {"sliding_window": 6}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe, some windows": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3, "num_hidden_layers": 4},
    ),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, windows": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5, "norm_topk_prob": False}),
    "olmoe": ("olmoe", {"attention_bias": True}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 4.0,
        },
    ),
}


IDS = np.ones((1, 2), np.int32)


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(6, 160, shape).astype(np.int32)


def torch_logits(model, ids, mask):
    """Positions begin with each row's first token, as in generation."""
    ids, mask = torch.from_numpy(ids).long(), torch.from_numpy(mask).long()
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.numpy()


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_hugging_faces(name, tmp_path):
    kind, changes = KINDS[name]
    peer = small_model(kind, **changes)
    peer.save_pretrained(tmp_path)
    ids, mask = tokens(3, 20), np.ones((3, 20), np.int32)
    mask[0, 13:], mask[1, :7] = 0, 0
    expected = torch_logits(peer, ids, mask)[mask == 1]
    for scan in (True, False):
        module, variables = models.load(tmp_path, scan=scan)
        found = jax.jit(module.apply)(variables, ids, attention_mask=mask)
        assert found.shape == (3, 20, 160)
        assert_close(np.asarray(found)[mask == 1], expected, "float32", moved_from=np.zeros_like(expected))


def test_the_rotary_scaling_and_the_windows_matter(tmp_path):
    """The cases above would pass unnoticed if these fields didn't change the function."""
    ids, mask = tokens(1, 40), np.ones((1, 40), np.int32)
    full = ["full_attention"] * 3
    longer = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 12}
    for kind, changes, plain in (
        ("llama", {"rope_parameters": LLAMA3}, {}),
        ("llama", {"rope_parameters": YARN}, {}),
        ("mistral", {"sliding_window": 6}, {"sliding_window": None}),
        ("ministral3", {"rope_parameters": MINISTRAL}, {"rope_parameters": {**MINISTRAL, "llama_4_scaling_beta": 0.0}}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}, {}),
        ("gemma2", {"sliding_window": 6}, {"sliding_window": 6, "layer_types": full}),
        ("gemma2", {"attn_logit_softcapping": 2.0}, {}),
        ("gemma2", {"final_logit_softcapping": 2.0}, {}),
        ("gemma2", {"query_pre_attn_scalar": 48}, {}),
        ("gemma3_text", {}, {"layer_types": full}),
        ("phi3", longer, {**longer, "original_max_position_embeddings": 40}),
        ("phi3", longer, {"rope_parameters": {**LONGROPE, "rope_type": "default"}}),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, {"no_rope_layers": [1, 1, 1]}),
        *(("granite", {name: 0.2}, {}) for name in ("embedding_multiplier", "residual_multiplier")),
        *(("granite", {name: 0.2}, {}) for name in ("attention_multiplier", "logits_scaling")),
    ):
        with_it, without = (torch_logits(small_model(kind, **c), ids, mask) for c in (changes, plain))
        assert np.abs(with_it - without).max() > 0.05, (kind, changes)


@pytest.mark.parametrize("name", ["llama", "mistral", "ministral3", "gemma3", "phi3, between"])
def test_packed_texts_see_themselves_only(name, tmp_path):
    # Of the two texts below, one is longer than LongRoPE's short frequencies are for.
    between = ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 8})
    kind, changes = {**KINDS, "phi3, between": between}[name]
    small_checkpoint(tmp_path, kind, **changes)
    module, variables = models.load(tmp_path)
    ids = tokens(1, 17)
    segments = np.asarray([[1] * 5 + [2] * 9 + [0] * 3], np.int32)
    apply = jax.jit(module.apply)
    packed = apply(variables, ids, attention_mask=segments)
    for start, end in ((0, 5), (5, 14)):
        alone = apply(variables, ids[:, start:end])
        assert_close(packed[:, start:end], alone, "float32")
    whole = apply(variables, ids)
    assert np.abs(np.asarray(whole - packed)[:, 5:14]).max() > 0.05
    # One row may be given for a whole batch.
    twice = np.concatenate([ids, ids[:, ::-1]])
    for_all = apply(variables, twice, attention_mask=segments)
    assert np.array_equal(for_all, apply(variables, twice, attention_mask=np.repeat(segments, 2, axis=0)))


def test_logits_where_they_are_wanted(tmp_path):
    for tied in (True, False):
        small_checkpoint(tmp_path / str(tied), tie_word_embeddings=tied)
        module, variables = models.load(tmp_path / str(tied))
        ids = tokens(2, 9)
        at = np.asarray([[8, 0, 3], [1, 1, 2]], np.int32)
        apply = jax.jit(module.apply)
        every = np.asarray(apply(variables, ids))
        assert_close(apply(variables, ids, logits_at=at), np.take_along_axis(every, at[..., None], 1), "float32")


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        *("llama", "mistral", "ministral3", "qwen2, some windows", "qwen3"),
        *("gemma2", "gemma3", "phi3, short", "phi3, long", "smollm3", "olmo2", "qwen2_moe, some windows"),
    ],
)
def test_a_cache_gives_what_one_call_gives(name, scan, tmp_path):
    kind, changes = KINDS[name]
    small_checkpoint(tmp_path, kind, **changes)
    module, variables = models.load(tmp_path, scan=scan)
    ids, mask = tokens(2, 18), np.ones((2, 18), np.int32)
    mask[1, :4] = 0
    apply = jax.jit(module.apply, static_argnames="cache_size")
    expected = np.asarray(apply(variables, ids, attention_mask=mask))
    first, cache = apply(variables, ids[:, :10], attention_mask=mask[:, :10], cache_size=20)
    assert cache.keys.shape == (module.config.num_hidden_layers, 2, 20, 2, 32)
    found = [first]
    for start, end in ((10, 13), (13, 14), (14, 18)):
        logits, cache = apply(variables, ids[:, start:end], cache=cache)
        found.append(logits)
    assert int(cache.used) == 18
    assert_close(np.concatenate(found, axis=1)[mask == 1], expected[mask == 1], "float32")


@pytest.mark.parametrize("remat", ["none", "linears"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2, some windows", "gemma2"])
def test_attention_in_parts_is_attention(name, remat, tmp_path, monkeypatch):
    kind, changes = KINDS[name]
    small_checkpoint(tmp_path, kind, **changes)
    module, variables = models.load(tmp_path, remat=remat)
    ids, segments = tokens(3, 21), np.ones((3, 21), np.int32)
    # Padding on either side, and two texts in a row, which end within parts.
    segments[0, 17:], segments[1, :5], segments[2, 11:] = 0, 0, 2

    def run():
        def loss(variables):
            logits = module.apply(variables, ids, attention_mask=segments)
            return jnp.sum(jnp.square(logits), where=(segments > 0)[..., None]), logits

        (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
        return np.asarray(logits)[segments > 0], jax.tree.leaves(gradient)

    whole, expected = run()
    monkeypatch.setattr(_decoder, "PART", 4)
    monkeypatch.setattr(_decoder, "PARTS", 7)
    assert _decoder.part_of(21) == 4
    logits, gradient = run()
    assert_close(logits, whole, "float32", moved_from=np.zeros_like(whole))
    for found, wanted in zip(gradient, expected, strict=True):
        assert_close(found, wanted, "float32")


@pytest.mark.parametrize(("length", "part"), [(1, 1), (128, 128), (129, 128), (1024, 128), (1025, 256), (8192, 1024)])
def test_how_many_tokens_a_part_has(length, part):
    assert _decoder.part_of(length) == part


def test_long_rows_cost_half_the_attention_and_little_memory(monkeypatch):
    fields = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
    fields |= {"num_hidden_layers": 2, "num_attention_heads": 8}
    module = models.Decoder(models.DecoderConfig.from_hugging_face(fields, "test"))
    ids = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    variables = jax.eval_shape(module.init, jax.random.key(0), ids)

    def cost():
        def loss(embedding, variables, ids):
            params = {**variables["params"]["model"], "embed_tokens": {"embedding": embedding}}
            return jnp.sum(module.apply({"params": {**variables["params"], "model": params}}, ids))

        embedding = variables["params"]["model"]["embed_tokens"]["embedding"]
        program = jax.jit(jax.grad(loss)).lower(embedding, variables, ids).compile()
        return program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes

    flops, memory = cost()
    monkeypatch.setattr(_decoder, "PART", 1024)
    flops_whole, memory_whole = cost()
    # Scores and their products with values are most of what this model computes.
    assert flops < 0.65 * flops_whole
    assert memory < 0.5 * memory_whole


def test_remat_changes_no_number(tmp_path):
    small_checkpoint(tmp_path)
    ids = tokens(2, 8)
    results = []
    for scan in (True, False):
        for remat in ("none", "linears", "full"):
            module, variables = models.load(tmp_path, scan=scan, remat=remat)

            def loss(variables, module=module):
                return jnp.mean(jnp.square(module.apply(variables, ids)))

            gradient = jax.jit(jax.grad(loss))(variables)["params"]["model"]["layers"]
            gate = (
                gradient["mlp"]
                if scan
                else {
                    "gate_proj": jax.tree.map(
                        lambda *leaves: jnp.stack(leaves), *[gradient[str(i)]["mlp"]["gate_proj"] for i in range(3)]
                    )
                }
            )
            results.append(gate["gate_proj"]["kernel"])
    for other in results[1:]:
        assert_close(other, results[0], "float32", moved_from=np.zeros_like(results[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_their_bits(dtype, tmp_path):
    small_checkpoint(tmp_path, "qwen2", dtype=dtype)
    module, variables = models.load(tmp_path)
    name = str(dtype).removeprefix("torch.")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {name}
    assert module.apply(variables, tokens(1, 4)).dtype == name
    stored = load_file(tmp_path / "model.safetensors")
    layers = variables["params"]["model"]["layers"]
    for layer in range(3):
        for found, key in (
            (layers["mlp"]["up_proj"]["kernel"][layer].T, "mlp.up_proj.weight"),
            (layers["self_attn"]["k_proj"]["bias"][layer], "self_attn.k_proj.bias"),
        ):
            expected = stored[f"model.layers.{layer}.{key}"].contiguous().view(torch.uint8).numpy()
            np.testing.assert_array_equal(np.ascontiguousarray(found).view(np.uint8).ravel(), expected.ravel())


def test_bfloat16_computes_near_float32(tmp_path):
    small_checkpoint(tmp_path)
    ids = tokens(2, 12)
    exact, rough = (
        jax.jit(module.apply)(variables, ids)
        for module, variables in (models.load(tmp_path, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    )
    assert_close(rough.astype(jnp.float32), exact, "bfloat16")


def test_a_sharded_checkpoint_is_the_same(tmp_path):
    peer = small_model()
    peer.save_pretrained(tmp_path / "one")
    peer.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    (_, one), (_, many) = models.load(tmp_path / "one"), models.load(tmp_path / "many")
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.array_equal(a, b), one, many))


def edit(directory, change):
    fields = json.loads((directory / "config.json").read_text())
    change(fields)
    (directory / "config.json").write_text(json.dumps(fields))


def retensor(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_scaling": LLAMA3},
        {
            "rope_parameters": {"rope_theta": 500.0},
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "rope_theta": 9.0,
        },
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 64},
        {"rope_theta": 500.0},
        {"rope_parameters": YARN, "max_position_embeddings": 128},
        {"rope_parameters": {**YARN, "beta_fast": 8, "beta_slow": 2, "truncate": False, "attention_factor": 1.5}},
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.4}},
    ],
)
def test_rotary_fields_are_read_as_transformers_does(fields, tmp_path):
    small_checkpoint(tmp_path)
    edit(tmp_path, lambda f: (f.pop("rope_parameters"), f.update(fields)))
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).model.rotary_emb
    (rope,) = models.read_config(tmp_path).ropes
    np.testing.assert_allclose(rope.frequencies, peer.inv_freq.numpy(), rtol=1e-6)
    np.testing.assert_allclose(rope.scale, peer.attention_scaling, rtol=1e-6)


def test_names_of_the_language_model_in_every_version(tmp_path):
    """Checkpoints have the hub's names or, from some versions of transformers, the model's own."""
    small_checkpoint(tmp_path, "mistral3", num_hidden_layers=2, tie_word_embeddings=False)
    _, expected = models.load(tmp_path)
    assert expected["params"].keys() == {"model", "lm_head"}
    assert expected["params"]["model"].keys() == {"language_model"}
    moved = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}

    def rename(tensors):
        for name in [*tensors]:
            if found := next((old for old in moved if name.startswith(old)), None):
                tensors[moved[found] + name.removeprefix(found)] = tensors.pop(name)
        assert not any(name.startswith("language_model") for name in tensors)

    retensor(tmp_path, rename)
    _, found = models.load(tmp_path)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found, expected))


def test_what_the_config_of_a_language_model_leaves_out():
    # Of google/gemma-3-4b-it.
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    whole = transformers.Gemma3Config(text_config=dict(text)).to_dict()
    read = models.DecoderConfig.from_hugging_face
    assert read({"model_type": "gemma3", "text_config": text}, "sparse") == read(whole, "whole")


@pytest.mark.parametrize("same", [True, False])
def test_a_head_that_differs_is_not_tied(same, tmp_path):
    """As transformers 5 decides it, whatever the config says."""
    small_checkpoint(tmp_path, num_hidden_layers=2, tie_word_embeddings=True)
    name = "model.embed_tokens.weight"
    retensor(tmp_path, lambda t: t.update({"lm_head.weight": t[name].clone() if same else t[name].flip(1)}))
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids, mask = tokens(1, 9), np.ones((1, 9), np.int32)
    expected = torch_logits(peer, ids, mask)
    module, variables = models.load(tmp_path)
    assert module.config.tie_word_embeddings == same == ("lm_head" not in variables["params"])
    assert_close(np.asarray(module.apply(variables, ids)), expected, "float32", moved_from=np.zeros_like(expected))


@pytest.mark.parametrize("scan", [True, False])
def test_a_mesh_gets_each_param_in_shares(scan, tmp_path, monkeypatch):
    small_checkpoint(tmp_path, "qwen2", dtype=torch.bfloat16)
    _, expected = models.load(tmp_path, scan=scan)
    mesh = models.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    read, share = [], _load._share
    with monkeypatch.context() as patch:
        patch.setattr(_load, "_share", lambda *args, **options: (read.append(share(*args, **options)), read[-1])[1])
        _, variables = models.load(tmp_path, scan=scan, mesh=mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, variables) == models.shardings(variables, mesh)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, variables, expected))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    for device in jax.devices():
        shards = [s for leaf in jax.tree.leaves(variables) for s in leaf.addressable_shards if s.device == device]
        held = sum(shard.data.nbytes for shard in shards)
        assert held < 0.27 * whole
        # The files were read for this, and no more of them than needed.
        assert sum(array.nbytes for array in read) <= 8 * held
    with pytest.raises(
        AdapterError, match="mesh: expected an axis tensor that divides the model's num_attention_heads 4"
    ):
        models.load(tmp_path, mesh=models.make_mesh({"tensor": 8}))


BAD = {
    "no config": (lambda d: (d / "config.json").unlink(), "expected a file config.json, found none"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"expected a file model\.safetensors, found none"),
    "truncated": (
        lambda d: os.truncate(d / "model.safetensors", 5000),
        r"model\.safetensors: expected a whole safetensors file, found a broken one",
    ),
    "another type": (
        lambda d: edit(d, lambda f: f.update(model_type="t5")),
        "expected model_type to be one of llama, mistral, .*, mistral3, found 't5'",
    ),
    "no decoder": (
        lambda d: edit(d, lambda f: f.update(model_type="mistral3", text_config={**f, "model_type": "mamba"})),
        r"config\.json: text_config: expected model_type to be one of llama, .*, found 'mamba'",
    ),
    "no language model": (
        lambda d: edit(d, lambda f: f.update(model_type="mistral3", text_config={**f, "model_type": "llama"})),
        r"expected model\.language_model\.embed_tokens\.weight of float32, bfloat16 or float16, found none",
    ),
    "no sizes": (
        lambda d: edit(d, lambda f: f.pop("hidden_size")),
        r"config\.json: expected a field hidden_size, found none",
    ),
    "a wrong size": (
        lambda d: edit(d, lambda f: f.update(intermediate_size=256)),
        r"another form of .*model\.layers\.0\.mlp\.gate_proj\.weight \[192, 128\] for \[256, 128\]",
    ),
    "no number": (
        lambda d: edit(d, lambda f: f.update(vocab_size="many")),
        "expected vocab_size to be an integer from 1 up, found 'many'",
    ),
    "too many layers": (
        lambda d: edit(d, lambda f: f.update(num_hidden_layers=4)),
        r"found no model\.layers\.3\..* and \d+ more",
    ),
    "too few layers": (
        lambda d: edit(d, lambda f: f.update(num_hidden_layers=2)),
        r"besides model\.layers\.2\.",
    ),
    "heads": (
        lambda d: edit(d, lambda f: f.update(num_key_value_heads=3)),
        "whole groups of num_key_value_heads, found 4 and 3",
    ),
    "rotations": (
        lambda d: edit(d, lambda f: f.update(rope_parameters={"rope_type": "dynamic", "factor": 2.0})),
        "expected rope_type to be one of default, linear, llama3, yarn, longrope, found 'dynamic'",
    ),
    "too few factors": (
        lambda d: edit(d, lambda f: f.update(rope_parameters={**LONGROPE, "partial_rotary_factor": 1})),
        "expected short_factor to be 16 positive numbers, found 12 values",
    ),
    "a part of each head": (
        lambda d: edit(d, lambda f: f.update(partial_rotary_factor=0.5)),
        "expected rotary positions on whole heads, found a partial_rotary_factor",
    ),
    "a part that can't be halved": (
        lambda d: edit(d, lambda f: f.update(model_type="phi3", partial_rotary_factor=0.1)),
        "expected a partial_rotary_factor of an even part of 32 elements, found 3",
    ),
    "both directions": (
        lambda d: edit(d, lambda f: f.update(model_type="gemma3_text", use_bidirectional_attention=True)),
        "expected causal attention, found tokens that see later ones",
    ),
    "both directions in any type": (
        lambda d: edit(d, lambda f: f.update(is_causal=False)),
        "expected causal attention, found tokens that see later ones",
    ),
    "a size that is none": (
        lambda d: edit(d, lambda f: f.update(num_hidden_layers=10**30)),
        "expected num_hidden_layers to be at most 16384, found 10+",
    ),
    "a rotation that is none": (
        lambda d: edit(d, lambda f: f.update(rope_parameters={**YARN, "beta_fast": 1e308})),
        "expected rotary positions with finite frequencies, found",
    ),
    "rotations of layers that aren't objects": (
        lambda d: edit(d, lambda f: f.update(model_type="gemma3_text", rope_parameters={"full_attention": "abc"})),
        "expected full_attention to be a JSON object, found 'abc'",
    ),
    "rotations of no layers": (
        lambda d: edit(d, lambda f: f.update(model_type="gemma3_text", rope_parameters=LLAMA3)),
        "expected rope_parameters of full_attention and sliding_attention, found",
    ),
    "factors the wrong way round": (
        lambda d: edit(d, lambda f: f.update(rope_parameters={**LLAMA3, "low_freq_factor": 4.0})),
        "expected low_freq_factor below high_freq_factor, found 4, 4",
    ),
    "layers that turn nothing": (
        lambda d: edit(d, lambda f: f.update(model_type="smollm3", no_rope_layers=[1, 0])),
        r"expected no_rope_layers to be 0 or 1 for each of 3 layers, found \[1, 0\]",
    ),
    "rotations that aren't an object": (
        lambda d: edit(d, lambda f: f.update(rope_scaling="yarn")),
        "expected rope_scaling to be a JSON object, found 'yarn'",
    ),
    "rotations by layer": (
        lambda d: edit(d, lambda f: f.update(rope_parameters={"full_attention": {"rope_theta": 1e4}})),
        "expected rope_parameters to be the same for all layers, found some for 'full_attention'",
    ),
    "layers of no type": (
        lambda d: edit(
            d,
            lambda f: f.update(
                model_type="qwen2", use_sliding_window=True, sliding_window=4, layer_types=["full_attention", {}, 1]
            ),
        ),
        "expected layer_types to name full_attention or sliding_attention for each of 3 layers",
    ),
    "a window from no layer": (
        lambda d: edit(
            d,
            lambda f: f.update(
                model_type="qwen2", use_sliding_window=True, sliding_window=4, layer_types=None, max_window_layers="x"
            ),
        ),
        "expected max_window_layers to be an integer from 0 up, found 'x'",
    ),
    "experts in some layers": (
        lambda d: edit(d, lambda f: f.update(model_type="qwen3_moe", mlp_only_layers=[0])),
        r"expected experts in each of 3 layers, found mlp_only_layers \[0\] and decoder_sparse_step 1",
    ),
    "too few experts": (
        lambda d: edit(d, lambda f: f.update(model_type="mixtral", num_local_experts=2, num_experts_per_tok=3)),
        "expected num_experts_per_tok up to num_local_experts 2, found 3",
    ),
    "clipped attention": (
        lambda d: edit(d, lambda f: f.update(model_type="olmoe", num_experts=2, clip_qkv=8.0)),
        r"expected attention without clip_qkv, found 8\.0",
    ),
    "no experts": (
        lambda d: edit(d, lambda f: f.update(model_type="mixtral", num_local_experts=2, num_experts_per_tok=1)),
        r"found no model\.layers\.0\.block_sparse_moe\.experts\.0\.w2\.weight",
    ),
    "a missing tensor": (
        lambda d: retensor(d, lambda t: t.pop("model.norm.weight")),
        r"found no model\.norm\.weight",
    ),
    "a tensor too many": (
        lambda d: retensor(d, lambda t: t.update({"model.extra.weight": torch.ones(2)})),
        r"besides model\.extra\.weight",
    ),
    "codes": (
        lambda d: retensor(d, lambda t: t.update({"model.norm.weight": torch.ones(128, dtype=torch.int8)})),
        r"another form of model\.norm\.weight of I8",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_checkpoint_is_refused(name, tmp_path):
    damage, message = BAD[name]
    small_checkpoint(tmp_path)
    damage(tmp_path)
    with pytest.raises(AdapterError, match=message):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"remat": "block"}, "remat: expected one of none, linears, full, found 'block'"),
        ({"dtype": "bf16"}, "dtype: expected a floating one such as float32, bfloat16 or float16, found 'bf16'"),
        ({"dtype": jnp.int32}, "dtype: expected a floating one .* found int32"),
    ],
)
def test_options_that_are_none_are_refused(options, said, tmp_path):
    with pytest.raises(AdapterError, match=said):
        models.load(tmp_path, **options)


@pytest.mark.parametrize(
    ("fields", "inputs", "said"),
    [
        ({"remat": "block"}, [IDS], "remat: expected one of none, linears, full, found 'block'"),
        ({"mesh": "data=2"}, [IDS], r"mesh: expected the axes data, fsdp, tensor \(make_mesh\), found str"),
        ({"config": None}, [IDS], r"Decoder\.config: expected DecoderConfig, found NoneType"),
        ({}, [[[1, 2]]], r"input_ids: expected an array of whole numbers \[batch, length\], found list"),
        ({}, [np.ones((1, 2), np.float32)], r"input_ids: .* found float32 \[1, 2\]"),
        ({}, [IDS[0]], r"input_ids: .* found int32 \[2\]"),
        ({}, [IDS, IDS[:, :1]], r"attention_mask: expected an array \[1, 2\], as input_ids, found \[1, 1\]"),
        ({}, [IDS, [[1, 1]]], r"attention_mask: expected .* found list"),
    ],
)
def test_what_a_decoder_cannot_take_is_refused(fields, inputs, said, tmp_path):
    small_checkpoint(tmp_path)
    decoder = models.Decoder(**{"config": models.read_config(tmp_path), **fields})
    with pytest.raises(AdapterError, match=f"^{said}"):
        jax.eval_shape(lambda: decoder.init(jax.random.key(0), *inputs))


def test_a_broken_index_is_refused(tmp_path):
    small_model().save_pretrained(tmp_path, max_shard_size="100KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, shard = sorted(index["weight_map"].items())[0]
    other = next(s for s in index["weight_map"].values() if s != shard)
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], name: other}}))
    with pytest.raises(AdapterError, match=f"expected tensors where the index says, found no {name}"):
        models.load(tmp_path)
    path.write_text(json.dumps({"weight_map": {name: "../elsewhere.safetensors"}}))
    with pytest.raises(AdapterError, match=r"expected names of files in the folder, found '\.\./elsewhere"):
        models.load(tmp_path)
    path.write_text("{}")
    with pytest.raises(AdapterError, match="expected a weight_map"):
        models.load(tmp_path)
