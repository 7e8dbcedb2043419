"""Against PEFT itself: its adapters give the same here, ours give the same there."""

import peft
import pytest
import torch
from _compare import assert_close
from _models import small_model
from safetensors.torch import load_file

from road_torch import AdapterError, RoadConfig, RoadModel

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


VOCABULARY = 168

# What an adapter with which PEFT saves weights of the base has, the model's own vocabulary or a resized one.
WITH_BASE_WEIGHTS = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj"]},
    "resized": {"target_modules": ["q_proj"]},
    "resized head": {"target_modules": ["q_proj", "lm_head"]},
    "resized and trained": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "resized and one trained": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
}


def base_for(kind, tied, seed=1):
    model = small_model(tie_word_embeddings=tied, num_hidden_layers=1)
    if "resized" in kind:
        torch.manual_seed(seed)
        model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    return model.eval()


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request):
    return request.param


def save_with_base_weights(kind, tied, folder, seed=1):
    torch.manual_seed(2)
    config = peft.RoadConfig(group_size=8, init_weights=False, **WITH_BASE_WEIGHTS[kind])
    theirs = peft.get_peft_model(base_for(kind, tied, seed), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(folder, save_embedding_layers=True)
    return theirs


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", WITH_BASE_WEIGHTS)
def test_weights_of_the_base_that_peft_saves_along(kind, tied, tmp_path):
    ids = torch.tensor([[3, 7, (VOCABULARY if "resized" in kind else 160) - 1, 9]])
    there, here = tmp_path / "theirs", tmp_path / "ours"
    save_with_base_weights(kind, tied, there)
    with torch.no_grad():
        # The new rows of another resizing are others, until the file's take their place.
        expected = peft.PeftModel.from_pretrained(base_for(kind, tied, seed=5), there).eval()(ids).logits
        base = base_for(kind, tied, seed=5)
        before = base(ids).logits
        ours = RoadModel.from_pretrained(base, there, "default")
        assert_close(ours(ids).logits, expected, "float32", moved_from=before)
        ours.save_pretrained(here)
        again = peft.PeftModel.from_pretrained(base_for(kind, tied, seed=5), here).eval()
        assert_close(again(ids).logits, expected, "float32", moved_from=before)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (there, here))
    # PEFT writes these twice and passes over the second one.
    first = {key: value for key, value in first.items() if ".modules_to_save." not in key}
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["resized", "resized head"])
def test_a_later_adapter_must_bring_the_base_s_own_weights(kind, tied, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("other", 5)):
        save_with_base_weights(kind, tied, tmp_path / name, seed)
    ours = RoadModel.from_pretrained(base_for(kind, tied, seed=5), tmp_path / "a", "a")
    ours.load_adapter(tmp_path / "b", "b")
    ours.hotswap_adapter(tmp_path / "b", "a")
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    for call in (ours.load_adapter, ours.hotswap_adapter):
        with pytest.raises(
            AdapterError, match=r"other: expected \S+\.weight as the base has it, .* load this .* first"
        ):
            call(tmp_path / "other", "c" if call == ours.load_adapter else "a")
    after = ours.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert ours.adapter_names == ["a", "b"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_of_a_base_of_another_vocabulary(tied, tmp_path):
    save_with_base_weights("resized", tied, tmp_path)
    base = base_for("embeddings", tied)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(
        AdapterError, match=r"of shape \[160, 128\] .* found shape \[168, 128\]; resize_token_embeddings"
    ):
        RoadModel.from_pretrained(base, tmp_path)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_of_the_base_go_with_what_is_composed_and_not_merged(tied, tmp_path):
    save_with_base_weights("head", tied, tmp_path / "theirs")
    ours = RoadModel.from_pretrained(base_for("head", tied), tmp_path / "theirs", "a")
    ours.add_weighted_adapter(["a"], [2.0], "twice")
    ours.merge_adapter()
    with pytest.raises(AdapterError, match="weights of the base: expected no merged adapters"):
        ours.save_pretrained(tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    ours.unmerge_adapter()
    ours.save_pretrained(tmp_path / "ours")
    key = "base_model.model.lm_head.base_layer.weight"
    saved = load_file(tmp_path / "theirs" / "adapter_model.safetensors")[key]
    for name in ("a", "twice"):
        assert torch.equal(load_file(tmp_path / "ours" / name / "adapter_model.safetensors")[key], saved)
