import dataclasses
import json
import os
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from _compare import named_values
from _models import small_model
from peft import PeftModel, get_peft_model
from peft import RoadConfig as PeftRoadConfig

import road_core
from road_core import Adapter, AdapterError, RoadConfig, read_flax, read_peft, write_flax, write_peft
from road_core._adapter import from_float32

VARIANTS = ["road_1", "road_2", "road_4"]
GROUP_SIZES = [2, 8, 64]
FORMATS = {
    "peft": (read_peft, write_peft, "adapter_config.json", "adapter_model.safetensors"),
    "flax": (read_flax, write_flax, "road_config.json", "road_adapter.safetensors"),
}


def make_adapter(dtype="float32", **fields):
    paths = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    modules = {p: tuple(named_values(p + s, 64).astype(kind) for s in ("theta", "alpha")) for p in paths}
    return Adapter(RoadConfig(target_modules=["q_proj", "up_proj"], **fields), modules)


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_and_we_read_each_other(variant, group_size, tmp_path):
    torch.manual_seed(1)
    config = PeftRoadConfig(
        variant=variant,
        group_size=group_size,
        init_weights=False,
        target_modules="all-linear",
        modules_to_save=["norm"],
    )
    theirs = get_peft_model(small_model(), config)
    theirs.save_pretrained(tmp_path / "theirs")

    adapter = read_peft(tmp_path / "theirs")
    assert adapter.config.variant == variant
    assert adapter.config.group_size == group_size
    layer = theirs.base_model.model.model.layers[1].mlp.down_proj
    theta, alpha = adapter.modules["model.layers.1.mlp.down_proj"]
    np.testing.assert_array_equal(theta, layer.road_theta["default"].detach().numpy())
    np.testing.assert_array_equal(alpha, layer.road_alpha["default"].detach().numpy())
    assert len(adapter.modules) == 3 * 7
    assert "model.norm.weight" in adapter.modules_to_save

    write_peft(tmp_path / "ours", adapter)
    ids = torch.arange(3, 20)[None]
    loaded = PeftModel.from_pretrained(small_model(), tmp_path / "ours")
    with torch.no_grad():
        expected, found = theirs(ids).logits, loaded(ids).logits
        assert (expected - small_model()(ids).logits).abs().max() > 0.1
    assert torch.equal(expected, found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMATS)
def test_bytes_survive(form, dtype, tmp_path):
    read, write, _, tensors_file = FORMATS[form]
    adapter = make_adapter(dtype)
    write(tmp_path / "a", adapter)
    back = read(tmp_path / "a")
    for key, array in adapter.tensors().items():
        found = back.tensors()[key]
        assert found.tobytes() == array.tobytes()
        np.testing.assert_array_equal(road_core.to_float32(found), array.astype(np.float32))
    assert back.config == adapter.config
    # Inserted in another order, read back and written again, it gives the same files.
    reverse = dataclasses.replace(back, modules=dict(reversed(list(back.modules.items()))))
    write(tmp_path / "b", reverse)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert back.digest() == adapter.digest()
    if dtype != "bfloat16":
        # The library's own reader agrees.
        for key, array in safetensors.numpy.load_file(tmp_path / "a" / tensors_file).items():
            np.testing.assert_array_equal(array, adapter.tensors()[key.removeprefix("base_model.model.")])


def test_bfloat16_is_what_torch_reads(tmp_path):
    import safetensors.torch

    adapter = make_adapter("bfloat16")
    write_peft(tmp_path / "a", adapter)
    for key, tensor in safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        array = adapter.tensors()[key.removeprefix("base_model.model.")]
        np.testing.assert_array_equal(tensor.float().numpy(), array.astype(np.float32))


def test_metadata_is_carried_and_says_what_the_tensors_are(tmp_path):
    adapter = dataclasses.replace(make_adapter(), metadata={"made_by": "a test"})
    write_peft(tmp_path / "a", adapter)
    with safetensors.safe_open(tmp_path / "a" / "adapter_model.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["road_group_size"] == "64"
    assert metadata["road_digest"] == adapter.digest()
    assert read_peft(tmp_path / "a").metadata == {"made_by": "a test"}


def test_choices_that_peft_lacks_stand_in_the_metadata(tmp_path):
    adapter = make_adapter(exclude_modules=["k_proj"], layers_to_transform=[0, 1])
    write_peft(tmp_path / "a", adapter)
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["target_modules"] == [*adapter.modules]
    assert not {"exclude_modules", "layers_to_transform", "layers_pattern"} & fields.keys()
    again = read_peft(tmp_path / "a")
    assert again.config == adapter.config
    assert again.metadata == {}
    write_peft(tmp_path / "b", again)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    # A later choice of modules takes precedence.
    rewrite(tmp_path / "a" / "adapter_config.json", lambda f: f.update(target_modules=["proj"]))
    assert read_peft(tmp_path / "a").config == RoadConfig(target_modules=["proj"])


def rewrite(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def set_tensors(directory, change, metadata=None):
    path = directory / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, metadata=metadata)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.road_"
HEAD, ROAD = "base_model.model.lm_head.", ("road_theta", "road_alpha")
WEIGHT = np.ones((160, 128), np.float32)


def _nan(tensors):
    tensors[KEY + "alpha"] = np.full(64, np.nan, np.float32)


def _short(tensors):
    tensors[KEY + "alpha"] = tensors[KEY + "alpha"][:32].copy()


def _integers(tensors):
    tensors[KEY + "alpha"] = np.ones(64, np.int64)


def _other_prefix(tensors):
    tensors[KEY.removeprefix("base_model.model.") + "theta"] = tensors.pop(KEY + "theta")


BROKEN = {
    "no folder": (lambda d: shutil.rmtree(d), "expected a folder, found nothing"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "expected a file adapter_config.json, found none"),
    "no tensors": (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors, found none"),
    "no json": (lambda d: (d / "adapter_config.json").write_text("{"), "expected a JSON object"),
    "deep json": (lambda d: (d / "adapter_config.json").write_text("[" * 100_000), "expected a JSON object"),
    "a list": (lambda d: (d / "adapter_config.json").write_text("[]"), "expected a JSON object, found list"),
    "lora": (lambda d: rewrite(d / "adapter_config.json", lambda f: f.update(peft_type="LORA")), "found 'LORA'"),
    "group size 32": (
        lambda d: rewrite(d / "adapter_config.json", lambda f: f.update(group_size=32)),
        "expected group_size 64, as the tensors were written, found 32",
    ),
    "variant": (
        lambda d: rewrite(d / "adapter_config.json", lambda f: f.update(variant="road_2")),
        "expected variant road_1",
    ),
    "truncated": (
        lambda d: os.truncate(d / "adapter_model.safetensors", 700),
        "expected a whole safetensors file, found a broken one",
    ),
    "over-long header": (
        lambda d: (d / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        "found a broken one",
    ),
    "pickle": (lambda d: torch.save({}, d / "adapter_model.safetensors"), "found a broken one"),
    "empty": (lambda d: (d / "adapter_model.safetensors").write_bytes(b""), "found a broken one"),
    "theta alone": (lambda d: set_tensors(d, lambda t: t.pop(KEY + "alpha")), "q_proj.road_theta"),
    "nan": (lambda d: set_tensors(d, _nan), r"q_proj\.road_alpha: expected finite values, found 64"),
    "shape": (lambda d: set_tensors(d, _short), r"q_proj: expected road_theta and road_alpha of one shape"),
    "dtype": (lambda d: set_tensors(d, _integers), r"expected floating-point values, found int64"),
    "prefix": (lambda d: set_tensors(d, _other_prefix), "found besides"),
    "extra": (lambda d: set_tensors(d, lambda t: t.update(lora_A=np.ones(3))), "found besides lora_A"),
    # Of the base's weights, PEFT writes only those of its embedding and head, each in one place.
    "a base weight": (lambda d: set_tensors(d, lambda t: t.update({KEY[:-5] + "weight": WEIGHT})), "q_proj.weight"),
    "below a layer": (
        lambda d: set_tensors(d, lambda t: t.update({KEY[:-5] + "base_layer.weight": WEIGHT})),
        r"besides .*q_proj\.base_layer\.weight",
    ),
    "below a head that isn't rotated": (
        lambda d: set_tensors(d, lambda t: t.update({HEAD + "base_layer.weight": WEIGHT})),
        r"besides .*lm_head\.base_layer\.weight",
    ),
    "beside a head that is rotated": (
        lambda d: set_tensors(
            d, lambda t: t.update({HEAD + "weight": WEIGHT, **{HEAD + n: t[KEY + n[5:]] for n in ROAD}})
        ),
        r"besides .*lm_head\.weight",
    ),
    "below a head that isn't saved": (
        lambda d: set_tensors(
            d, lambda t: t.update({HEAD + "original_module.weight": WEIGHT, HEAD + "weight": WEIGHT})
        ),
        r"besides .*lm_head\.original_module\.weight",
    ),
    "a saved head twice": (
        lambda d: (
            rewrite(d / "adapter_config.json", lambda f: f.update(modules_to_save=["lm_head"])),
            set_tensors(d, lambda t: t.update({HEAD + "modules_to_save.weight": WEIGHT, HEAD + "weight": WEIGHT + 1})),
        ),
        r"besides .*lm_head\.modules_to_save\.weight",
    ),
    "an embedding that isn't finite": (
        lambda d: set_tensors(d, lambda t: t.update({HEAD + "weight": WEIGHT * np.nan})),
        r"lm_head\.weight: expected finite values",
    ),
    "targets that are none": (
        lambda d: set_tensors(d, lambda t: None, metadata={"road_targets": '{"variant": "road_2"}'}),
        "expected target_modules and the like as road_targets",
    ),
    "targets that don't parse": (
        lambda d: set_tensors(d, lambda t: None, metadata={"road_targets": "[" * 100_000}),
        "as road_targets, found '\\[",
    ),
    "nothing": (lambda d: set_tensors(d, lambda t: t.clear()), "at least one module"),
    "changed": (
        lambda d: set_tensors(d, lambda t: None, metadata={"road_digest": "0" * 64}),
        "expected the digest 000000000000",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused_with_one_sentence(name, tmp_path):
    spoil, message = BROKEN[name]
    write_peft(tmp_path / "a", make_adapter())
    read_peft(tmp_path / "a")
    spoil(tmp_path / "a")
    with pytest.raises(AdapterError, match=message) as caught:
        read_peft(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)


def test_a_link_that_leaves_the_folder_is_refused_but_a_hubs_cache_is_read(tmp_path):
    write_peft(tmp_path / "a", make_adapter())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a" / "adapter_config.json").rename(tmp_path / "elsewhere" / "c.json")
    (tmp_path / "a" / "adapter_config.json").symlink_to(tmp_path / "elsewhere" / "c.json")
    with pytest.raises(AdapterError, match="a link that leaves it"):
        read_peft(tmp_path / "a")

    root = tmp_path / "models--someone--adapter"
    (root / "blobs").mkdir(parents=True)
    write_peft(root / "snapshots" / "0123", make_adapter())
    for index, path in enumerate(sorted((root / "snapshots" / "0123").iterdir())):
        path.rename(root / "blobs" / str(index))
        path.symlink_to(root / "blobs" / str(index))
    assert read_peft(root / "snapshots" / "0123").digest() == make_adapter().digest()


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_folder_is_not_overwritten_unasked(form, tmp_path):
    read, write, _, _ = FORMATS[form]
    write(tmp_path / "a", make_adapter())
    (tmp_path / "a" / "notes.txt").write_text("mine")
    before = contents(tmp_path / "a")
    other = make_adapter(variant="road_2")
    with pytest.raises(AdapterError, match="already holds something"):
        write(tmp_path / "a", other)
    assert contents(tmp_path / "a") == before
    write(tmp_path / "a", other, overwrite=True)
    assert read(tmp_path / "a").digest() == other.digest()
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("rotated", [False, True])
def test_weights_of_the_base_come_back(rotated, tmp_path):
    adapter = make_adapter()
    if rotated:
        adapter = dataclasses.replace(
            adapter, modules={**adapter.modules, "lm_head": adapter.modules["model.layers.0.self_attn.q_proj"]}
        )
    adapter = dataclasses.replace(adapter, base_weights={"lm_head.weight": WEIGHT})
    write_peft(tmp_path / "a", adapter)
    key = HEAD + ("base_layer.weight" if rotated else "weight")
    assert key in safetensors.numpy.load_file(tmp_path / "a" / "adapter_model.safetensors")
    again = read_peft(tmp_path / "a")
    assert again.base_weights.keys() == {"lm_head.weight"}
    np.testing.assert_array_equal(again.base_weights["lm_head.weight"], WEIGHT)
    write_peft(tmp_path / "b", again)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(AdapterError, match=r"without weights of its base, found lm_head\.weight"):
        write_flax(tmp_path / "c", again)
    with pytest.raises(AdapterError, match=r"second: expected an adapter without weights of its base"):
        road_core.compose([make_adapter(), again], names=["first", "second"])


def test_a_failed_write_leaves_nothing(tmp_path):
    stacked = {"model.layers.q_proj": (named_values("t", 3, 64), named_values("a", 3, 64))}
    with pytest.raises(AdapterError, match=r"q_proj\.road_theta: expected one axis in PEFT's format, found \[3, 64\]"):
        write_peft(tmp_path / "a", Adapter(RoadConfig(), stacked))
    with pytest.raises(AdapterError, match="a dtype that safetensors has"):
        write_flax(tmp_path / "a", Adapter(RoadConfig(), {"q": (np.ones(64, np.longdouble),) * 2}))
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_checks_itself():
    ones = np.ones(64, np.float32)
    with pytest.raises(AdapterError, match=r"q: expected a number of outputs that group_size 64 divides, found 96"):
        Adapter(RoadConfig(), {"q": (ones[:48], ones[:48])})
    with pytest.raises(AdapterError, match=r"head\.weight: expected finite values, found 1"):
        Adapter(RoadConfig(), {"q": (ones, ones)}, {"head.weight": np.array([np.inf, 1.0])})
    with pytest.raises(AdapterError, match=r"q\.road_theta: expected finite values"):
        Adapter(RoadConfig(), {"q": (np.full(64, np.nan).astype(ml_dtypes.bfloat16), ones.astype(ml_dtypes.bfloat16))})


def test_rounding_to_bfloat16_is_that_of_ml_dtypes():
    # Every upper half, with lower halves around the tie; among them NaNs, infinities, subnormals and overflow.
    upper = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    values = (upper | np.uint32([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).view(np.float32)
    found = from_float32(values, road_core.bfloat16).view(ml_dtypes.bfloat16)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(found.astype(np.float32), values.astype(ml_dtypes.bfloat16).astype(np.float32))
