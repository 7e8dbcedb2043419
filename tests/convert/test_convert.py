"""Adapter folders converted both ways, compared with PEFT."""

import json
import os

import ml_dtypes
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from _models import small_model
from peft import PeftModel, get_peft_model
from peft import RoadConfig as PeftRoadConfig

import convert
import road_torch
from road_core import Adapter, AdapterError, RoadConfig, read_flax, read_peft, write_flax, write_peft

VARIANTS = ["road_1", "road_2", "road_4"]


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def peft_adapter(directory, dtype=torch.float32, kind="llama", **fields):
    """Writes an adapter that PEFT creates and saves; returns the model."""
    torch.manual_seed(1)
    config = PeftRoadConfig(**{"init_weights": False, "target_modules": "all-linear", **fields})
    model = get_peft_model(small_model(kind), config)
    for name, parameter in model.named_parameters():
        if "road_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(directory)
    return model


def logits(model):
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        return model(ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("layout", ["scanned", "unrolled"])
@pytest.mark.parametrize("group_size", [2, 8, 64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_of_pefts_comes_back_from_flax(variant, group_size, layout, tmp_path):
    names = ["lm_head", "input_layernorm", "norm"]
    theirs = peft_adapter(tmp_path / "theirs", variant=variant, group_size=group_size, modules_to_save=names)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.1)
    theirs.save_pretrained(tmp_path / "theirs")

    convert.to_flax(tmp_path / "theirs", tmp_path / "flax", family="llama", layout=layout)
    flax = read_flax(tmp_path / "flax")
    layer = theirs.base_model.model.model.layers[2].mlp.up_proj.road_theta["default"].detach().numpy()
    if layout == "scanned":
        assert len(flax.modules) == 7
        np.testing.assert_array_equal(flax.modules["model.layers.mlp.up_proj"][0][2], layer)
        assert flax.modules_to_save["model.layers.input_layernorm.weight"].shape == (3, 128)
    else:
        assert len(flax.modules) == 3 * 7
        np.testing.assert_array_equal(flax.modules["model.layers.2.mlp.up_proj"][0], layer)
    head = theirs.base_model.model.lm_head.modules_to_save["default"].weight.detach().numpy()
    np.testing.assert_array_equal(flax.modules_to_save["lm_head.kernel"], head.T)

    convert.to_torch(tmp_path / "flax", tmp_path / "back")
    # Tensors bit for bit as PEFT wrote them, and PEFT's config.
    old, new = (safetensors.torch.load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "back"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    old, new = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("theirs", "back"))
    assert new == old
    # If this project rewrites PEFT's files, the bytes are the same.
    write_peft(tmp_path / "plain", read_peft(tmp_path / "theirs"))
    assert contents(tmp_path / "plain") == contents(tmp_path / "back")

    # PEFT loads it (a warning is an error here), and it is the same function.
    loaded = PeftModel.from_pretrained(small_model(), tmp_path / "back")
    assert torch.equal(logits(loaded), logits(theirs))
    assert (logits(loaded) - logits(small_model())).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_family_and_dtype(kind, dtype, tmp_path):
    theirs = peft_adapter(tmp_path / "theirs", dtype, kind, group_size=8, target_modules=["q_proj", "gate_proj"])
    convert.to_flax(tmp_path / "theirs", tmp_path / "flax", family=kind)
    theta = read_flax(tmp_path / "flax").modules["model.layers.self_attn.q_proj"][0]
    expected = theirs.base_model.model.model.layers[1].self_attn.q_proj.road_theta["default"].detach()
    kind_of = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}[dtype]
    np.testing.assert_array_equal(theta.view(kind_of)[1].astype(np.float32), expected.float().numpy())
    convert.to_torch(tmp_path / "flax", tmp_path / "back")
    old, new = (safetensors.torch.load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "back"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) and new[key].dtype == dtype for key in old)


def test_a_choice_of_a_stack_is_loaded_by_peft_without_a_warning(tmp_path):
    theirs = peft_adapter(tmp_path / "theirs", target_modules=["q_proj"])
    convert.to_flax(tmp_path / "theirs", tmp_path / "flax")
    path = tmp_path / "flax" / "road_config.json"
    fields = json.loads(path.read_text())
    fields |= {"target_modules": r"model\.layers\.self_attn\.q_proj", "exclude_modules": ["k_proj"]}
    path.write_text(json.dumps(fields))
    convert.to_torch(tmp_path / "flax", tmp_path / "back")
    # A warning is an error here.
    loaded = PeftModel.from_pretrained(small_model(), tmp_path / "back")
    assert torch.equal(logits(loaded), logits(theirs))
    known = peft.RoadConfig().to_dict().keys() | {"peft_version"}
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text()).keys() <= known

    path = tmp_path / "back" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "exclude_modules": ["k_proj"]}))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        PeftModel.from_pretrained(small_model(), tmp_path / "back")


@pytest.mark.parametrize("layout", ["scanned", "unrolled"])
def test_the_language_model_of_a_model_with_vision(layout, tmp_path):
    """Its vision tower has layers of the same names, which a converted adapter must not ask for."""
    targets = r".*language_model.*\.(q_proj|v_proj)"
    theirs = peft_adapter(
        tmp_path / "theirs", kind="gemma3", target_modules=targets, modules_to_save=["language_model.norm"]
    )
    convert.to_flax(tmp_path / "theirs", tmp_path / "flax", layout=layout)
    adapter = read_flax(tmp_path / "flax")
    assert adapter.config.target_modules == targets
    # As training writes it, with names that vision has too.
    plain = RoadConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["norm"])
    write_flax(tmp_path / "trained", Adapter(plain, adapter.modules, adapter.modules_to_save))
    convert.to_torch(tmp_path / "trained", tmp_path / "back")
    there = read_peft(tmp_path / "back")
    assert there.config.target_modules == list(there.modules)
    assert there.config.modules_to_save == ["model.language_model.norm"]
    # PEFT loads it (a warning is an error here), and so does road_torch, which refuses what is missing or left over.
    loaded = PeftModel.from_pretrained(small_model("gemma3"), tmp_path / "back")
    assert torch.equal(logits(loaded), logits(theirs))
    ours = road_torch.RoadModel.from_pretrained(small_model("gemma3"), tmp_path / "back")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    convert.to_flax(tmp_path / "back", tmp_path / "again", layout=layout)
    assert contents(tmp_path / "again") == contents(tmp_path / "trained")


@pytest.mark.parametrize("layout", ["scanned", "unrolled"])
def test_both_files_of_the_flax_folder_come_back_byte_for_byte(layout, tmp_path):
    peft_adapter(tmp_path / "theirs", torch.bfloat16, variant="road_4", modules_to_save=["lm_head"])
    convert.to_flax(tmp_path / "theirs", tmp_path / "a", layout=layout)
    # As training writes it: without a record of a conversion.
    import road_jax

    road_jax.save_adapter(tmp_path / "trained", *road_jax.load_adapter(tmp_path / "a"))
    convert.to_torch(tmp_path / "trained", tmp_path / "torch")
    convert.to_flax(tmp_path / "torch", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "trained")
    convert.to_torch(tmp_path / "again", tmp_path / "torch again")
    assert contents(tmp_path / "torch again") == contents(tmp_path / "torch")


def test_nothing_is_written_over_or_half(tmp_path):
    peft_adapter(tmp_path / "theirs", target_modules=["q_proj"])
    convert.to_flax(tmp_path / "theirs", tmp_path / "flax")
    before = contents(tmp_path / "flax")
    with pytest.raises(AdapterError, match=r"flax: expected an empty or new folder, found one that already holds some"):
        convert.to_flax(tmp_path / "theirs", tmp_path / "flax", layout="unrolled")
    assert contents(tmp_path / "flax") == before
    convert.to_flax(tmp_path / "theirs", tmp_path / "flax", layout="unrolled", overwrite=True)
    assert len(read_flax(tmp_path / "flax").modules) == 3
    convert.to_torch(tmp_path / "flax", tmp_path / "back")
    convert.to_torch(tmp_path / "flax", tmp_path / "back", overwrite=True)

    listing = sorted(os.listdir(tmp_path))
    with pytest.raises(AdapterError, match=r"theirs: expected a file road_config\.json, found none"):
        convert.to_torch(tmp_path / "theirs", tmp_path / "new")
    with pytest.raises(AdapterError, match=r"theirs: family: expected one of llama, .*, found 'gpt9'"):
        convert.to_flax(tmp_path / "theirs", tmp_path / "new", family="gpt9")
    path = tmp_path / "flax" / "road_adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(AdapterError, match="expected a whole safetensors file, found a broken one"):
        convert.to_torch(tmp_path / "flax", tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == listing


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_of_the_base_have_no_place_in_flax(tmp_path):
    peft_adapter(tmp_path / "theirs", target_modules=["q_proj", "lm_head"], group_size=8)
    small_model().save_pretrained(tmp_path / "base")
    for convert_to in (convert.to_flax, lambda *folders: convert.merge(tmp_path / "base", *folders)):
        with pytest.raises(AdapterError, match=r"found lm_head\.weight; .* save_embedding_layers=False"):
            convert_to(tmp_path / "theirs", tmp_path / "flax")
    assert not (tmp_path / "flax").exists()
    assert convert.diff(tmp_path / "theirs", tmp_path / "theirs").saved == {"lm_head.weight": 0.0}
