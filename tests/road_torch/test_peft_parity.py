"""Layer kind × dtype × variant × group size × use: ours and PEFT's, both against road_core's float64 reference."""

import bitsandbytes as bnb
import numpy as np
import peft
import pytest
import torch
from _compare import named_values
from peft.tuners.road.layer import RoadLayer as PeftRoadLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

import road_core
from road_torch import RoadConfig, RoadLayer, RoadModel, _bnb

IN, OUT = 64, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZED = ("nf4", "fp4", "int8")
# In "linear, adapters cast" adapters are in the base's dtype, as PEFT has them with autocast_adapter_dtype=False.
KINDS = ("linear", "linear, adapters cast", "conv1d", *QUANTIZED)
USES = ("single", "mixed", "merged", "disabled")
NAMES = ["two", "__base__", "one", "two"]
X = torch.from_numpy(named_values("x", 4, 3, IN))
pytestmark = pytest.mark.filterwarnings("ignore:.*inputs will be cast", "ignore:Merge .* to .-bit linear")


class Model(nn.Module):
    def __init__(self, kind, dtype):
        super().__init__()
        weight = torch.from_numpy(named_values("weight", OUT, IN)).to(dtype)
        # Flags that transformers sets on a model, by which PEFT chooses its layer class.
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = kind in ("nf4", "fp4"), kind == "int8"
        if self.is_loaded_in_4bit:
            self.proj = bnb.nn.Linear4bit(IN, OUT, compute_dtype=dtype, quant_type=kind)
            self.proj.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, module=self.proj)
        elif self.is_loaded_in_8bit:
            self.proj = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
            self.proj.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        elif kind == "conv1d":
            self.proj = Conv1D(OUT, IN)
            self.proj.weight = nn.Parameter(weight.T.contiguous())
        else:
            self.proj = nn.Linear(IN, OUT)
            self.proj.weight = nn.Parameter(weight)
        self.proj.bias = nn.Parameter(torch.from_numpy(named_values("bias", OUT)).to(dtype))
        self.to("cpu").eval().requires_grad_(False)

    def forward(self, x):
        return self.proj(x)


def peft_fails(kind, dtype, use):
    """Returns the error of PEFT 0.21.2 in a case that it doesn't support; None if it does."""
    if kind == "conv1d":
        return ValueError, "Target module Conv1D.* is not supported"
    if use == "mixed" and kind in QUANTIZED:
        return TypeError, "unexpected keyword argument 'adapter_names'"
    if use == "mixed" and kind != "linear, adapters cast" and dtype != "float32":
        return RuntimeError, "Index put requires the source and destination dtypes match"
    return None


def draw(kind, dtype, variant):
    size = road_core.parameter_size(variant, OUT)
    values = {n: (named_values(f"{n} theta", size), named_values(f"{n} alpha", size, mean=1.0)) for n in ("one", "two")}
    if kind != "linear, adapters cast":
        return values
    return {name: tuple(torch.from_numpy(v).to(dtype).float().numpy() for v in pair) for name, pair in values.items()}


def fill(model, values):
    layer = next(m for m in model.modules() if isinstance(m, (RoadLayer, PeftRoadLayer)))
    with torch.no_grad():
        for name, (theta, alpha) in values.items():
            layer.road_theta[name].copy_(torch.from_numpy(theta))
            layer.road_alpha[name].copy_(torch.from_numpy(alpha))
    return model.eval()


def our_model(kind, dtype, values, **fields):
    model = RoadModel(Model(kind, dtype))
    for name in values:
        model.add_adapter(name, RoadConfig(target_modules=["proj"], **fields))
    return fill(model, values)


def peft_model(kind, dtype, values, **fields):
    cast = kind != "linear, adapters cast"
    config = peft.RoadConfig(target_modules=["proj"], **fields)
    model = peft.get_peft_model(Model(kind, dtype), config, adapter_name="one", autocast_adapter_dtype=cast)
    model.add_adapter("two", config, autocast_adapter_dtype=cast)
    return fill(model, values)


def weight_and_bias(linear):
    weight = _bnb.dequantize(linear) if type(linear).__module__.startswith("bitsandbytes.") else linear.weight
    return [weight.T if isinstance(linear, Conv1D) else weight, linear.bias]


@torch.no_grad()
def found(model, use, x):
    """Returns the output of a use; for merging, the merged weight and bias."""
    if use == "mixed":
        return model(x, adapter_names=NAMES)
    if use == "disabled":
        with model.disable_adapter():
            return model(x)
    if use == "single":
        return model(x)
    model.merge_adapter(["one"])
    merged = weight_and_bias(next(m for m in model.modules() if hasattr(m, "base_layer")).base_layer)
    return torch.cat([value.flatten() for value in merged])


def expected(base, use, x, values, **fields):
    """Returns what `found` should return, in float64, computed from the unadapted base."""

    def rotate(y, name):
        return y.double() if name == "__base__" else road_core.rotate(y.double(), *values[name], **fields)

    if use == "merged":
        parts = [road_core.merge(value.double(), *values["one"], **fields) for value in weight_and_bias(base.proj)]
        return np.concatenate([np.ravel(value) for value in parts])
    names = {"single": ["one"] * 4, "mixed": NAMES, "disabled": ["__base__"] * 4}[use]
    return np.stack([rotate(y, name) for y, name in zip(base(x), names, strict=True)])


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("group_size", [8, 64])
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_farther_from_float64_than_peft(kind, dtype, variant, group_size, use):
    fields = {"variant": variant, "group_size": group_size}
    x, values = X.to(DTYPES[dtype]), draw(kind, DTYPES[dtype], variant)
    truth = expected(Model(kind, DTYPES[dtype]), use, x, values, **fields)
    eps = torch.finfo(DTYPES[dtype]).eps

    def distance(given):
        return np.linalg.norm(np.asarray(given, np.float64) - truth) / np.linalg.norm(truth)

    identity = {name: (0 * theta, 0 * alpha + 1) for name, (theta, alpha) in values.items()}
    untouched = expected(Model(kind, DTYPES[dtype]), use, x, identity, **fields)
    assert distance(untouched) > 0.1 or use == "disabled"
    ours = found(our_model(kind, DTYPES[dtype], values, **fields), use, x)
    # The error from quantising again is tested in test_bnb.py.
    requantized = use == "merged" and kind in QUANTIZED
    if not requantized:
        assert ours.dtype == DTYPES[dtype]
        assert distance(ours.double()) <= 2 * eps
    if fails := peft_fails(kind, dtype, use):
        error, message = fails
        with pytest.raises(error, match=message):
            found(peft_model(kind, DTYPES[dtype], values, **fields), use, x)
        return
    theirs = found(peft_model(kind, DTYPES[dtype], values, **fields), use, x)
    # PEFT's outputs of quantised layers are float32, whatever the base layer's dtype.
    assert theirs.dtype == (torch.float32 if kind in QUANTIZED and use == "single" else ours.dtype)
    assert distance(ours.double()) <= distance(theirs.double()) + eps
    assert distance(theirs.double()) <= distance(ours.double()) + eps
