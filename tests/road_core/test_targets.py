"""Which modules are selected, compared with PEFT's own selection on real module trees."""

import re
import tracemalloc

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft import RoadConfig as PeftRoadConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

from road_core import AdapterError, RoadConfig, _targets, select_modules

TREES = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=12, num_attention_heads=2
        )
    ),
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=16, hidden_size=8, ffn_dim=8, num_hidden_layers=3, num_attention_heads=2, word_embed_proj_dim=8
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=3, n_head=2, n_positions=8)
    ),
    "phi": lambda: transformers.PhiForCausalLM(
        transformers.PhiConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2
        )
    ),
}

CASES = [
    ("llama", {}),
    ("llama", {"target_modules": ["q_proj", "o_proj"]}),
    ("llama", {"target_modules": ["self_attn.q_proj", "model.layers.3.mlp.up_proj"]}),
    ("llama", {"target_modules": r".*\.(q|k)_proj"}),
    ("llama", {"target_modules": r"model\.layers\.1\..*_proj"}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "ALL-LINEAR"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["q_proj"]}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"}),
    ("llama", {"target_modules": "all-linear", "modules_to_save": ["gate_proj"]}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 11]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": []}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}),
    ("bert", {}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": ["query", "output.dense"]}),
    ("t5", {}),
    ("t5", {"target_modules": "all-linear"}),
    ("t5", {"target_modules": r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$"}),
    ("t5", {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "block"}),
    ("opt", {}),
    ("opt", {"target_modules": ["fc1"], "layers_to_transform": [2]}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("phi", {}),
]


@pytest.fixture(scope="module")
def trees():
    # Names can be read without weights.
    with torch.device("meta"):
        return {name: build() for name, build in TREES.items()}


def names_of(model):
    """The arguments that a framework passes to select_modules, read off a model as PEFT reads it."""
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear | Conv1D)]
    head = model.get_output_embeddings()
    heads = [name for name, module in modules.items() if module is head]
    return [name for name in modules if name], linear, heads


@pytest.mark.parametrize(("tree", "fields"), CASES, ids=lambda v: str(v))
def test_the_choice_is_pefts(tree, fields, trees, recwarn):
    names, linear, heads = names_of(trees[tree])
    if fields.get("task_type") == "SEQ_CLS":
        heads = [*heads, "classifier"]
    config = RoadConfig(**fields)
    ours = select_modules(config, names, linear=linear, output_head=heads, model_type=tree)
    assert set(ours) == set(pefts_choice(tree, fields))


def pefts_choice(tree, fields):
    # PEFT's RoAd takes only nn.Linear and lacks some fields; its LoRA applies the same rules to all layers.
    own = not {"layers_to_transform", "layers_pattern", "exclude_modules"} & set(fields) and tree != "gpt2"
    config = PeftRoadConfig(group_size=2, **fields) if own else LoraConfig(r=2, fan_in_fan_out=tree == "gpt2", **fields)
    with torch.device("meta"):
        model = get_peft_model(TREES[tree](), config)
    prefix = "base_model.model."
    return [n.removeprefix(prefix) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def test_the_table_of_model_types_is_pefts():
    from peft.utils import TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING as THEIRS

    from road_core._targets import MODEL_TARGETS

    assert MODEL_TARGETS == THEIRS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_prj"]}, r"q_prj.*nearest: q_proj"),
        ({"target_modules": r".*attention"}, "nearest"),
        ({"target_modules": ["layer.10"]}, r"nearest: layers\.10, "),
        ({"target_modules": "layer.10"}, r"nearest: layers\.10, "),
        ({"target_modules": "q_proj"}, "'q_proj' as a regular expression of whole paths, nearest: q_proj"),
        ({"target_modules": ["11.self_atn.q_proj"]}, r"nearest: 11\.self_attn\.q_proj, "),
        ({"target_modules": "(q"}, "regular expression"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "(layers"}, "regular expression"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "(l)ayers"}, "without groups"),
        ({}, "model type 'unheard-of'"),
        (
            {"target_modules": "all-linear", "exclude_modules": r".*"},
            r"^RoadConfig.exclude_modules .* found none left of ",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [99]},
            r"^RoadConfig.layers_to_transform: expected names with one of \[99\] between dots .* found .*layers\.0",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "h"},
            r"^RoadConfig.layers_to_transform: expected names with one of 0 between dots behind 'h', ",
        ),
    ],
)
def test_no_match_names_the_nearest(fields, message, trees):
    names, linear, heads = names_of(trees["llama"])
    with pytest.raises(AdapterError, match=message):
        select_modules(RoadConfig(**fields), names, linear=linear, output_head=heads, model_type="unheard-of")


def test_all_linear_without_a_layer(trees):
    names, _, heads = names_of(trees["llama"])
    message = r"expected a linear layer with an even number of outputs besides the head for 'all-linear', found none$"
    for linear in ([], heads):
        with pytest.raises(AdapterError, match=message):
            select_modules(RoadConfig(target_modules="all-linear"), names, linear=linear, output_head=heads)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(a|aa)+b"},
        {"target_modules": ["x"], "exclude_modules": "(a|aa)+b"},
        {"target_modules": ["x"], "layers_to_transform": 0, "layers_pattern": "(?:a|aa)+b"},
        {"target_modules": "all-linear", "modules_to_save": ["(a|aa)+b"]},
    ],
    ids=lambda fields: [*fields][-1],
)
def test_a_pattern_that_never_ends_is_an_error(fields, monkeypatch):
    monkeypatch.setattr(_targets, "PATIENCE", 0.05)
    name = "layers." + 90 * "a" + ".x" if "layers_pattern" in fields else 90 * "a" + ".x"
    expected = rf"RoadConfig\.{[*fields][-1]}: expected a regular expression that is tried in 0\.05 s, found '.*aa\)\+b"
    with pytest.raises(AdapterError, match=expected):
        select_modules(RoadConfig(**fields), [name], linear=[name])


def test_patterns_have_a_limited_time_together(monkeypatch):
    monkeypatch.setattr(_targets, "PATIENCE", 0.1)
    names = [f"{i}." + 16 * "a" + "c.x" for i in range(2000)]  # each takes about a millisecond
    with pytest.raises(AdapterError, match=r"target_modules: .* is tried in 0\.1 s, found '\\\\d\+"):
        select_modules(RoadConfig(target_modules=r"\d+\.(a|aa)+b|.*x"), names, linear=names)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(?:.{60000}){60000}", r"of 1,048,576 characters at most, its counts written out, found 6\.84e\+10 in '\(\?:"),
        ("(?:" * 30 + "a" + "){1,50}" * 30, "counts written out"),
        ("a{" + "9" * 5000 + "}", "counts written out"),
        ("a" * (1 << 22), "counts written out"),
        ("(" * 5000 + "a" + ")" * 5000, "maximum recursion depth"),
        # Syntax that `regex` knows and `re` doesn't would select differently from PEFT, and might never finish.
        (r"(?:(?R)|.)*", "unknown extension"),
        (r".*\pL_proj", r"bad escape \\p"),
        (r".*(?:q_prooj){e<=1}", r"'{' is no count or class"),
        (r".*[[:alpha:]]_proj", r"'\[:alpha:\]' is no count or class"),
    ],
    ids=range(9),
)
def test_a_pattern_that_is_too_large_or_not_res(pattern, message):
    tracemalloc.start()
    with pytest.raises(
        AdapterError, match=rf"^RoadConfig\.target_modules: expected a regular expression.*{message}"
    ) as e:
        select_modules(RoadConfig(target_modules=pattern), ["model.q_proj"], linear=["model.q_proj"])
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert len(str(e.value)) < 400


def test_a_number_of_thousands_of_digits_is_no_layer():
    names = ["model.layers." + 5000 * "9" + ".q_proj", "model.layers.0.q_proj"]
    config = RoadConfig(target_modules=["q_proj"], layers_to_transform=0)
    assert select_modules(config, names, linear=names) == names[1:]


def test_a_pattern_that_names_every_module_of_a_large_model():
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(16) for j in range(16)]
    config = RoadConfig(target_modules="|".join(map(re.escape, names)))
    assert select_modules(config, names, linear=names) == names
