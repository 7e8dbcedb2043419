"""Adapters on models of other libraries, converted: the same function on PyTorch's model in PEFT's hands."""

import copy
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from _compare import assert_close
from flax import nnx
from transformers.models.gpt2.modeling_flax_gpt2 import FlaxConv1D

import convert
import road_jax
from road_core import RoadConfig

IDS = np.random.default_rng(0).integers(0, 96, (2, 12)).astype(np.int32)
HIDDEN, HEADS, HEAD_DIM = 64, 4, 16


def randomised(model):
    """The model with large random weights, biases and norms: where order matters, it shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim < 2 else 0.1))
    return model.eval()


def hugging_face(kind, kv_heads=2, **fields):
    config = getattr(transformers, f"{kind}Config" if kind != "Gemma3" else "Gemma3TextConfig")(
        vocab_size=96,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        pad_token_id=0,
        tie_word_embeddings=kind == "Gemma3",
        rms_norm_eps=1e-6,
        **fields,
    )
    return randomised(getattr(transformers, f"{kind}ForCausalLM")(config))


def tunix(kind, base, directory):
    """Tunix's model, filled by its own reader of Hugging Face's checkpoints."""
    library = import_module(f"tunix.models.{kind}.model")
    reader = import_module(f"tunix.models.{kind}.params" + ("_safetensors" if kind == "gemma3" else ""))
    sizes = {
        "num_layers": 2,
        "embed_dim": HIDDEN,
        "hidden_dim": 96,
        "num_heads": HEADS,
        "head_dim": HEAD_DIM,
        "num_kv_heads": base.config.num_key_value_heads,
    }
    if kind == "gemma3":
        options = {"num_embed": 96, "sliding_window_size": 8, "param_dtype": jnp.float32}
    else:
        options = {"vocab_size": 96, "rope_theta": 1_000_000, "norm_eps": 1e-6}
    if kind == "qwen2":
        options |= {"dtype": jnp.float32, "param_dtype": jnp.float32}
    base.save_pretrained(directory)
    model = reader.create_model_from_safe_tensors(
        str(directory), library.ModelConfig(**sizes, **options), dtype=jnp.float32
    )
    return model, {library.Einsum: lambda layer: road_jax.einsum_layout(layer.einsum_str, kernel="w")}


GEMMA = {"sliding_window": 8, "query_pre_attn_scalar": HEAD_DIM}
TUNIX = {
    "llama": ("llama3", "Llama", {"rope_theta": 1_000_000}),
    "qwen2": ("qwen2", "Qwen2", {"rope_theta": 1_000_000}),
    "qwen3": ("qwen3", "Qwen3", {"rope_theta": 1_000_000}),
    "gemma3_text": ("gemma3", "Gemma3", GEMMA),
    "gemma3_text-fused": ("gemma3", "Gemma3", {**GEMMA, "kv_heads": HEADS}),
}


def logits(model):
    places = jnp.broadcast_to(jnp.arange(12), IDS.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((12, 12), bool))[None], (2, 12, 12))
    return np.asarray(model(jnp.asarray(IDS), places, None, mask)[0])


def torch_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long(), attention_mask=torch.ones(IDS.shape)).logits.numpy()


@pytest.fixture(scope="module", params=TUNIX)
def pair(request, tmp_path_factory):
    kind, theirs, fields = TUNIX[request.param]
    base = hugging_face(theirs, **fields)
    model, layers = tunix(kind, base, tmp_path_factory.mktemp("base"))
    assert_close(logits(model), torch_logits(base), "float32")
    return request.param, base, model, layers


@pytest.mark.parametrize(("variant", "group_size"), [("road_1", 2), ("road_2", 16), ("road_4", 32)])
def test_tunix(pair, variant, group_size, tmp_path):
    family, base, model, layers = pair
    # Tunix adds the biases of Qwen2's query, key and value after the layers, where PyTorch's layers have them.
    targets = r".*(o_proj|mlp\.\w+_proj)" if family == "qwen2" else "all-linear"
    # Gemma's head is its embedding.
    saved = None if "gemma" in family else ["lm_head"]
    config = RoadConfig(
        variant=variant, target_modules=targets, group_size=group_size, init_weights=False, modules_to_save=saved
    )
    adapted = road_jax.nnx.wrap(model, config, layers=layers, rngs=nnx.Rngs(1))
    adapter = road_jax.nnx.get_adapter(adapted)
    if saved:
        adapter["lm_head"]["w"] = jnp.roll(adapter["lm_head"]["w"], 1, axis=1)
        road_jax.nnx.set_adapter(adapted, adapter)
    road_jax.save_adapter(tmp_path / "flax", adapter, config)
    convert.to_torch(tmp_path / "flax", tmp_path / "torch", family=family)
    # PEFT changes the model that it is given.
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "torch").eval()
    assert_close(logits(adapted), torch_logits(loaded), "float32", moved_from=torch_logits(base))


TEXT = {"vocab_size": 96, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS}
WIDE = {**TEXT, "intermediate_size": 96, "max_position_embeddings": 32}
ONES, ZEROS, PLACES = np.ones_like(IDS), np.zeros_like(IDS), np.broadcast_to(np.arange(12), IDS.shape)
PIXELS = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
VISION = {**WIDE, "image_size": 8, "patch_size": 4}
# The model, its config, and what its Flax module is called with.
LINEN = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4}, (IDS, ONES, PLACES)),
    "opt": (
        "OPTForCausalLM",
        {**TEXT, "ffn_dim": 96, "max_position_embeddings": 32, "word_embed_proj_dim": HIDDEN},
        (IDS, ONES, PLACES),
    ),
    "bert": ("BertForMaskedLM", WIDE, (IDS, ONES, ZEROS, PLACES, None)),
    "roberta": ("RobertaForMaskedLM", {**WIDE, "pad_token_id": 0}, (IDS + 1, ONES, ZEROS, PLACES + 1, None)),
    "llama": ("LlamaForCausalLM", {**WIDE, "num_key_value_heads": 2}, (IDS, ONES, PLACES)),
    "mistral": ("MistralForCausalLM", {**WIDE, "num_key_value_heads": 2, "sliding_window": 32}, (IDS, ONES, PLACES)),
    "gemma": ("GemmaForCausalLM", {**WIDE, "num_key_value_heads": 2, "head_dim": 16}, (IDS, ONES, PLACES)),
    "vit-4": ("ViTForImageClassification", VISION, (PIXELS,)),
    "clip": (
        "CLIPModel",
        {"text_config": {**WIDE, "eos_token_id": 95}, "vision_config": VISION, "projection_dim": 32},
        (IDS, PIXELS, ONES, PLACES),
    ),
}


@pytest.mark.parametrize("family", LINEN)
def test_transformers_4(family, tmp_path):
    name, fields, inputs = LINEN[family]
    kind = getattr(transformers, name)
    config = kind.config_class(**fields)
    base = randomised(kind(config))
    base.save_pretrained(tmp_path / "base")
    theirs = getattr(transformers, f"Flax{name}").from_pretrained(tmp_path / "base", from_pt=True)
    variables = {"params": theirs.params}
    output = "logits_per_image" if family == "clip" else "logits"

    def torch_output(model):
        ids = {"input_ids": torch.from_numpy(inputs[0]).long()} if family != "vit-4" else {}
        pixels = {"pixel_values": torch.from_numpy(PIXELS).permute(0, 3, 1, 2)} if family in ("vit-4", "clip") else {}
        with torch.no_grad():
            return model(**ids, **pixels)[output].numpy()

    config = RoadConfig(variant="road_2", target_modules="all-linear", group_size=32, init_weights=False)
    road = road_jax.transform(theirs.module, config, layers={FlaxConv1D: lambda *_: road_jax.Layout(kernel_axes=(0,))})
    adapter = road.init(jax.random.key(1), variables, *inputs)
    plain = torch_output(base)
    assert_close(road.model.apply(variables, *inputs)[output], plain, "float32")
    road_jax.save_adapter(tmp_path / "flax", adapter, config)
    convert.to_torch(tmp_path / "flax", tmp_path / "torch", family=family)
    if family == "gpt2":  # whose Conv1D PEFT doesn't know
        convert.merge(tmp_path / "base", tmp_path / "torch", tmp_path / "merged")
        adapted = kind.from_pretrained(tmp_path / "merged").eval()
    else:
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "torch").eval()
    expected = torch_output(adapted)
    assert_close(road.apply(variables, adapter, *inputs)[output], expected, "float32", moved_from=plain)
