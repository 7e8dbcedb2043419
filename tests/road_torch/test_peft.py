"""Against PEFT itself: its adapters give the same here, ours give the same there."""

import peft
import pytest
import torch
from _compare import assert_close
from _models import small_model

from road_torch import RoadConfig, RoadModel

IDS = torch.arange(3, 31).reshape(4, 7)
VARIANTS = ("road_1", "road_2", "road_4")


@torch.no_grad()
def logits(model, **kwargs):
    return model(IDS, **kwargs).logits


def peft_model(variant, group_size, targets="all-linear", *, dtype=torch.float32):
    torch.manual_seed(2)
    config = peft.RoadConfig(variant=variant, group_size=group_size, target_modules=targets, init_weights=False)
    model = peft.get_peft_model(small_model().to(dtype), config).eval()
    # Drawn with α ~ N(1, 0.5) three layers deep the logits are chaotic; half of that is far from the identity still.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "road_theta" in name:
                parameter.mul_(0.5)
            elif "road_alpha" in name:
                parameter.add_(1).mul_(0.5)
    return model


@pytest.mark.parametrize("group_size", [2, 8, 64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_peft_saved(variant, group_size, tmp_path):
    theirs = peft_model(variant, group_size)
    theirs.save_pretrained(tmp_path)
    ours = RoadModel.from_pretrained(small_model(), tmp_path, "a")
    base, expected = logits(small_model()), logits(theirs)
    assert_close(logits(ours), expected, "float32", moved_from=base)
    mixed = logits(ours, adapter_names=["a", "__base__", "a", "__base__"])
    assert_close(mixed[::2], expected[::2], "float32", moved_from=base[::2])
    assert torch.equal(mixed[1::2], base[1::2])
    assert_close(logits(ours.merge_and_unload()), logits(theirs.merge_and_unload()), "float32", moved_from=base)


@pytest.mark.parametrize("group_size", [2, 8, 64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_we_saved(variant, group_size, tmp_path):
    torch.manual_seed(2)
    config = RoadConfig(
        variant=variant, group_size=group_size, target_modules=["q_proj", "up_proj"], init_weights=False
    )
    ours = RoadModel(small_model(), config)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(small_model(), tmp_path).eval()
    assert_close(logits(theirs), logits(ours), "float32", moved_from=logits(small_model()))


def test_a_mixed_batch_is_peft_s(tmp_path):
    theirs = peft_model("road_2", 8, ["q_proj", "v_proj", "down_proj"])
    theirs.add_adapter("b", peft.RoadConfig(variant="road_4", group_size=32, target_modules=["q_proj", "gate_proj"]))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("road_theta.b"):
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = RoadModel.from_pretrained(small_model(), tmp_path, "a")
    ours.load_adapter(tmp_path / "b", "b")
    names = ["b", "default", "__base__", "b"]
    expected = logits(theirs, adapter_names=names)
    given = logits(ours, adapter_names=["a" if name == "default" else name for name in names])
    assert_close(given, expected, "float32", moved_from=logits(ours))


def test_greedy_text_is_peft_s(tmp_path):
    theirs = peft_model("road_1", 64)
    theirs.save_pretrained(tmp_path)
    ours = RoadModel.from_pretrained(small_model(), tmp_path, "a")
    kwargs = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = theirs.generate(input_ids=IDS, **kwargs)
    assert torch.equal(ours.generate(input_ids=IDS, **kwargs), expected)
    assert torch.equal(ours.generate(input_ids=IDS, adapter_names=["a"] * 4, **kwargs), expected)
    assert not torch.equal(small_model().generate(input_ids=IDS, **kwargs), expected)
