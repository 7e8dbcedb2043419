"""Compatibility with PEFT: its adapters give the same results here, and ours give the same results there."""

import copy
import inspect
import re
import shutil
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
import transformers
from _compare import assert_close
from _models import small_config, small_model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file

from road_torch import AdapterError, RoadConfig, RoadLayer, RoadModel

TORCH_PAGE = (Path(__file__).parents[2] / "docs" / "torch.md").read_text(encoding="utf-8")
IDS = torch.arange(3, 31).reshape(4, 7)
VARIANTS = ("road_1", "road_2", "road_4")


@torch.no_grad()
def logits(model, **kwargs):
    return model(IDS, **kwargs).logits


def peft_model(variant, group_size, targets="all-linear", *, dtype=torch.float32):
    torch.manual_seed(2)
    config = peft.RoadConfig(variant=variant, group_size=group_size, target_modules=targets, init_weights=False)
    model = peft.get_peft_model(small_model().to(dtype), config).eval()
    # With α ~ N(1, 0.5), logits of three layers are chaotic; half the spread is still far from the identity.
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

# Configs of adapters with which PEFT saves base weights, for the model's own vocabulary or a resized one.
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
        # Another resizing gives other new rows, until the file's replace them.
        expected = peft.PeftModel.from_pretrained(base_for(kind, tied, seed=5), there).eval()(ids).logits
        base = base_for(kind, tied, seed=5)
        before = base(ids).logits
        ours = RoadModel.from_pretrained(base, there, "default")
        assert_close(ours(ids).logits, expected, "float32", moved_from=before)
        ours.save_pretrained(here)
        again = peft.PeftModel.from_pretrained(base_for(kind, tied, seed=5), here).eval()
        assert_close(again(ids).logits, expected, "float32", moved_from=before)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (there, here))
    # PEFT writes these twice and ignores the second copy on loading.
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


PEFT_CALLS = {
    "from_pretrained": peft.PeftModel.from_pretrained,
    "hotswap_adapter": hotswap_adapter,
    **{
        name: getattr(peft.PeftModel, name)
        for name in (
            "add_adapter",
            "load_adapter",
            "delete_adapter",
            "disable_adapter",
            "save_pretrained",
            "set_adapter",
        )
    },
    **{
        name: getattr(BaseTuner, name)
        for name in (
            "merge_adapter",
            "unmerge_adapter",
            "merge_and_unload",
            "unload",
            "disable_adapter_layers",
            "enable_adapter_layers",
        )
    },
}


@pytest.mark.parametrize("name", PEFT_CALLS)
def test_arguments_have_peft_s_names_and_places(name):
    theirs = [p for p in inspect.signature(PEFT_CALLS[name]).parameters if p != "self"]
    ours = inspect.signature(getattr(RoadModel, name)).parameters.values()
    places = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    theirs = [p for p in theirs if not (name == "hotswap_adapter" and p == "model")]
    assert places == theirs[: len(places)]


def test_calls_as_to_peft(tmp_path):
    model = RoadModel(small_model(), config=RoadConfig(target_modules=["q_proj"], group_size=8))
    model.add_adapter(adapter_name="b", peft_config=RoadConfig(target_modules=["v_proj"], group_size=8))
    assert list(model.peft_config) == ["default", "b"]
    model.set_adapter(adapter_name="b")
    assert model.active_adapter == "b"
    assert model.get_nb_trainable_parameters()[0] > 0
    model.set_adapter("b", inference_mode=True)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.save_pretrained(
        save_directory=tmp_path / "saved", safe_serialization=True, selected_adapters=["default", "b"]
    )
    model.save_pretrained(tmp_path / "not here", is_main_process=False)
    assert not (tmp_path / "not here").exists()
    model.load_adapter(model_id=tmp_path / "saved", adapter_name="c", is_trainable=True)
    assert not model.peft_config["c"].inference_mode
    model.merge_adapter("default")
    assert model.merged_adapters == ["default"]
    model.unmerge_adapter()
    assert not any("road" in name for name, _ in model.merge_and_unload(True, True, ["b", "c"]).named_parameters())


@pytest.mark.parametrize("revision", [None, "next", "refs/pr/1"])
def test_adapters_are_pushed_to_the_hub_without_the_base(revision, tmp_path):
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, repo_id, **options):
            calls.append((repo_id, options))
            return mock.Mock(repo_id=f"me/{repo_id}")

        def create_branch(self, repo_id, *, branch, exist_ok):
            calls.append((repo_id, branch, exist_ok))

        def upload_folder(self, *, folder_path, **options):
            shutil.copytree(folder_path, tmp_path / "hub")
            calls.append(options)
            return "commit"

    model = RoadModel(small_model(), RoadConfig(target_modules=["q_proj"], group_size=8, init_weights=False))
    model.add_adapter("b", RoadConfig(target_modules=["v_proj"], group_size=8))
    with mock.patch("huggingface_hub.HfApi", Api):
        assert model.push_to_hub("road", private=True, token="secret", revision=revision, create_pr=True) == "commit"
        with pytest.raises(AdapterError, match="at least one adapter"):
            RoadModel(small_model()).push_to_hub("road")
    branches = [("me/road", "next", True)] if revision == "next" else []
    options = {"repo_id": "me/road", "commit_message": "Upload adapters", "revision": revision, "create_pr": True}
    assert calls == ["secret", ("road", {"private": True, "exist_ok": True}), *branches, options, None]
    files = {str(path.relative_to(tmp_path / "hub")) for path in (tmp_path / "hub").rglob("*") if path.is_file()}
    assert files == {f"{place}adapter_{end}" for place in ("", "b/") for end in ("config.json", "model.safetensors")}
    again = RoadModel.from_pretrained(small_model(), tmp_path / "hub")
    assert_close(logits(again), logits(model), "float32", moved_from=logits(small_model()))


def test_disable_adapter_layers_is_peft_s(tmp_path):
    theirs = peft_model("road_1", 8)
    theirs.save_pretrained(tmp_path)
    ours = RoadModel.from_pretrained(small_model(), tmp_path)
    adapted, base = logits(ours), logits(small_model())
    ours.merge_adapter()
    for model in (ours, theirs):
        model.disable_adapter_layers()
        assert torch.equal(logits(model), base)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), base)
    assert torch.equal(logits(ours), base)
    ours.enable_adapter_layers()
    theirs.enable_adapter_layers()
    assert ours.merged_adapters == ["default"]
    assert_close(logits(ours), adapted, "float32")
    assert_close(logits(ours), logits(theirs), "float32", moved_from=base)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_leaves_the_mode_that_peft_leaves(is_trainable, tmp_path):
    config = peft.RoadConfig(target_modules=["q_proj"], group_size=8)
    peft.get_peft_model(small_model(), config).save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(small_model().train(), tmp_path, is_trainable=is_trainable)
    ours = RoadModel.from_pretrained(small_model().train(), tmp_path, is_trainable=is_trainable)
    for model in (theirs, ours):
        assert model.training is model.get_base_model().training is is_trainable
    ours.train()
    ours.load_adapter(tmp_path, "b", is_trainable)
    assert ours.training is is_trainable


def test_generation_config_is_used_as_by_peft():
    fields = {"target_modules": ["q_proj"], "group_size": 8, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(small_model(), peft.RoadConfig(**fields)).eval()
    ours = RoadModel(small_model(), RoadConfig(**fields)).eval()
    for model in (ours, theirs):
        model.generation_config = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS)).shape[1] == IDS.shape[1] + 3


def adapter_trainer():
    """Returns the class AdapterTrainer from docs/torch.md."""
    (block,) = re.findall(r"^```python\n(class AdapterTrainer.*?)^```", TORCH_PAGE, re.MULTILINE | re.DOTALL)
    names = {"transformers": transformers}
    exec(block, names)
    return names["AdapterTrainer"]


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_a_trainer_ends_with_its_best_adapter(task, tmp_path):
    def base():
        if task == "CAUSAL_LM":
            return small_model(tie_word_embeddings=True)
        torch.manual_seed(0)
        return transformers.LlamaForSequenceClassification(small_config(num_labels=3, pad_token_id=0)).eval()

    model = RoadModel(base(), RoadConfig(target_modules=["q_proj"], group_size=8, task_type=task))
    rows = [{"input_ids": row, "labels": row if task == "CAUSAL_LM" else i % 3} for i, row in enumerate(IDS)]
    arguments = transformers.TrainingArguments(
        tmp_path / "run",
        max_steps=3,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        learning_rate=0.05,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    scores = iter((1.0, 3.0, 2.0))
    trainer = adapter_trainer()(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda _predictions: {"score": next(scores)},
    )
    trainer.train()
    best = RoadModel.from_pretrained(base(), tmp_path / "run" / "checkpoint-2")
    last = RoadModel.from_pretrained(base(), tmp_path / "run" / "checkpoint-3")
    assert_close(logits(model.eval()), logits(best.eval()), "float32", moved_from=logits(last.eval()))


@pytest.mark.parametrize("kind", ["float", "nf4"])
def test_a_trainer_trains_evaluates_and_saves(kind, tmp_path):
    small_model().save_pretrained(tmp_path / "base")

    def base():
        nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        options = {"quantization_config": nf4} if kind == "nf4" else {}
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)

    model = RoadModel(base(), RoadConfig(target_modules=["q_proj", "up_proj"], group_size=8))
    frozen = {name: value.clone() for name, value in model.state_dict().items() if "road_" not in name}
    rows = [{"input_ids": row, "labels": row, "of no use": 0} for row in IDS]
    arguments = transformers.TrainingArguments(
        tmp_path / "run",
        max_steps=4,
        save_steps=4,
        learning_rate=0.05,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = adapter_trainer()(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    # In evaluation mode bitsandbytes may repack a 4-bit weight, and then it gives no gradients.
    start = model.train()(IDS, labels=IDS).loss.item()
    trainer.train()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in frozen.items())
    found = trainer.evaluate()["eval_loss"]
    expected = logits(model.eval())
    assert found < start - 0.01
    assert abs(found - model.loss_function(expected, IDS, vocab_size=expected.shape[-1]).item()) < 1e-4
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in checkpoint.iterdir()}
    assert not list((tmp_path / "run").rglob("model*"))
    theirs = peft.PeftModel.from_pretrained(base(), checkpoint).eval()
    assert_close(logits(theirs), expected, "float32", moved_from=logits(base().eval()))


def test_a_trainer_in_mixed_precision_can_be_made_anew_and_its_model_copied(tmp_path):
    model = RoadModel(small_model(), RoadConfig(target_modules=["q_proj"], group_size=8))
    rows = [{"input_ids": row, "labels": row, "of no use": 0} for row in IDS]
    for _ in range(2):
        arguments = transformers.TrainingArguments(
            tmp_path, max_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, bf16=True
        )
        transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    other = copy.deepcopy(model)
    before = logits(model)
    with torch.no_grad():
        for layer in [module for module in other.modules() if isinstance(module, RoadLayer)]:
            layer.road_theta["default"].add_(1)
    assert not torch.equal(logits(other), before)
    assert torch.equal(logits(model), before)
