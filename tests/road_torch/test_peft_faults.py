"""Faults of PEFT 0.21.2's RoAd that must not occur here.

Other faults are tested where they belong:

- test_model.py: the hook that stays after an exception, the tied head, the half-finished merge, layers that are wrapped
  without effect, and ``disable_adapter`` while merged;
- test_bnb.py: the repacked weight and the dtype of 4-bit and 8-bit layers;
- test_layer.py: Conv1D and bfloat16 layers;
- test_generate.py: beams and returned sequences.
"""

import json
import re

import pytest
import safetensors.torch
import torch
from _compare import assert_close
from _models import small_model

from road_core import AdapterError
from road_torch import RoadConfig, RoadLayer, RoadModel

IDS = torch.arange(3, 31).reshape(4, 7)


def config(**changes):
    fields = {"target_modules": ["q_proj", "down_proj"], "init_weights": False, "inference_mode": True}
    return RoadConfig(**{**fields, **changes})


def road(**changes):
    torch.manual_seed(1)
    return RoadModel(small_model(), config(**changes))


@torch.no_grad()
def logits(model, **kwargs):
    return model(IDS, **kwargs).logits


def key(path, part):
    return f"base_model.model.model.layers.{path}.road_{part}"


def poison(tensors, value):
    tensors[key("1.mlp.down_proj", "theta")][5] = value


def swap(tensors):
    one, two = (key("0.self_attn.q_proj", part) for part in ("theta", "alpha"))
    tensors[one], tensors[two] = tensors[two], tensors[one]


def rename(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("base_model.")] = tensors.pop(name)


def integers(tensors):
    name = key("0.self_attn.q_proj", "alpha")
    tensors[name] = tensors[name].long()


# Changes to the tensors and the config, whether the file's own metadata is needed to notice, and the error.
FILES = {
    "NaN": (lambda t: poison(t, float("nan")), {}, False, r"down_proj\.road_theta: expected finite values, found 1"),
    "infinite": (lambda t: poison(t, float("inf")), {}, False, "expected finite values, found 1"),
    "missing module": (lambda t: [t.pop(key("2.mlp.down_proj", p)) for p in ("theta", "alpha")], {}, False, "none for"),
    "missing half": (lambda t: t.pop(key("2.mlp.down_proj", "alpha")), {}, False, "found besides .*road_theta"),
    "other prefix": (rename, {}, False, "found besides model.model.layers"),
    "extra tensor": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}),
        {},
        False,
        "lm_head.weight",
    ),
    "integers": (integers, {}, False, "expected floating-point values, found int64"),
    "targets too few": (lambda t: None, {"target_modules": ["q_proj"]}, False, "only for modules that target_modules"),
    "targets too many": (lambda t: None, {"target_modules": "all-linear"}, False, "found none for"),
    "group size": (lambda t: None, {"group_size": 32}, True, "expected group_size 64, as .* written, found 32"),
    "variant": (lambda t: None, {"r": 1, "variant": "road_2"}, True, "expected variant road_1, as .* found road_2"),
    "swapped": (swap, {}, True, "expected the digest"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_is_refused(case, tmp_path):
    change, fields, by_metadata, message = FILES[case]
    road().save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_model.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata() if by_metadata else {"format": "pt"}
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata)
    path = tmp_path / "saved" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    base = small_model()
    modules = dict(base.named_modules())
    with pytest.raises(AdapterError, match=message) as caught:
        RoadModel.from_pretrained(base, tmp_path / "saved")
    assert "\n" not in str(caught.value)
    assert dict(base.named_modules()) == modules
    swapped = road()
    expected = logits(swapped)
    with pytest.raises(AdapterError):
        swapped.hotswap_adapter(tmp_path / "saved", "default")
    assert torch.equal(logits(swapped), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_neither_merged_nor_saved(value, tmp_path):
    model = road()
    last = [module for module in model.modules() if isinstance(module, RoadLayer)][-1]
    with torch.no_grad():
        last.road_theta["default"][3] = value
    weights = {name: parameter.clone() for name, parameter in model.named_parameters() if ".road_" not in name}
    with pytest.raises(AdapterError, match=rf"{re.escape(last.module_path)}\.weight: expected finite values after"):
        model.merge_adapter()
    assert model.merged_adapters == []
    for name, parameter in model.named_parameters():
        assert ".road_" in name or torch.equal(parameter, weights[name])
    with pytest.raises(AdapterError, match=rf"{re.escape(last.module_path)}\.road_theta: expected finite values"):
        model.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_zero_is_merged_and_unmerged(dtype):
    torch.manual_seed(1)
    model = RoadModel(small_model().to(dtype), config(variant="road_2"))
    for layer in (module for module in model.modules() if isinstance(module, RoadLayer)):
        with torch.no_grad():
            layer.road_alpha["default"][:10] = 0.0
    expected = logits(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter()
    assert_close(logits(model).double(), expected.double(), str(dtype).removeprefix("torch."))
    model.unmerge_adapter()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(logits(model), expected)


def test_a_second_merge_doesn_t_drift():
    model = road()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(20):
        model.merge_adapter()
        model.unmerge_adapter()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
