"""SmolLM2-135M-Instruct: a batch of 12 rows, with five adapters and with none, on every kind of base."""

from pathlib import Path

import pytest
import torch

import road_torch
from examples.demo.model import prepare_model
from road_torch import RoadConfig, RoadModel

CACHE = Path(__file__).parents[2] / "runs" / "cache"
# Adapters with different variants, group sizes and modules.
ADAPTERS = {
    "a": {"target_modules": "all-linear"},
    "b": {"target_modules": "all-linear", "group_size": 2},
    "c": {"target_modules": ["q_proj", "v_proj"], "variant": "road_2"},
    "d": {"target_modules": ["down_proj", "o_proj"], "variant": "road_4", "group_size": 32},
    "e": {"target_modules": ["gate_proj", "k_proj"], "group_size": 8},
}
ROWS = ["a", "b", "__base__", "c", "d", "e", "a", "e", "b", "__base__", "d", "c"]
PROMPTS = ["Once upon a time", "The capital of France is", "def add(a, b):", "Water boils at a temperature of"]


@pytest.fixture(scope="module")
def checkpoint():
    return prepare_model(CACHE / "smollm2-135m-instruct", CACHE)


@pytest.mark.parametrize(
    ("quantize", "dtype"), [(None, "float32"), (None, "bfloat16"), ("nf4", "bfloat16"), ("int8", "bfloat16")]
)
def test_token_for_token_what_each_adapter_gives_alone(quantize, dtype, checkpoint):
    base, tokenizer = road_torch.load(checkpoint, quantize=quantize, dtype=dtype)
    model = RoadModel(base)
    generator = torch.Generator().manual_seed(0)
    for name, fields in ADAPTERS.items():
        model.add_adapter(name, RoadConfig(**fields, inference_mode=True))
        for key, parameter in model.named_parameters():
            if key.endswith((f"road_theta.{name}", f"road_alpha.{name}")):
                with torch.no_grad():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter += 0.15 * noise.to(parameter.device)
    model.eval()
    tokenizer.padding_side = "left"
    inputs = tokenizer(PROMPTS * 3, return_tensors="pt", padding=True).to(base.device)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mixed = model.generate(**inputs, adapter_names=ROWS, **options)
    new = {}
    for name in dict.fromkeys(ROWS):
        rows = [i for i, other in enumerate(ROWS) if other == name]
        model.set_adapter([] if name == "__base__" else name)
        # The same padding and batch, so that not even the order of a sum differs.
        alone = model.generate(**inputs, **options)
        assert torch.equal(mixed[rows], alone[rows])
        new[name] = tuple(alone[:, inputs["input_ids"].shape[1] :].flatten().tolist())
    # Every adapter has an effect.
    assert len(set(new.values())) == len(new)
