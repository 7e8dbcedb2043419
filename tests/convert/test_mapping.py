"""Round trips compared byte by byte, and all kinds of keys without a partner."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from _compare import named_values
from hypothesis import given, settings
from hypothesis import strategies as st

from convert._families import EMBEDDING, LAYER, NORM, TABLES, Family, Row, unnumbered
from convert._mapping import FLAX_ORIGIN, TORCH_ORIGIN, map_to_flax, map_to_torch
from road_core import Adapter, AdapterError, RoadConfig, parameter_size

VARIANTS = ["road_1", "road_2", "road_4"]
GROUP_SIZES = [2, 8, 64]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
OUT = {"q_proj": 128, "k_proj": 64, "v_proj": 64, "o_proj": 128, "gate_proj": 192, "up_proj": 192, "down_proj": 128}
BLOCK = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in OUT}
LAYERS = 3


def flax_adapter(layout, targets=("q_proj", "down_proj"), dtype="float32", saved=(), metadata=None, **fields):
    """An adapter as in road_jax; every number depends on its tensor's name."""
    config = RoadConfig(**{"target_modules": list(targets), **fields})

    def leaf(name, *shape):
        return named_values(name, *shape).astype(DTYPES[dtype])

    modules = {}
    for name in targets:
        size = parameter_size(config.variant, OUT.get(name, 192))
        if name == "lm_head":
            modules[name] = (leaf("head theta", size), leaf("head alpha", size))
            continue
        theta, alpha = leaf(name + "theta", LAYERS, size), leaf(name + "alpha", LAYERS, size)
        if layout == "scanned":
            modules[f"model.layers.{BLOCK[name]}.{name}"] = (theta, alpha)
        else:
            for i in range(LAYERS):
                modules[f"model.layers.{i}.{BLOCK[name]}.{name}"] = (theta[i], alpha[i])
    return Adapter(config, modules, dict(saved), metadata or {})


def same(a, b):
    """True if two adapters give the same files: config, tensors and metadata."""
    first, second = a.tensors(), b.tensors()
    return (
        a.config == b.config
        and dict(a.metadata) == dict(b.metadata)
        and first.keys() == second.keys()
        and all(
            first[key].shape == second[key].shape
            and first[key].dtype.itemsize == second[key].dtype.itemsize
            and np.ascontiguousarray(first[key]).tobytes() == np.ascontiguousarray(second[key]).tobytes()
            for key in first
        )
    )


@pytest.mark.parametrize("layout", ["scanned", "unrolled"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_flax_to_torch_to_flax(variant, group_size, dtype, layout):
    adapter = flax_adapter(layout, dtype=dtype, variant=variant, group_size=group_size, metadata={"note": "kept"})
    there = map_to_torch(adapter)
    assert len(there.modules) == 2 * LAYERS
    assert there.config == adapter.config
    assert there.metadata["note"] == "kept"
    theta = adapter.modules["model.layers." + ("" if layout == "scanned" else "1.") + "mlp.down_proj"][0]
    expected = theta[1] if layout == "scanned" else theta
    found = there.modules["model.layers.1.mlp.down_proj"][0]
    assert found.shape == (parameter_size(variant, 128),)
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()
    back = map_to_flax(there)
    assert same(back, adapter)
    # Once more in the other direction.
    assert same(map_to_torch(back), there)


@pytest.mark.parametrize("layout", ["scanned", "unrolled"])
def test_torch_to_flax_to_torch(layout):
    plain = flax_adapter("unrolled")
    there = map_to_flax(plain, "mistral", layout)
    assert len(there.modules) == (2 if layout == "scanned" else 2 * LAYERS)
    back = map_to_torch(there)
    assert same(back, plain)
    assert same(map_to_flax(back, "mistral", layout), there)


def test_another_layout_than_before_finds_its_way_back_too():
    scanned = flax_adapter("scanned", target_modules=r"model\.layers\.(self_attn|mlp)\..*")
    there = map_to_torch(scanned)
    unrolled = map_to_flax(there, layout="unrolled")
    assert set(unrolled.modules) == set(there.modules)
    assert not same(unrolled, scanned)
    assert same(map_to_torch(unrolled), there)
    assert same(map_to_flax(map_to_torch(unrolled)), scanned)


def _saved(layout, dtype=np.float32):
    def leaf(name, *shape):
        return named_values(name, *shape).astype(dtype)

    saved = {
        "lm_head.kernel": leaf("h", 8, 5),
        "model.norm.weight": leaf("n", 8),
        "model.embed_tokens.embedding": leaf("e", 5, 8),
    }
    kernels, biases, norms = leaf("k", LAYERS, 8, 6), leaf("b", LAYERS, 6), leaf("r", LAYERS, 8)
    if layout == "scanned":
        return saved | {
            "model.layers.self_attn.v_proj.kernel": kernels,
            "model.layers.self_attn.v_proj.bias": biases,
            "model.layers.input_layernorm.weight": norms,
        }
    for i in range(LAYERS):
        saved[f"model.layers.{i}.self_attn.v_proj.kernel"] = kernels[i]
        saved[f"model.layers.{i}.self_attn.v_proj.bias"] = biases[i]
        saved[f"model.layers.{i}.input_layernorm.weight"] = norms[i]
    return saved


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", ["scanned", "unrolled"])
def test_modules_that_are_saved_whole(layout, dtype):
    names = ["lm_head", "norm", "embed_tokens", "v_proj", "input_layernorm"]
    saved = _saved(layout, dtype)
    adapter = flax_adapter(layout, saved=saved, modules_to_save=names)
    there = map_to_torch(adapter)
    assert there.config.modules_to_save == names
    found = there.modules_to_save
    assert len(found) == 3 + 3 * LAYERS
    np.testing.assert_array_equal(found["lm_head.weight"], saved["lm_head.kernel"].T)
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], saved["model.embed_tokens.embedding"])
    one = _saved("scanned", dtype)
    for i in range(LAYERS):
        kernel = one["model.layers.self_attn.v_proj.kernel"][i]
        np.testing.assert_array_equal(found[f"model.layers.{i}.self_attn.v_proj.weight"], kernel.T)
        bias = one["model.layers.self_attn.v_proj.bias"][i]
        np.testing.assert_array_equal(found[f"model.layers.{i}.self_attn.v_proj.bias"], bias)
        norm = one["model.layers.input_layernorm.weight"][i]
        np.testing.assert_array_equal(found[f"model.layers.{i}.input_layernorm.weight"], norm)
    assert same(map_to_flax(there), adapter)


CHOICES = {
    "suffixes": {},
    "longer suffixes": {"target_modules": ["self_attn.q_proj", "mlp.down_proj"]},
    "pattern": {"target_modules": r".*\.(q|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
}
REWRITTEN = {
    "pattern of a stack": {"target_modules": r"model\.layers\.[a-z_]+\.[a-z_]+"},
    "full paths": {"target_modules": ["model.layers.self_attn.q_proj", "model.layers.mlp.down_proj"]},
    "paths through the stack": {"target_modules": ["layers.self_attn.q_proj", "down_proj"]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
}
ALL = [f"model.layers.{i}.{tail}" for i in range(LAYERS) for tail in ("mlp.down_proj", "self_attn.q_proj")]


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_that_holds_on_both_sides_is_left_as_it_is(name):
    adapter = flax_adapter("scanned", **CHOICES[name])
    there = map_to_torch(adapter)
    assert there.config == adapter.config
    assert same(map_to_flax(there), adapter)


@pytest.mark.parametrize("name", REWRITTEN)
def test_a_choice_that_does_not_is_spelt_out_and_found_again(name):
    adapter = flax_adapter("scanned", **REWRITTEN[name])
    there = map_to_torch(adapter)
    assert there.config.target_modules == ALL
    assert there.config.exclude_modules is None
    assert same(map_to_flax(there), adapter)


def test_nothing_chosen_asks_the_table():
    adapter = flax_adapter("scanned", targets=("q_proj", "v_proj"), target_modules=None)
    assert map_to_torch(adapter).config.target_modules is None
    assert same(map_to_flax(map_to_torch(adapter)), adapter)


def test_saved_modules_named_by_their_stack():
    adapter = flax_adapter(
        "scanned",
        saved={"model.layers.input_layernorm.weight": named_values("n", LAYERS, 8)},
        modules_to_save=["layers.input_layernorm"],
    )
    there = map_to_torch(adapter)
    assert there.config.modules_to_save == [f"model.layers.{i}.input_layernorm" for i in range(LAYERS)]
    assert same(map_to_flax(there), adapter)


def test_a_choice_of_layers():
    every = flax_adapter("unrolled")
    modules = {path: pair for path, pair in every.modules.items() if ".1." not in path}
    adapter = Adapter(dataclasses.replace(every.config, layers_to_transform=[0, 2]), modules)
    there = map_to_torch(adapter)
    # PEFT's RoAd doesn't have this field.
    assert there.config.layers_to_transform is None
    assert there.config.target_modules == [path for path in ALL if ".1." not in path]
    assert same(map_to_flax(there), adapter)
    message = (
        r"missing model\.layers\.1\.mlp\.down_proj, model\.layers\.1\.self_attn\.q_proj: .* use the unrolled layout"
    )
    for torch_side in (there, adapter):
        with pytest.raises(AdapterError, match=message):
            map_to_flax(torch_side, layout="scanned")


def test_the_last_layer_of_a_choice_need_not_be_the_models_last():
    every = flax_adapter("unrolled", layers_to_transform=[0, 1, 2])
    for torch_side in (every, map_to_torch(every)):
        with pytest.raises(AdapterError, match=r"found layers_to_transform=\[0, 1, 2\]"):
            map_to_flax(torch_side, layout="scanned")
        with pytest.raises(AdapterError, match=r"in all 5 layers, missing model\.layers\.3\.mlp\.down_proj"):
            map_to_flax(torch_side, layout="scanned", layers=5)
        there = map_to_flax(torch_side, layout="scanned", layers=3)
        assert there.config.layers_to_transform is None
        assert same(map_to_torch(there), torch_side)
    with pytest.raises(
        AdapterError, match=r"expected layers 0 to 1, found besides model\.layers\.2\.self_attn\.q_proj"
    ):
        map_to_flax(flax_adapter("unrolled"), layers=2)


def test_many_missing_layers_are_told_in_short():
    pair = flax_adapter("unrolled").modules["model.layers.0.self_attn.q_proj"]
    adapter = Adapter(RoadConfig(target_modules=["q_proj"]), {"model.layers.999999.self_attn.q_proj": pair})
    with pytest.raises(AdapterError, match=r"missing model\.layers\.\[0-999998\]\.self_attn\.q_proj:"):
        map_to_flax(adapter)


def _with(adapter, modules=None, saved=None, **fields):
    return Adapter(
        dataclasses.replace(adapter.config, **fields),
        {**adapter.modules, **(modules or {})},
        {**adapter.modules_to_save, **(saved or {})},
    )


PAIR = (np.zeros(64, np.float32), np.ones(64, np.float32))
STACK = tuple(np.stack([array] * LAYERS) for array in PAIR)
ONES = np.ones(8, np.float32)
TO_TORCH = {
    "strangers, all of them": (
        {"h.0.attn.c_attn": PAIR, "model.layers.self_attn.qkv_proj": STACK, "model.layers.01.mlp.up_proj": PAIR},
        {},
        r"expected modules of one of the families llama, mistral, qwen2, .*, found without a partner: "
        r"h\.0\.attn\.c_attn, model\.layers\.01\.mlp\.up_proj, model\.layers\.self_attn\.qkv_proj$",
    ),
    "the placeholder": ({f"model.layers.{LAYER}.mlp.up_proj": PAIR}, {}, "found without a partner"),
    "a norm is not rotated": ({"model.norm": PAIR}, {}, r"found without a partner: model\.norm$"),
    "a tensor of PyTorch's": ({}, {"lm_head.weight": np.ones((8, 8))}, r"without a partner: lm_head\.weight"),
    "no layer axis": ({"model.layers.mlp.up_proj": PAIR}, {}, r"up_proj: expected 2 axes, the first that of the layer"),
    "no layers": (
        {"model.layers.mlp.up_proj": (np.zeros((0, 64)), np.zeros((0, 64)))},
        {},
        r"up_proj: expected 2 axes, the first that of the layers, found shape \[0, 64\]",
    ),
    "a layer axis too many": ({"lm_head": STACK}, {}, r"lm_head: expected one axis, found shape \[3, 64\]"),
    "a kernel of one axis": ({}, {"lm_head.kernel": ONES}, r"lm_head\.kernel: expected 2 axes, found shape \[8\]"),
    "two layouts, one target": (
        {"model.layers.0.self_attn.q_proj": PAIR},
        {},
        r"found stacks \(model\.layers\.mlp\.down_proj, model\.layers\.self_attn\.q_proj\) "
        r"and numbered layers \(model\.layers\.0\.self_attn\.q_proj\)",
    ),
    "two depths": (
        {"model.layers.mlp.up_proj": tuple(array[:2] for array in STACK)},
        {},
        r"expected one number of layers in all stacks, found 2 \(model\.layers\.mlp\.up_proj\), 3 \(model\.layers",
    ),
    "not chosen": (
        {"model.layers.mlp.up_proj": STACK, "lm_head": PAIR},
        {},
        r"chooses every module of the adapter, found none of lm_head, model\.layers\.mlp\.up_proj in "
        r"target_modules=\['q_proj', 'down_proj'\]",
    ),
    "everything at once": (
        {"transformer.wte": PAIR, "model.layers.0.mlp.up_proj": STACK},
        {"lm_head.kernel": ONES},
        r"transformer\.wte; .*up_proj: expected one axis, .*; lm_head\.kernel: expected 2 axes.*; expected either",
    ),
}


@pytest.mark.parametrize("name", TO_TORCH)
def test_what_has_no_partner_in_torch(name):
    modules, saved, message = TO_TORCH[name]
    with pytest.raises(AdapterError, match=message):
        map_to_torch(_with(flax_adapter("scanned"), modules, saved, modules_to_save=["lm_head"] if saved else None))


SMALL = tuple(np.concatenate([array[:32]] * 1) for array in PAIR)
HALF = tuple(array.astype(np.float16) for array in PAIR)
TO_FLAX = {
    "strangers, all of them": (
        {"base.q_proj": PAIR, "model.layers.0.self_attn.W_pack": PAIR, "model.layers.1000000.mlp.up_proj": PAIR},
        {},
        r"found without a partner: base\.q_proj, model\.layers\.0\.self_attn\.W_pack, model\.layers\.1000000\.mlp\.",
    ),
    "a stack": ({"model.layers.mlp.up_proj": PAIR}, {}, r"without a partner: model\.layers\.mlp\.up_proj"),
    "two axes": ({"model.layers.0.mlp.down_proj": STACK}, {}, r"down_proj: expected one axis, found shape \[3, 64\]"),
    "a tensor of Flax's": ({}, {"lm_head.kernel": np.ones((8, 8))}, r"without a partner: lm_head\.kernel"),
    "two shapes": (
        {"model.layers.1.mlp.down_proj": SMALL},
        {},
        r"model\.layers\.\{layer\}\.mlp\.down_proj: expected one shape and dtype in all layers, found "
        r"float32 \[64\] and float32 \[64\] in layer 0, float32 \[32\] and float32 \[32\] in layer 1: .*unrolled",
    ),
    "two dtypes": ({"model.layers.2.mlp.down_proj": HALF}, {}, r"found float32 .* in layer 0, float16 .* in layer 2"),
    "a saved layer alone": (
        {},
        {"model.layers.1.input_layernorm.weight": ONES},
        r"missing model\.layers\.0\.input_layernorm\.weight, model\.layers\.2\.input_layernorm\.weight: the scanned",
    ),
    "not chosen": ({"lm_head": PAIR}, {}, r"found none of lm_head in target_modules=\['q_proj', 'down_proj'\]"),
}


@pytest.mark.parametrize("name", TO_FLAX)
def test_what_has_no_partner_in_flax(name):
    modules, saved, message = TO_FLAX[name]
    names = ["lm_head", "input_layernorm"] if saved else None
    adapter = _with(flax_adapter("unrolled"), modules, saved, modules_to_save=names, group_size=8)
    with pytest.raises(AdapterError, match=message):
        map_to_flax(adapter)


def test_options_are_checked():
    adapter = flax_adapter("unrolled")
    with pytest.raises(AdapterError, match=r"family: expected one of llama, mistral, qwen2, .*, found 'gpt9'"):
        map_to_flax(adapter, "gpt9")
    with pytest.raises(AdapterError, match=r"layout: expected one that has a table of the family opt \(transformers\)"):
        map_to_flax(adapter, "opt", "tunix")
    with pytest.raises(
        AdapterError, match=r"layout: expected one of scanned, unrolled, transformers, .*, found 'rolled'"
    ):
        map_to_flax(adapter, layout="rolled")
    with pytest.raises(AdapterError, match="layers: expected at least one layer, found 0"):
        map_to_flax(adapter, layers=0)
    # Only Qwen3 has norms for heads.
    norms = _with(
        adapter,
        saved={f"model.layers.{i}.self_attn.q_norm.weight": ONES for i in range(LAYERS)},
        modules_to_save=["q_norm"],
    )
    with pytest.raises(AdapterError, match=r"of the family llama, found without a partner: model\.layers\.0.*q_norm"):
        map_to_flax(norms, "llama")
    assert same(map_to_torch(map_to_flax(norms, "qwen3")), norms)
    assert same(map_to_torch(map_to_flax(norms)), norms)


@pytest.mark.parametrize("name", [FLAX_ORIGIN, TORCH_ORIGIN])
@pytest.mark.parametrize("text", ["{", "[]", "[" * 10_000])
def test_a_broken_record_is_refused(name, text):
    adapter = dataclasses.replace(flax_adapter("unrolled"), metadata={name: text})
    with pytest.raises(AdapterError, match="metadata: expected a JSON object as the record of a conversion"):
        map_to_torch(adapter) if name == TORCH_ORIGIN else map_to_flax(adapter)


@pytest.mark.parametrize(
    "record",
    [
        '{"layout": 3, "config": 1}',
        '{"config": {"group_size": 2}}',
        '{"config": {"target_modules": 7}}',
        '{"config": {"target_modules": ["k_proj"]}}',
        '{"config": {"target_modules": "("}}',
    ],
)
def test_a_record_that_does_not_hold_is_not_believed(record):
    adapter = dataclasses.replace(flax_adapter("unrolled"), metadata={FLAX_ORIGIN: record})
    there = map_to_flax(adapter, layout="unrolled")
    assert there.config == adapter.config
    assert same(map_to_torch(there), adapter)


def test_a_changed_config_is_not_changed_back():
    adapter = flax_adapter("scanned", target_modules=["layers.self_attn.q_proj", "down_proj"])
    there = map_to_torch(adapter)
    edited = dataclasses.replace(
        there, config=dataclasses.replace(there.config, target_modules=["q_proj", "down_proj"])
    )
    assert map_to_flax(edited).config.target_modules == ["q_proj", "down_proj"]
    assert same(map_to_torch(map_to_flax(edited)), edited)


def test_two_rows_for_one_path_are_a_mistake_of_the_table():
    twice = Family("twice", (Row("a", "x", NORM), Row("a", "y", EMBEDDING)))
    with pytest.raises(ValueError, match="two rows of the table match one path"):
        twice.find_flax("a")
    for table in TABLES:
        for row in table.rows:
            path = row.flax.replace(LAYER, "12")
            places = table.find_flax(path), table.find_torch(row.torch.replace(LAYER, "12"))
            assert all(row in place.rows for place in places)
            assert places[0].layer == places[1].layer
            assert unnumbered(row.flax) == path or table.find_flax(unnumbered(row.flax)).stacked


@settings(max_examples=60, deadline=None)
@given(
    variant=st.sampled_from(VARIANTS),
    group_size=st.sampled_from(GROUP_SIZES),
    dtype=st.sampled_from(sorted(DTYPES)),
    layout=st.sampled_from(["scanned", "unrolled"]),
    targets=st.lists(st.sampled_from([*OUT, "lm_head"]), min_size=1, unique=True).filter(lambda t: t != ["lm_head"]),
    regex=st.booleans(),
    norm=st.booleans(),
    layers=st.sampled_from([None, [0, 1, 2]]),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
    base=st.none() | st.text(max_size=8),
)
def test_round_trips(variant, group_size, dtype, layout, targets, regex, norm, layers, metadata, base):
    fields = {"variant": variant, "group_size": group_size, "base_model_name_or_path": base}
    if regex:
        fields["target_modules"] = rf"(.*\.)?({'|'.join(targets)})"
    elif layers and layout == "unrolled" and "lm_head" not in targets:
        fields["layers_to_transform"] = layers
    saved = {}
    if norm:
        saved["model.norm.weight"] = named_values("n", 8).astype(DTYPES[dtype])
        fields["modules_to_save"] = ["norm"]
    adapter = flax_adapter(layout, targets, dtype, saved, metadata, **fields)
    there = map_to_torch(adapter)
    assert there.digest() == map_to_torch(dataclasses.replace(adapter, metadata={})).digest()
    assert same(map_to_flax(there), adapter)
    assert same(map_to_flax(there, layout=layout), adapter)
    for other in ("scanned", "unrolled"):
        if other == "scanned" and "layers_to_transform" in fields:
            continue
        assert same(map_to_torch(map_to_flax(there, layout=other)), there)
        plain = dataclasses.replace(there, metadata=metadata)
        assert same(map_to_torch(map_to_flax(plain, layout=other)), plain)


def test_the_model_tells_how_many_layers_a_stack_has():
    pair = (np.zeros(64, np.float32), np.ones(64, np.float32))
    modules = {f"model.layers.{i}.self_attn.q_proj": pair for i in range(2)}
    adapter = Adapter(RoadConfig(target_modules=["q_proj"]), modules)
    assert map_to_flax(adapter, "llama", model={"num_hidden_layers": 2}).modules.keys() == {
        "model.layers.self_attn.q_proj"
    }
    with pytest.raises(AdapterError, match=r"in all 3 layers, missing model\.layers\.2\.self_attn\.q_proj"):
        map_to_flax(adapter, "llama", model={"num_hidden_layers": 3})
    with pytest.raises(AdapterError, match=r"expected layers 0 to 0, found besides model\.layers\.1\."):
        map_to_flax(adapter, "llama", "unrolled", model={"num_hidden_layers": 1})
    # With the model's config, an adapter with layers_to_transform needs no --layers.
    some = Adapter(RoadConfig(target_modules=["q_proj"], layers_to_transform=[0, 1]), modules)
    assert map_to_flax(some, "llama", model={"num_hidden_layers": 2}).modules.keys() == {
        "model.layers.self_attn.q_proj"
    }
