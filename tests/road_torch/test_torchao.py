"""torchao layers: rotation of their own output, also in mixed batches; merging into their weights is refused."""

import pytest
import torch
import torchao.quantization as ao
import transformers
from _compare import assert_close, named_values
from _models import small_model
from torch import nn

import road_core
from road_torch import AdapterError, RoadConfig, RoadLayer, RoadModel

IN, OUT = 64, 128
IDS = torch.arange(3, 31).reshape(4, 7)
NAMES = ["b", "__base__", "a", "b"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = {
    "int8": ao.Int8WeightOnlyConfig(),
    "int8 activations": ao.Int8DynamicActivationInt8WeightConfig(),
    "int4": ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.granularity.PerGroup(32)),
    "float8": ao.Float8WeightOnlyConfig(),
}
REFUSED = r"^proj: expected a plain floating-point weight to merge into, found Linear with \w+Tensor of [^\n]*$"


class Model(nn.Module):
    def __init__(self, kind, dtype):
        super().__init__()
        self.proj = nn.Linear(IN, OUT)
        with torch.no_grad():
            self.proj.weight.copy_(torch.from_numpy(named_values("weight", OUT, IN)))
            self.proj.bias.copy_(torch.from_numpy(named_values("bias", OUT)))
        ao.quantize_(self.to(dtype).eval(), KINDS[kind])
        assert type(self.proj.weight.data).__module__.startswith("torchao.")

    def forward(self, x):
        return self.proj(x)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer(kind, dtype, variant, tmp_path):
    x = torch.from_numpy(named_values("x", 4, 3, IN)).to(DTYPES[dtype])
    with torch.no_grad():
        y = Model(kind, DTYPES[dtype])(x)
    model = RoadModel(Model(kind, DTYPES[dtype]))
    for name, group_size in {"a": 8, "b": 64}.items():
        torch.manual_seed(group_size)
        config = RoadConfig(variant=variant, group_size=group_size, target_modules=["proj"], init_weights=False)
        model.add_adapter(name, config)
    layer = next(module for module in model.modules() if isinstance(module, RoadLayer))

    def expected(row, name):
        theta, alpha = layer.road_theta[name].detach(), layer.road_alpha[name].detach()
        size = {"a": 8, "b": 64}[name]
        return road_core.rotate(y[row].double(), theta, alpha, variant=variant, group_size=size)

    for context in (torch.enable_grad, torch.inference_mode):
        with context():
            single, mixed = model(x).detach(), model(x, adapter_names=NAMES).detach()
            with model.disable_adapter():
                assert torch.equal(model(x), y)
        assert single.dtype == mixed.dtype == DTYPES[dtype]
        for row, name in enumerate(NAMES):
            assert_close(single[row].double(), expected(row, "a"), dtype, moved_from=y[row].double())
            if name == "__base__":
                assert torch.equal(mixed[row], y[row])
            else:
                assert_close(mixed[row].double(), expected(row, name), dtype, moved_from=y[row].double())

    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match=REFUSED):
            merge()
        assert model.merged_adapters == []
        assert torch.equal(model(x, adapter_names=NAMES), mixed)

    model.save_pretrained(tmp_path)
    again = RoadModel.from_pretrained(Model(kind, DTYPES[dtype]), tmp_path / "a", "a")
    again.load_adapter(tmp_path / "b", "b")
    assert torch.equal(again(x, adapter_names=NAMES), mixed)
    assert torch.equal(model.unload()(x), y)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_model_that_transformers_quantised(kind, tmp_path):
    small_model().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=transformers.TorchAoConfig(KINDS[kind]), dtype=torch.bfloat16
    )
    plain = base(IDS).logits.detach()
    config = RoadConfig(target_modules="all-linear", group_size=8, init_weights=False)
    model = RoadModel(base, config).train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        single = model.eval()(IDS).logits
        mixed = model(IDS, adapter_names=["default", "__base__"] * 2).logits
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, plain)
    assert not torch.allclose(single, plain)
    assert_close(mixed[::2].double(), single[::2].double(), "bfloat16", moved_from=plain[::2].double())
    assert_close(mixed[1::2].double(), plain[1::2].double(), "bfloat16")
