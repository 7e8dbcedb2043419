"""Other libraries' layouts: their paths compared with real models, their order of outputs with the reference."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from _compare import assert_close, named_values
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import convert
import road_torch
from convert._families import LAYER, TABLES, tables
from convert._mapping import map_to_flax, map_to_torch
from convert._regroup import halves_group_size
from convert._rules import read_rules
from road_core import Adapter, AdapterError, RoadConfig, parameter_size, rotate

VARIANTS = ["road_1", "road_2", "road_4"]

# Names and shapes of the params of transformers 4.48.3's Flax models (with two layers, of which the first is kept),
# made by FlaxGPT2LMHeadModel(config, _do_init=False).params_shape_tree and the like.
TRANSFORMERS_4 = json.loads((Path(__file__).parent / "transformers4.json").read_text())

_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
_VISION = {**{k: v for k, v in _SMALL.items() if k != "vocab_size"}, "image_size": 8, "patch_size": 4}
_DECODER = {**_SMALL, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
_OPT = {k: v for k, v in _SMALL.items() if k != "intermediate_size"} | {"ffn_dim": 64, "word_embed_proj_dim": 16}
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "bert": ("BertForMaskedLM", "BertConfig", _SMALL),
    "bert-cls": ("BertForSequenceClassification", "BertConfig", _SMALL),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _SMALL),
    "roberta-cls": ("RobertaForSequenceClassification", "RobertaConfig", _SMALL),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "t5-gated": ("T5ForConditionalGeneration", "T5Config", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_OPT, "max_position_embeddings": 32}),
    "vit": ("ViTForImageClassification", "ViTConfig", _VISION),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**_SMALL, "max_position_embeddings": 32},
            "vision_config": {**_VISION, "num_hidden_layers": 3},
            "projection_dim": 32,
        },
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _DECODER),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _DECODER),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", _DECODER),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _DECODER),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", _DECODER),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _DECODER),
    "olmo3": ("Olmo3ForCausalLM", "Olmo3Config", _DECODER),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_DECODER, "num_local_experts": 2}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_DECODER, **_EXPERTS, "shared_expert_intermediate_size": 32},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_DECODER, **_EXPERTS}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**_DECODER, **_EXPERTS, "eos_token_id": 1}),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": _DECODER, "vision_config": _VISION, "mm_tokens_per_image": 4},
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {"text_config": {**_DECODER, "model_type": "mistral"}, "vision_config": {**_VISION, "model_type": "pixtral"}},
    ),
    "granite": ("GraniteForCausalLM", "GraniteConfig", _DECODER),
    "ministral3": ("Ministral3ForCausalLM", "Ministral3Config", _DECODER),
}
# transformers' config has head_dim only for models that have the field.
SIZES = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


def hugging_face(name):
    """Only names and shapes, on the meta device."""
    model, config, fields = MODELS[name]
    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, config)(**fields))


def linear_layers(name):
    """Returns ``{path: outputs}`` of the layers that an adapter may be on, without output heads."""
    layers = {}
    for path, module in hugging_face(name).named_modules():
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D):
            layers[path] = module.out_features if isinstance(module, torch.nn.Linear) else module.nf
    return {
        path: out
        for path, out in layers.items()
        if path.rpartition(".")[2] not in ("lm_head", "decoder", "seq_relationship")
        and not path.startswith(("model.vision_tower", "model.multi_modal_projector"))
    }


def adapter_on(layers, variant="road_1", group_size=2, dtype=np.float32, **fields):
    config = RoadConfig(variant=variant, group_size=group_size, target_modules=list(layers), **fields)
    modules = {}
    for path, out in layers.items():
        size = parameter_size(variant, out)
        modules[path] = tuple(named_values(path + kind, size, mean=0.5).astype(dtype) for kind in ("theta", "alpha"))
    return Adapter(config, modules)


def same(a, b):
    first, second = a.tensors(), b.tensors()
    return (
        a.config == b.config
        and dict(a.metadata) == dict(b.metadata)
        and first.keys() == second.keys()
        and all(first[k].shape == second[k].shape and first[k].tobytes() == second[k].tobytes() for k in first)
    )


# Params that are in no module of the tables: bare ones, convolutions, and the biases of tied heads.
BARE = ("cls_token", "position_embeddings", "logit_scale", "class_embedding", "predictions", "lm_head")
CONVOLUTIONS = ("projection", "patch_embedding")


@pytest.mark.parametrize("name", TRANSFORMERS_4)
def test_every_module_of_transformers_4_has_its_partner(name):
    (table,) = tables(name.partition("-")[0], "transformers")
    theirs = {path: list(tensor.shape) for path, tensor in hugging_face(name).state_dict().items()}
    linear = 0
    for key, shape in TRANSFORMERS_4[name].items():
        path, _, leaf_name = key.rpartition(".")
        place = table.find_flax(path)
        if place is None:
            last = path.rpartition(".")[2]
            bare = leaf_name in BARE or (last in BARE and leaf_name == "bias")
            assert bare or last in CONVOLUTIONS, key
            continue
        leaf = next(leaf for leaf in place.row.leaves if leaf.flax == leaf_name)
        partner = f"{place.row.torch.replace(LAYER, str(place.layer))}.{leaf.torch}"
        assert theirs[partner] == (shape[::-1] if leaf.transposed else shape), key
        assert place.row.linear == (leaf_name == "kernel" or f"{path}.kernel" in TRANSFORMERS_4[name])
        linear += place.row.linear
    assert linear >= 6


LAYOUTS_OF = [
    (name, layout)
    for name, layouts in {
        "llama": "scanned unrolled transformers easydel tunix maxtext maxtext-unrolled",
        "mistral": "scanned unrolled transformers easydel",
        "qwen2": "scanned unrolled easydel tunix",
        "qwen3": "scanned unrolled easydel tunix maxtext maxtext-unrolled",
        "gemma": "scanned unrolled transformers",
        "gemma2": "scanned unrolled easydel",
        "gemma3_text": "scanned unrolled easydel tunix",
        "phi3": "scanned unrolled easydel",
        "phi3-apart": "scanned unrolled",
        **dict.fromkeys(
            ["smollm3", "olmo2", "olmo3", "granite", "ministral3", "gemma3", "mistral3"], "scanned unrolled"
        ),
        **dict.fromkeys(["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"], "scanned unrolled"),
        **dict.fromkeys(["gpt2", "bert", "roberta", "t5", "opt", "vit", "clip"], "transformers"),
    }.items()
    for layout in layouts.split()
]


@settings(max_examples=100, deadline=None)
@given(
    case=st.sampled_from(LAYOUTS_OF),
    variant=st.sampled_from(VARIANTS),
    group_size=st.sampled_from([2, 4, 16, 32]),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
)
def test_round_trips_from_every_family_through_every_layout(case, variant, group_size, dtype):
    family, layout = case
    name = family.removesuffix("-apart")
    every = LINEAR.setdefault(name, linear_layers(name))
    # Heads with two labels have no groups; rows in RoPE's order need other group sizes than the rest.
    layers = {path: out for path, out in every.items() if out % group_size == 0}
    if family == "llama" and layout.startswith("maxtext") and group_size != 32:
        layers = {path: out for path, out in layers.items() if path.endswith(("q_proj", "k_proj"))}
    if case == ("qwen2", "tunix"):
        layers = {path: out for path, out in layers.items() if not path.endswith(("q_proj", "k_proj", "v_proj"))}
    if group_size == 32 and (family in ("phi3-apart", "gemma3_text") or "llama" in family):
        # A group of two heads straddles the key heads, of which there is only one.
        layers = {path: out for path, out in layers.items() if ".mlp." in path}
    adapter = adapter_on(layers, variant, group_size, dtype)
    there = map_to_flax(adapter, family, layout, model=SIZES)
    back = map_to_torch(there, model=SIZES)
    assert same(back, adapter)
    assert same(map_to_flax(back, family, layout, model=SIZES), there)
    stacked = layout in ("scanned", "maxtext")
    sizes = {theta.ndim for theta, _ in there.modules.values()}
    assert sizes <= ({1, 2} if stacked else {1})


LINEAR = {}


def interleave(head_size, heads):
    """Returns the index that puts outputs in halves into RoPE's interleaved order."""
    half = np.arange(heads * head_size).reshape(heads, 2, head_size // 2)
    return half.swapaxes(1, 2).reshape(-1)


@settings(max_examples=80, deadline=None)
@given(
    variant=st.sampled_from(VARIANTS),
    head_size=st.sampled_from([2, 4, 8, 16]),
    heads=st.sampled_from([2, 4]),
    group_size=st.sampled_from([2, 4, 8, 16, 32]),
)
def test_interleaved_outputs_are_the_permuted_reference(variant, head_size, heads, group_size):
    out = head_size * heads
    wanted = halves_group_size(group_size, head_size)
    if wanted is None or out % group_size:
        return
    model = {"num_attention_heads": heads, "head_dim": head_size}
    path = "decoder.layers_0.self_attention.query"
    adapter = adapter_on({path: out}, variant, group_size)
    there = map_to_torch(adapter, "llama", model=model)
    assert there.config.group_size == wanted
    halves = named_values("y", 3, out).astype(np.float64)
    order = interleave(head_size, heads)
    pair = there.modules["model.layers.0.self_attn.q_proj"]
    in_halves = rotate(halves, *pair, variant=variant, group_size=wanted)
    interleaved = rotate(halves[:, order], *adapter.modules[path], variant=variant, group_size=group_size)
    assert_array_equal(in_halves[:, order], interleaved)
    assert same(map_to_flax(there, model=model), adapter)


@pytest.mark.parametrize("head_size", [4, 8])
def test_a_group_size_is_refused_only_where_none_pairs_the_same_outputs(head_size):
    heads = 12
    order = interleave(head_size, heads)
    for group_size in range(2, heads * head_size + 1, 2):
        if heads * head_size % group_size:
            continue
        partner = np.arange(heads * head_size).reshape(-1, 2, group_size // 2)[:, ::-1].reshape(-1)
        moved = np.empty_like(partner)
        moved[order] = order[partner]
        fitting = [
            g
            for g in range(2, heads * head_size + 1, 2)
            if heads * head_size % g == 0
            and (np.arange(heads * head_size).reshape(-1, 2, g // 2)[:, ::-1].reshape(-1) == moved).all()
        ]
        found = halves_group_size(group_size, head_size)
        assert fitting == ([] if found is None else [found]), group_size


def test_interleaved_layers_and_others_need_two_group_sizes():
    paths = {f"decoder.layers_0.self_attention.{name}": 64 for name in ("query", "value")}
    model = {"num_attention_heads": 4, "head_dim": 16}
    with pytest.raises(AdapterError, match=r"found 2 \(.*value, .*\), 16 \(.*query, .*\): query and key are in RoPE's"):
        map_to_torch(adapter_on(paths), "llama", model=model)
    # Pairs of whole heads are the same in both orders.
    adapter = adapter_on(paths, group_size=64)
    assert map_to_torch(adapter, "llama", model=model).config.group_size == 64
    with pytest.raises(
        AdapterError, match=r"query: expected the model's config for the sizes of its heads, found none"
    ):
        map_to_torch(adapter_on(paths), "llama")
    with pytest.raises(AdapterError, match="family: expected one of llama, qwen3 to be named, for all of them know"):
        map_to_torch(adapter_on(paths))
    with pytest.raises(AdapterError, match=r"divides the head size 24 or pairs whole heads, found 16: in the other"):
        map_to_torch(
            adapter_on({"decoder.layers_0.self_attention.query": 96}, group_size=16),
            "llama",
            model={**model, "head_dim": 24},
        )
    # Layers that RoPE doesn't touch need no sizes.
    mlp = adapter_on({"decoder.layers_0.mlp.wi_0": 64})
    assert list(map_to_torch(mlp, "llama").modules) == ["model.layers.0.mlp.gate_proj"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fused_layer_is_split_and_fused_as_its_outputs_are(variant):
    layers = {"model.layers.0.self_attn.qkv_proj": 64, "model.layers.0.mlp.gate_up_proj": 128}
    adapter = adapter_on(layers, variant, 16)
    there = map_to_flax(adapter, "phi3-apart", "unrolled", model=SIZES)
    y = named_values("y", 3, 64).astype(np.float64)
    whole = rotate(y, *adapter.modules["model.layers.0.self_attn.qkv_proj"], variant=variant, group_size=16)
    bounds = {"q_proj": (0, 32), "k_proj": (32, 48), "v_proj": (48, 64)}
    for name, (start, stop) in bounds.items():
        pair = there.modules[f"model.layers.0.self_attn.{name}"]
        part = rotate(y[:, start:stop], *pair, variant=variant, group_size=16)
        assert_array_equal(part, whole[:, start:stop])
    assert same(map_to_torch(there, model=SIZES), adapter)

    # A part without an adapter is the identity.
    some = {path: pair for path, pair in there.modules.items() if not path.endswith(("k_proj", "up_proj"))}
    fewer = Adapter(dataclasses.replace(there.config, target_modules=list(some)), some)
    back = map_to_torch(fewer, "phi3-apart", model=SIZES)
    found = rotate(y, *back.modules["model.layers.0.self_attn.qkv_proj"], variant=variant, group_size=16)
    assert_array_equal(found, np.where((np.arange(64) >= 32) & (np.arange(64) < 48), y, whole))


def test_groups_that_straddle_fused_layers_are_refused():
    adapter = adapter_on({"model.layers.0.self_attn.qkv_proj": 64}, group_size=32)
    with pytest.raises(
        AdapterError, match=r"qkv_proj: expected parts of whole groups of 32 outputs, .* at output 48: a g"
    ):
        map_to_flax(adapter, "phi3-apart", "unrolled", model=SIZES)
    half = adapter_on({"model.layers.0.self_attn.qkv_proj": 64}, group_size=16, subspace=(0, 0.5))
    with pytest.raises(AdapterError, match=r"qkv_proj: expected an adapter of all blocks .* found subspace=.0.0"):
        map_to_flax(half, "phi3-apart", "unrolled", model=SIZES)
    apart = {f"model.layers.0.self_attn.{n}_proj": out for n, out in (("q", 32), ("k", 16), ("v", 16))}
    with pytest.raises(AdapterError, match=r"k_proj: expected a number of outputs that group_size 32 divides"):
        adapter_on(apart, group_size=32)
    with pytest.raises(AdapterError, match=r"qkv_proj: expected 96 outputs, as the model's config says, found 64"):
        map_to_flax(adapter, "phi3-apart", "unrolled", model={**SIZES, "num_attention_heads": 4})
    mixed = adapter_on(apart).modules
    name = "model.layers.0.self_attn.k_proj"
    mixed = {**mixed, name: tuple(array.astype(np.float16) for array in mixed[name])}
    with pytest.raises(AdapterError, match=r"qkv_proj: expected one dtype in all of its parts, found float16, float32"):
        map_to_torch(Adapter(RoadConfig(group_size=2, target_modules=list(mixed)), mixed), "phi3-apart", model=SIZES)


def test_keys_and_values_in_one_einsum():
    layers = {f"model.layers.1.self_attn.{n}_proj": out for n, out in (("q", 64), ("k", 32), ("v", 32))}
    adapter = adapter_on(layers, "road_2", 8)
    there = map_to_flax(adapter, "gemma3_text", "tunix")
    assert sorted(there.modules) == ["layers.1.attn.kv_einsum", "layers.1.attn.q_einsum"]
    theta = [adapter.modules[f"model.layers.1.self_attn.{n}_proj"][0] for n in "kv"]
    assert_array_equal(there.modules["layers.1.attn.kv_einsum"][0], np.concatenate(theta))
    assert same(map_to_torch(there), adapter)


def test_a_layer_whose_bias_is_added_after_the_rotation_is_refused():
    adapter = adapter_on({"layers.0.attn.q_proj": 32, "layers.0.attn.o_proj": 32})
    with pytest.raises(AdapterError, match=r"bias in both frameworks, found layers.0.attn.q_proj: the Flax model adds"):
        map_to_torch(adapter, "qwen2")
    with pytest.raises(AdapterError, match="family: expected one of llama, qwen3, qwen2 to be named, for all of them"):
        map_to_torch(adapter)
    with pytest.raises(AdapterError, match=r"found model.layers.0.self_attn.q_proj: the Flax model adds"):
        map_to_flax(map_to_torch(adapter, "llama"), "qwen2", "tunix")


def test_all_linear_is_written_out_where_peft_would_take_a_classifier_besides():
    adapter = adapter_on({"vit.encoder.layer.0.attention.attention.query": 32})
    adapter = dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, target_modules="all-linear"))
    there = map_to_torch(adapter, "vit")
    assert there.config.target_modules == ["vit.layers.0.attention.q_proj"]
    assert same(map_to_flax(there), adapter)


def test_tables_that_are_only_asked_for_by_name():
    # As many key heads as query heads: one Einsum.
    layers = {f"model.layers.1.self_attn.{n}_proj": 32 for n in "qkv"}
    adapter = adapter_on(layers, "road_4", 8)
    there = map_to_flax(adapter, "gemma3_text-fused", "tunix")
    assert list(there.modules) == ["layers.1.attn.qkv_einsum"]
    assert same(map_to_torch(there), adapter)
    # With the names of ViT's layers in transformers 4's PyTorch model.
    old = adapter_on({"vit.encoder.layer.0.attention.attention.query": 32})
    there = map_to_flax(old, "vit-4")
    assert same(map_to_torch(there), old)
    new = dataclasses.replace(there, metadata={})
    assert list(map_to_torch(new).modules) == ["vit.layers.0.attention.q_proj"]


def test_a_stack_whose_layers_are_on_the_second_axis():
    layers = {f"model.layers.{i}.mlp.down_proj": 32 for i in range(3)}
    adapter = adapter_on(layers, "road_4", 8)
    there = map_to_flax(adapter, "qwen3", "maxtext")
    theta, _ = there.modules["decoder.layers.mlp.wo"]
    assert theta.shape == (64, 3)
    for i in range(3):
        assert_array_equal(theta[:, i], adapter.modules[f"model.layers.{i}.mlp.down_proj"][0])
    assert same(map_to_torch(there), adapter)


def test_an_encoder_and_a_decoder_of_their_own_depth():
    model = hugging_face("clip")
    assert len(model.text_model.encoder.layers) != len(model.vision_model.encoder.layers)
    adapter = adapter_on({p: out for p, out in linear_layers("clip").items() if p.endswith("fc1")})
    there = map_to_flax(adapter)
    assert len(there.modules) == 5
    assert same(map_to_torch(there), adapter)


def test_rules_of_the_users_own(tmp_path):
    rows = [
        {"flax": "blocks_{layer}.wq", "torch": "model.layers.{layer}.self_attn.q_proj", "interleaved": True},
        {"flax": "blocks_{layer}.norm", "torch": "model.layers.{layer}.input_layernorm", "kind": "norm"},
    ]
    (tmp_path / "rules.json").write_text(json.dumps({"rows": rows, "axis": 1}))
    toml = 'axis = 1\n[[rows]]\nflax = "blocks_{layer}.wq"\ntorch = "model.layers.{layer}.self_attn.q_proj"\n'
    toml += 'interleaved = true\n[[rows]]\nflax = "blocks_{layer}.norm"\n'
    (tmp_path / "rules.toml").write_text(toml + 'torch = "model.layers.{layer}.input_layernorm"\nkind = "norm"\n')
    table = read_rules(tmp_path / "rules.json")
    assert table == read_rules(tmp_path / "rules.toml")
    adapter = adapter_on({f"model.layers.{i}.self_attn.q_proj": 64 for i in range(2)}, group_size=16)
    model = {"hidden_size": 64, "num_attention_heads": 4}
    trace = []
    there = map_to_flax(adapter, rules=table, model=model, trace=trace)
    assert trace == [(f"model.layers.{i}.self_attn.q_proj", "blocks.wq") for i in range(2)]
    assert there.modules["blocks.wq"][0].shape == (32, 2)
    assert there.config.group_size == 2
    assert same(map_to_torch(there, rules=table, model=model), adapter)


BAD_RULES = {
    "{": "expected rules in TOML or JSON, found a file that can't be read",
    "[]": "the file: expected a table, found list",
    "{}": "expected at least one row, found none",
    '{"rows": [3]}': r"rows\[0\]: expected a table, found int",
    '{"rows": [{"flax": "a"}]}': r"rows\[0\]: expected a path as torch, found none",
    '{"rows": [{"flax": "a", "torch": "b", "kind": "conv"}]}': r"rows\[0\]\.kind: expected one of linear, norm, emb",
    '{"rows": [{"flax": "a", "torch": "b"}, {"flax": "a", "torch": "c"}]}': "two rows of the table match one path",
    '{"rows": [{"flax": "a", "torch": "b"}], "axis": true}': "the file.axis: expected int, found True",
    '{"rows": [{"flax": "a", "torch": "b"}], "axes": 1}': "expected family, head, axis, rows, found 'axes'",
}


@pytest.mark.parametrize("text", BAD_RULES)
def test_bad_rules(text, tmp_path):
    (tmp_path / "rules.json").write_text(text)
    with pytest.raises(AdapterError, match=BAD_RULES[text]):
        read_rules(tmp_path / "rules.json")


THROUGH = [
    *[("gpt2", "transformers"), ("bert-cls", "transformers"), ("roberta-cls", "transformers"), ("t5", "transformers")],
    *[("opt", "transformers"), ("vit", "transformers"), ("clip", "transformers"), ("llama", "maxtext")],
    *[("qwen3", "maxtext"), ("qwen3", "tunix"), ("gemma2", "scanned"), ("gemma3_text", "tunix"), ("phi3", "easydel")],
    *[("phi3-apart", "unrolled"), ("gemma3", "scanned"), ("mistral3", "unrolled")],
    *[("mixtral", "unrolled"), ("qwen2_moe", "scanned")],
]


@pytest.mark.parametrize(("name", "layout"), THROUGH)
def test_merged_by_way_of_flax_it_is_the_same_function(name, layout, tmp_path):
    """The adapter on Hugging Face's own model against that model with the adapter merged in from Flax."""
    model, config, fields = MODELS[name.removesuffix("-apart")]
    torch.manual_seed(0)
    base = getattr(transformers, model)(getattr(transformers, config)(**fields)).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=0.1 if parameter.ndim < 2 else 0.3)
    base.save_pretrained(tmp_path / "base")
    every = linear_layers(name.removesuffix("-apart"))
    targets = [
        p for p, out in every.items() if out % 8 == 0 and (layout != "maxtext" or name != "llama" or "proj" in p)
    ]
    if (name, layout) == ("llama", "maxtext"):
        targets = [path for path in targets if path.endswith(("q_proj", "k_proj"))]
    inputs = {"input_ids": torch.arange(3, 12)[None]}
    if name in ("vit", "clip"):
        inputs = {"pixel_values": torch.randn(1, 3, 8, 8), **(inputs if name == "clip" else {})}
    elif name == "t5":
        inputs["decoder_input_ids"] = torch.arange(2, 7)[None]

    def output(model):
        with torch.no_grad():
            found = model(**inputs)
        return found.logits_per_image if name == "clip" else found.logits

    plain = output(base)
    adapted = road_torch.RoadModel(base, RoadConfig(target_modules=targets, group_size=8, init_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "torch")
    expected = output(adapted)
    family = name.removesuffix("-cls")
    convert.to_flax(tmp_path / "torch", tmp_path / "flax", family=family, layout=layout, base=tmp_path / "base")
    convert.merge(tmp_path / "base", tmp_path / "flax", tmp_path / "merged")
    merged, info = getattr(transformers, model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert_close(output(merged.eval()), expected, "float32", moved_from=plain)


def test_every_table_is_tried_here():
    tried = {(name, layout) for name, layout in LAYOUTS_OF}
    styles = {"road": "scanned"}
    untried = [t for t in TABLES if (t.name, styles.get(t.style, t.style)) not in tried]
    assert {table.name for table in untried} <= {"vit-4", "gemma3_text-fused"}
