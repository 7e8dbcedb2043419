"""Layers of quantisers that we did not write: their outputs rotated, in mixed batches and training; not merged into."""

import copy

import pytest
import torch
from _models import small_model
from torch import nn

import road_core
from road_torch import AdapterError, RoadConfig, RoadLayer, RoadModel

pytestmark = pytest.mark.filterwarnings("ignore")  # the quantisers' own

GROUP = 64
IDS = torch.arange(3, 35).reshape(4, 8)
NAMES = ["b", "__base__", "a", "b"]


def affine(linear, bits=4):
    """Scales and zero points of plain rounding, ``[out, in / GROUP]``."""
    groups = linear.weight.detach().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (high - low) / (2**bits - 1)
    return scales, (-low / scales).round()


def packed(layer, linear, pack):
    scales, zeros = affine(linear)
    pack(linear, scales, zeros, torch.arange(linear.in_features) // GROUP)
    layer.post_init()
    return layer


def gptq(linear):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer = TorchLinear(4, GROUP, False, False, linear.in_features, linear.out_features, linear.bias is not None)
    return packed(layer, linear, layer.pack_original)


def awq(linear):
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    layer = AwqTorchLinear(4, GROUP, False, False, linear.in_features, linear.out_features, linear.bias is not None)
    return packed(layer, linear, layer.pack)


def hqq(linear):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=GROUP)
    return HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")


def quanto(linear):
    from optimum.quanto import freeze, qint8, quantize

    within = nn.Sequential(linear)
    quantize(within, weights=qint8)
    freeze(within)
    return within[0]


def compressed_tensors(linear):
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    weights = QuantizationArgs(num_bits=4, group_size=GROUP, strategy="group", symmetric=True)
    within = nn.Sequential(linear)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    apply_quantization_config(within, QuantizationConfig(config_groups={"all": scheme}))
    within[0].weight_scale.data.copy_(linear.weight.detach().unflatten(1, (-1, GROUP)).abs().amax(-1) / 7.5)
    return within[0]


def bitnet(linear):
    from transformers.integrations.bitnet import AutoBitLinear

    layer = AutoBitLinear(linear.in_features, linear.out_features, linear.bias is not None, online_quant=True)
    layer.load_state_dict(linear.state_dict())
    return layer


HALF = (gptq, awq)
KINDS = {kind.__name__: kind for kind in (gptq, awq, hqq, quanto, compressed_tensors, bitnet)}


@pytest.fixture(params=KINDS)
def base(request):
    """A decoder whose blocks' linear layers are the quantiser's."""
    model = small_model(attention_bias=True)
    kind = KINDS[request.param]
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            above, _, name = path.rpartition(".")
            setattr(model.get_submodule(above), name, kind(copy.deepcopy(module)).eval())
    return (model.half() if kind in HALF else model).eval()


@pytest.fixture
def model(base):
    road = RoadModel(base)
    for name, variant, group_size in (("a", "road_1", 64), ("b", "road_4", 32)):
        torch.manual_seed(group_size)
        config = RoadConfig(variant=variant, group_size=group_size, target_modules="all-linear", init_weights=False)
        road.add_adapter(name, config)
    return road.eval()


def tolerance(model):
    return 5e-3 if model.dtype == torch.float16 else 1e-5


@torch.no_grad()
def test_all_linear_takes_each_layer_and_its_output_is_rotated(model):
    found = {layer.module_path: layer for layer in model.modules() if isinstance(layer, RoadLayer)}
    assert len(found) == 7 * 3
    assert "lm_head" not in found
    for layer in found.values():
        x = torch.randn(2, 3, layer.base_layer.in_features).to(model.dtype)
        y = layer.base_layer(x)
        theta, alpha = layer.road_theta["a"], layer.road_alpha["a"]
        expected = road_core.rotate(y.double(), theta, alpha, variant="road_1", group_size=64)
        result = layer(x)
        assert result.dtype == y.dtype
        error = (result.double() - torch.from_numpy(expected)).abs().max()
        assert error < tolerance(model) * y.abs().max()
        assert (result - y).abs().max() > 0.1 * y.abs().max()


@torch.no_grad()
def test_rows_of_a_mixed_batch_are_those_of_their_adapters(model):
    mixed = model(IDS, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(IDS).logits
        else:
            model.set_adapter(name)
            alone = model(IDS).logits
        assert (mixed[row] - alone[row]).abs().max() < tolerance(model) * alone.abs().max()
    assert (mixed[0] - mixed[2]).abs().max() > 0.1
    tokens = model.generate(input_ids=IDS, adapter_names=NAMES, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (4, 12)


def test_training_lowers_the_loss_and_leaves_the_base(model):
    before = {name: value.clone() for name, value in model.state_dict().items() if "road_" not in name}
    model.set_adapter("a")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    losses = []
    for _ in range(5):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


@torch.no_grad()
def test_merging_is_refused_and_changes_nothing(model):
    expected = model(IDS).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match=r"^model\.layers\.0\.self_attn\.q_proj: expected a .+, found \w+ "):
            merge()
        assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_an_adapter_of_the_plain_model_is_loaded(base, tmp_path):
    config = RoadConfig(variant="road_2", target_modules="all-linear", init_weights=False)
    plain = RoadModel(small_model(attention_bias=True), config)
    plain.save_pretrained(tmp_path / "a")
    model = RoadModel.from_pretrained(base, tmp_path / "a", "a")
    with model.disable_adapter():
        alone = model(IDS).logits
    assert (model(IDS).logits - alone).abs().max() > 0.1
    for path, layer in plain.named_modules():
        if isinstance(layer, RoadLayer):
            assert torch.equal(model.get_submodule(path).road_theta["a"], layer.road_theta["default"])
