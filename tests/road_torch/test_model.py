"""RoadModel's public methods: what each call does, and that a refused call changes nothing."""

import contextlib
import copy
import dataclasses
import gc
import inspect
import io
import pickle
import threading
import weakref
from unittest import mock

import accelerate
import peft
import pytest
import torch
import transformers
from _compare import assert_close
from _models import small_config, small_model
from torch import nn
from transformers.models.layoutlmv2 import modeling_layoutlmv2
from transformers.models.mask2former import modeling_mask2former
from transformers.models.maskformer import modeling_maskformer
from transformers.models.pp_doclayout_v2 import modeling_pp_doclayout_v2

from road_core import Adapter, read_peft, write_peft
from road_torch import AdapterError, RoadConfig, RoadLayer, RoadModel, _base, _merge
from road_torch._bank import Bank

IDS = torch.arange(3, 31).reshape(4, 7)


def config(**changes):
    fields = {"target_modules": "all-linear", "group_size": 8, "init_weights": False, "inference_mode": True}
    return RoadConfig(**{**fields, **changes})


def with_adapters(names="ab", base=None, **changes):
    model = RoadModel(small_model() if base is None else base)
    torch.manual_seed(1)
    for name in names:
        model.add_adapter(name, config(**changes))
    return model


@torch.no_grad()
def logits(model, **kwargs):
    return model(IDS, **kwargs).logits


def state(model):
    """Returns everything that a refused call must not change."""
    return (
        {name: (id(module), type(module), module.training) for name, module in model.named_modules()},
        {name: (id(p), p._version, p.requires_grad, p.clone()) for name, p in model.named_parameters()},
        shared(model) if isinstance(model, RoadModel) else None,
    )


def shared(model):
    fields = ("active", "off", "merged", "configs", "rows", "calls")
    return {field: copy.copy(getattr(model._shared, field)) for field in fields}, id(model._shared.plain)


def assert_same(before, after):
    assert before[0] == after[0]
    assert before[2] == after[2]
    assert before[1].keys() == after[1].keys()
    for name, (*facts, value) in before[1].items():
        assert facts == list(after[1][name][:3]), name
        assert torch.equal(value, after[1][name][3]), name


def saved(tmp_path, name="saved", **changes):
    """Saves an adapter for `small_model` and returns its folder."""
    folder = tmp_path / name
    with_adapters(["default"], **changes).save_pretrained(folder)
    return folder


def test_a_new_adapter_is_the_identity_and_trainable():
    base = small_model()
    expected = logits(base)
    model = RoadModel(base, RoadConfig(target_modules=["q_proj"], group_size=8))
    assert torch.equal(logits(model), expected)
    assert model.active_adapter == "default"
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 6
    assert all("q_proj.road_" in name for name in trainable)


def test_plain_calls_follow_set_adapter():
    model = with_adapters("abc")
    base = logits(small_model())
    by_name = {}
    for name in "abc":
        model.set_adapter(name)
        assert model.active_adapters == [name]
        by_name[name] = logits(model)
        assert_close(by_name[name], by_name[name], "float32", moved_from=base)
    assert not torch.allclose(by_name["a"], by_name["b"], atol=1e-2)
    mixed = logits(model, adapter_names=["c", "__base__", "a", "b"])
    for row, name in enumerate(["c", None, "a", "b"]):
        torch.testing.assert_close(mixed[row], by_name[name][row] if name else base[row], rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), by_name["c"])
    model.set_adapter([])
    assert torch.equal(logits(model), base)


def test_disable_adapter_nests_and_ends_with_an_exception():
    model = with_adapters()
    base, adapted = logits(small_model()), logits(model)

    def failing():
        with model.disable_adapter(), model.disable_adapter():
            assert torch.equal(logits(model), base)
            assert torch.equal(logits(model, adapter_names=list("abab")), base)
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        failing()
    assert torch.equal(logits(model), adapted)


def test_delete_adapter_unwraps_layers_and_frees_its_row():
    model = with_adapters("a", target_modules=["q_proj"])
    model.add_adapter("b", config(target_modules=["q_proj", "v_proj"]))
    alone = logits(model, adapter_names=["a"] * 4)
    model.delete_adapter("b")
    assert model.adapter_names == ["a"]
    assert sum(isinstance(m, RoadLayer) for m in model.modules()) == 3
    model.add_adapter("c", config(target_modules=["v_proj"]))
    assert torch.equal(logits(model, adapter_names=["a"] * 4), alone)
    c = logits(model, adapter_names=["c"] * 4)
    assert not torch.allclose(c, alone, atol=1e-2)
    logits(model)
    left = {m for m in model.modules() if isinstance(m, RoadLayer)}
    assert set(model._shared.plain.plans) <= left
    assert torch.equal(logits(model), alone)


def test_unload_gives_the_base_back():
    base = small_model()
    modules, expected = dict(base.named_modules()), logits(base)
    model = RoadModel(base, config())
    assert not torch.allclose(logits(model), expected, atol=1e-2)
    assert model.unload() is base
    assert dict(base.named_modules()) == modules
    assert torch.equal(logits(base), expected)


def test_merge_and_unload_leaves_a_plain_model(tmp_path):
    model = with_adapters()
    expected = logits(model)
    base = model.merge_and_unload()
    assert not any(isinstance(m, RoadLayer) for m in base.modules())
    assert_close(logits(base), expected, "float32", moved_from=logits(small_model()))
    base.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    torch.testing.assert_close(logits(again), logits(base))


def test_a_tied_head_is_merged_without_its_embedding(tmp_path):
    base = small_model(tie_word_embeddings=True)
    embedding = base.model.embed_tokens.weight.clone()
    model = RoadModel(base, config(target_modules=["lm_head"]))
    expected = logits(model)
    model.merge_adapter()
    assert torch.equal(base.model.embed_tokens.weight, embedding)
    assert_close(logits(model), expected, "float32")
    model.unmerge_adapter()
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    torch.testing.assert_close(logits(again), logits(merged))
    torch.testing.assert_close(again.model.embed_tokens.weight, embedding)


def encoder_decoder(kind="bart"):
    """Returns a random encoder-decoder with tied embeddings and head; UMT5 scales the head's input if they are tied."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 32, "decoder_start_token_id": 2}
    if kind == "umt5":
        config = transformers.UMT5Config(
            **sizes, d_kv=16, d_ff=64, num_layers=1, num_heads=2, tie_word_embeddings=True, pad_token_id=0
        )
        base = transformers.UMT5ForConditionalGeneration(config)
    else:
        ends = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in BART.items()}
        base = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **ends))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return base.eval()


BART = {"layers": 1, "attention_heads": 2, "ffn_dim": 64}
LISTED = ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("kind", "changes", "tied"),
    [
        ("bart", {"target_modules": ["q_proj", "lm_head"]}, LISTED),
        ("bart", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, LISTED),
        ("bart", {"target_modules": ["q_proj"], "modules_to_save": ["encoder.embed_tokens"]}, LISTED[:1]),
        ("umt5", {"target_modules": ["q", "lm_head"]}, LISTED),
    ],
)
def test_the_rest_of_tied_weights_stays_tied_when_one_is_merged_for_good(kind, changes, tied, tmp_path):
    base = encoder_decoder(kind)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
    with torch.no_grad():
        before = base(**inputs).logits
        model = with_adapters("a", base, **changes).eval()
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        expected = model(**inputs).logits
        merged = model.merge_and_unload()
        assert_close(merged(**inputs).logits, expected, "float32", moved_from=before)
        merged.save_pretrained(tmp_path / "merged")
        again = type(merged).from_pretrained(tmp_path / "merged")
        assert_close(again(**inputs).logits, expected, "float32")
    for one in (merged, again):
        ends = [end for name, end in one.named_parameters(remove_duplicate=False) if name.endswith(tuple(tied))]
        assert len(ends) == len(tied)
        assert all(end is one.get_input_embeddings().weight for end in ends)
    # Resizing ties weights again, but the head keeps its merged weight.
    head = merged.lm_head.weight.clone()
    merged.resize_token_embeddings(100)
    assert torch.equal(merged.lm_head.weight[:96], head)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"target_modules": ["lm_head", "q_proj"]}, "lm_head"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, r"model\.embed_tokens"),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_that_adapters_have_are_not_resized(tied, changes, found):
    model = with_adapters("a", small_model(tie_word_embeddings=tied), **changes)
    before = state(model)
    with pytest.raises(AdapterError, match=rf"resize_token_embeddings: .* no adapter has, found {found} with one;"):
        model.resize_token_embeddings(176)
    model.tie_weights()
    assert_same(before, state(model))
    assert model.config.vocab_size == 160
    assert model.resize_token_embeddings().num_embeddings == 160
    model.merge_adapter()
    if tied and found == "lm_head":
        with pytest.raises(AdapterError, match=r"tie_weights: expected weights that are tied .*, found lm_head with"):
            model.tie_weights()


def test_embeddings_beside_adapters_are_resized():
    model = with_adapters("a", small_model(tie_word_embeddings=True), target_modules=["q_proj"])
    before = logits(model)
    model.resize_token_embeddings(176)
    assert model.config.vocab_size == 176
    assert model.base_model.lm_head.weight is model.base_model.model.embed_tokens.weight
    assert_close(logits(model)[..., :160], before, "float32")
    assert RoadModel(nn.Sequential(nn.Linear(8, 8))).tie_weights() is None


def test_targets_that_lost_what_they_were_tied_to(tmp_path):
    fields = {"langs": ["de", "en"], "src_vocab_size": 96, "tgt_vocab_size": 96, "d_model": 32}
    ends = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in BART.items()}
    torch.manual_seed(0)
    base = transformers.FSMTForConditionalGeneration(
        transformers.FSMTConfig(**fields, **ends, tie_word_embeddings=True)
    ).eval()
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
    model = with_adapters("a", base, target_modules=["q_proj"], modules_to_save=["decoder.embed_tokens"]).eval()
    with torch.no_grad():
        copy_ = base.model.decoder.embed_tokens.modules_to_save["a"].weight
        copy_.add_(torch.randn_like(copy_))
        expected = model(**inputs).logits
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        again = type(base).from_pretrained(tmp_path / "merged")
        assert_close(again(**inputs).logits, expected, "float32")


def test_save_and_load(tmp_path):
    model = with_adapters(["default", "other"], variant="road_4")
    model.save_pretrained(tmp_path / "both")
    again = RoadModel.from_pretrained(small_model(), tmp_path / "both", "x")
    again.load_adapter(tmp_path / "both" / "other", "y")
    assert again.active_adapter == "x"
    assert not any(p.requires_grad for p in again.parameters())
    names = ["default", "other", "__base__", "default"]
    new = {"default": "x", "other": "y"}
    expected = logits(model, adapter_names=names)
    assert torch.equal(logits(again, adapter_names=[new.get(n, n) for n in names]), expected)
    with pytest.raises(AdapterError, match="already holds something"):
        model.save_pretrained(tmp_path / "both")
    model.save_pretrained(tmp_path / "both", selected_adapters=["other"], overwrite=True)
    trainable = RoadModel.from_pretrained(small_model(), tmp_path / "both", is_trainable=True)
    assert sum(p.requires_grad for p in trainable.parameters()) == 2 * 7 * 3


@pytest.mark.parametrize("where", ["the current folder", "a link", "an empty folder"])
def test_saving_into_a_folder_that_is_there(where, tmp_path, monkeypatch):
    model, folder = with_adapters(["default"]), tmp_path / "there"
    folder.mkdir()
    inode = folder.stat().st_ino
    if where == "a link":
        (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder if where == "the current folder" else tmp_path)
    model.save_pretrained({"the current folder": ".", "a link": tmp_path / "link"}.get(where, folder))
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert (folder.stat().st_ino == inode) is (where == "the current folder")
    assert torch.equal(logits(RoadModel.from_pretrained(small_model(), folder)), logits(model))


@pytest.mark.parametrize(
    "choice",
    [
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
    ],
)
def test_peft_gets_the_modules_that_were_chosen(choice, tmp_path, recwarn):
    """PEFT's RoAd ignores exclude_modules and layers_to_transform, and would adapt more modules."""
    model = with_adapters(["default"], **choice)
    model.save_pretrained(tmp_path / "saved")
    theirs = peft.PeftModel.from_pretrained(small_model(), tmp_path / "saved").eval()
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    assert_close(logits(theirs), logits(model), "float32", moved_from=logits(small_model()))
    again = RoadModel.from_pretrained(small_model(), tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    found = again.peft_config["default"]
    assert {name: getattr(found, name) for name in choice} == choice


def test_no_rows_and_rows_that_another_input_has():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, mask, x):
            return self.proj(x) * mask

    model = RoadModel(Masked(), config(target_modules=["proj"]), "a")
    mask, x = torch.rand(5, 1), torch.randn(3, 5, 8)
    assert torch.equal(model(mask=mask, x=x, adapter_names=["a"] * 3), model(mask=mask, x=x))
    with pytest.raises(AdapterError, match="for each of 5 rows, found 4"):
        model(mask=mask, x=x, adapter_names=["a"] * 4)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert model(mask[:0], x[:0, :0], adapter_names=[]).shape == (0, 0, 8)


@pytest.mark.parametrize("way", ["moved", "made there", "empty weights"])
def test_a_model_on_the_meta_device(way):
    model = with_adapters(["default"])
    expected, values = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    context = {"made there": torch.device("meta"), "empty weights": accelerate.init_empty_weights()}
    if way == "moved":
        model.to("meta")
    else:
        with context[way]:
            model = with_adapters(["default"])
    ids = IDS.to("meta")
    if way != "empty weights":  # which leaves rotary frequencies on the CPU
        assert model(ids).logits.is_meta
        assert model(ids, adapter_names=["default", "__base__"] * 2).logits.shape == (4, 7, 160)
    model.load_state_dict(values, assign=True)
    if way != "empty weights":
        model.base_model.model.rotary_emb = small_model().model.rotary_emb
    model.eval()
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model, adapter_names=["default"] * 4), expected)


def test_the_base_is_exported_with_its_adapters():
    model = with_adapters(["a"], nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))
    x = torch.randn(3, 8)
    exported = torch.export.export(model.get_base_model(), (x,)).module()
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    with torch.no_grad():
        assert_close(exported(x), model(x), "float32", moved_from=base)


@torch.no_grad()
@pytest.mark.parametrize("names", [None, ["a", "b", "__base__"]])
def test_a_model_is_exported_with_the_adapters_of_its_rows(tmp_path, names):
    model = with_adapters(base=small_model(num_hidden_layers=1))
    model.set_adapter(["a", "b"])
    given = {} if names is None else {"adapter_names": names}
    inputs = {"input_ids": IDS[:3], "use_cache": False, **given}
    sizes = {
        "input_ids": {1: torch.export.Dim.AUTO},
        "use_cache": None,
        **{key: [None] * 3 for key in given},
    }
    exported = torch.export.export(model, (), inputs, dynamic_shapes=sizes)
    torch.export.save(exported, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for ids in (IDS[:3], IDS[1:4, :4]):
        expected, base = model(ids, **given).logits, model(ids, adapter_names=["__base__"] * 3).logits
        assert_close(again(**{**inputs, "input_ids": ids}).logits, expected, "float32", moved_from=base)
    assert not model._shared.traced


def test_what_cannot_be_exported_says_so():
    model = RoadModel(nn.Sequential(nn.Linear(8, 8)), max_loaded=1)
    for name in "ab":
        model.add_adapter(name, RoadConfig(target_modules=["0"], group_size=4, inference_mode=True))
    for names, found in ((["a+b", "a"], "one adapter a row .* found .*add_weighted"), (["b", "a"], "found 'b', which")):
        with pytest.raises(AdapterError, match=found):
            torch.export.export(model, (torch.randn(2, 8),), {"adapter_names": names})
    model.set_adapter([])
    model(torch.randn(1, 8), adapter_names=["b"])
    torch.export.export(model, (torch.randn(2, 8),), {"adapter_names": ["b", "__base__"]})


def test_counting_parameters(capsys):
    model = RoadModel(small_model(), RoadConfig(target_modules=["q_proj", "v_proj"], group_size=8))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 3 * (128 + 64)
    assert total == sum(p.numel() for p in small_model().parameters()) + trainable
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: 576 || all params: {total:,} || trainable%: {57600 / total:.4f}\n"
    )


def test_a_model_can_be_copied_and_pickled_state_loaded():
    model = with_adapters()
    twin = copy.deepcopy(model)
    twin.set_adapter("b")
    assert model.active_adapter == "a"
    assert torch.equal(logits(twin), logits(model, adapter_names=["b"] * 4))
    model.load_state_dict(twin.state_dict())


@torch.no_grad()
def test_a_copy_sees_what_is_written_to_it():
    """Four writes give a parameter of the copy the same version as four writes gave the original's."""
    model = with_adapters("a")

    def write(written):
        for name, parameter in written.named_parameters():
            for _ in range(4 if ".road_" in name else 0):
                parameter.add_(0.1)

    write(model)
    before = logits(model)
    logits(model, adapter_names=["a"] * 4)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), before)
    twin = copy.deepcopy(model)
    write(twin)
    fresh = with_adapters("a")
    fresh.load_state_dict(twin.state_dict())
    assert torch.equal(logits(twin), logits(fresh))
    assert torch.equal(logits(twin, adapter_names=["a"] * 4), logits(fresh))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("way", ["copied", "pickled"])
def test_a_copy_while_merged_has_its_own_weights(way):
    model = with_adapters()
    expected = logits(model)
    model.merge_adapter()
    merged = logits(model)
    if way == "copied":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(logits(twin), merged)
    twin.unmerge_adapter()
    assert torch.equal(logits(twin), expected)
    with twin.disable_adapter():
        assert torch.equal(logits(twin), logits(small_model()))
    assert model.merged_adapters == ["a"]
    assert torch.equal(logits(model), merged)


def test_what_unmerging_puts_back_is_cast_with_the_model():
    model = with_adapters(base=small_model(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
    twin = copy.deepcopy(model).to(torch.bfloat16)
    model.merge_adapter()
    model.to(torch.bfloat16)
    merged = logits(model)
    assert merged.dtype == torch.bfloat16
    with model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(logits(model), logits(twin))
    model.unmerge_adapter()
    assert model.base_model.lm_head.base_layer.weight is model.base_model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(twin))


@pytest.mark.parametrize("refused", ["no weight", "float8", "weight norm", "bias"])
def test_a_base_that_can_not_be_merged(refused):
    base = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    last = base[1]
    if refused == "no weight":
        last.register_buffer("codes", last.weight.detach().clone())
        del last.weight
        last.forward = lambda x: x @ last.codes.T + last.bias
    elif refused == "float8":
        last.weight = nn.Parameter(last.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        last.forward = lambda x: x @ last.weight.float().T + last.bias
    elif refused == "weight norm":
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(last)
    else:
        del last.bias
        last.bias = True
        last.forward = lambda x: x @ last.weight.T
    model, x = RoadModel(base, config()).eval(), torch.randn(3, 8)
    expected, before = model(x), state(model)
    kind = "bias" if refused == "bias" else "weight"
    for merge in (model.merge_adapter, model.merge_and_unload):
        for safe in (True, False):
            with pytest.raises(AdapterError, match=rf"^1: expected a .*{kind} to merge into.*, found Linear with"):
                merge(safe_merge=safe)
            assert_same(before, state(model))
    assert torch.equal(model(x), expected)


def test_disable_adapter_merges_again_as_before():
    model = with_adapters(target_modules=["q_proj"])
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, RoadLayer)).road_alpha["a"].fill_(float("nan"))
    with pytest.raises(AdapterError, match="expected finite values after merging"):
        model.merge_adapter()
    model.merge_adapter(safe_merge=False)
    with model.disable_adapter():
        assert torch.isfinite(logits(model)).all()
    assert model.merged_adapters == ["a"]


def test_layers_that_are_enabled_again_are_merged_again():
    model = with_adapters()
    model.merge_adapter("b", keep_weights=False)
    merged = logits(model)
    model.disable_adapter_layers()
    with model.disable_adapter():
        assert_close(logits(model), logits(small_model()), "float32", moved_from=merged)
    assert model.merged_adapters == []
    before = state(model)
    for call, message in {
        lambda: model.merge_adapter("a"): "merge_adapter: expected adapters that are enabled, found them disabled",
        model.merge_and_unload: "expected adapters that are enabled",
        lambda: model.delete_adapter("b"): "not merged, found 'b', which is merged again when adapters are enabled",
    }.items():
        with pytest.raises(AdapterError, match=message):
            call()
    assert_same(before, state(model))
    model.enable_adapter_layers()
    assert model.merged_adapters == ["b"]
    assert_close(logits(model), merged, "float32")
    model.unmerge_adapter()
    with model.disable_adapter():
        model.delete_adapter("b")
    assert model.merged_adapters == []


@torch.no_grad()
def test_adapters_that_can_not_be_merged_again_wait_until_they_can():
    model, base = with_adapters(), logits(small_model())
    model.merge_adapter(["b"], keep_weights=False)
    merged = logits(model)
    alpha = next(m for m in model.modules() if isinstance(m, RoadLayer)).road_alpha["b"]
    kept = alpha.clone()
    with pytest.raises(AdapterError, match="2x2 blocks that have an inverse"), model.disable_adapter():
        alpha.fill_(float("nan"))
    for call in (model.enable_adapter_layers, model.enable_adapter_layers):
        assert model.merged_adapters == []
        assert_close(logits(model), base, "float32", moved_from=merged)
        with pytest.raises(AdapterError, match="2x2 blocks that have an inverse"):
            call()
    alpha.copy_(kept)
    model.enable_adapter_layers()
    assert model.merged_adapters == ["b"]
    assert_close(logits(model), merged, "float32", moved_from=base)


def test_a_merge_within_disabled_adapters_ends_with_them():
    model = with_adapters()
    with model.disable_adapter(), model.disable_adapter():
        model.enable_adapter_layers()
        model.merge_adapter("b")
    assert model.merged_adapters == ["b"]


def test_merge_and_unload_keeps_no_second_set_of_weights():
    model = with_adapters("a")
    old = [weakref.ref(m.base_layer.weight) for m in model.modules() if isinstance(m, RoadLayer)]
    alive = []
    merge = _merge.merge

    def spy(*args, **kwargs):
        error = merge(*args, **kwargs)
        alive.append(sum(layer.unmerged is not None for layer in model.modules() if isinstance(layer, RoadLayer)))
        return error

    with mock.patch.object(_merge, "merge", spy):
        model.merge_and_unload()
    assert max(alive) == 1
    assert [ref() for ref in old] == [None] * len(old)


@pytest.mark.parametrize("names", [None, ["a"]])
def test_merging_for_good_that_is_interrupted_rotates_nothing_twice(names):
    model = with_adapters("a")
    expected, base = logits(model), logits(small_model())
    calls, count = [], sum(isinstance(module, RoadLayer) for module in model.modules())
    merge = _merge.merge

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == count + 5:
            raise KeyboardInterrupt
        return merge(*args, **kwargs)

    with mock.patch.object(_merge, "merge", interrupted), pytest.raises(KeyboardInterrupt):
        model.merge_and_unload(adapter_names=names)
    assert_close(logits(model), expected, "float32", moved_from=base)
    assert_close(logits(model.merge_and_unload(adapter_names=names)), expected, "float32", moved_from=base)


def test_no_old_weight_is_alive_and_several_adapters_come_back():
    model = with_adapters("a")
    torch.manual_seed(2)
    model.add_adapter("b", config(group_size=4, variant="road_2"))
    model.set_adapter(["a", "b"])
    expected = logits(model)
    old = [weakref.ref(m.base_layer.weight) for m in model.modules() if isinstance(m, RoadLayer)]
    model.merge_adapter(keep_weights=False)
    gc.collect()
    assert [ref() for ref in old] == [None] * len(old)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert model.active_adapters == ["a", "b"]
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(small_model()), rtol=1e-3, atol=1e-3)


def test_a_copy_a_cast_and_a_pause_while_merged():
    model = with_adapters("a")
    expected, base = logits(model), logits(small_model())
    model.merge_adapter(keep_weights=False)
    twin = copy.deepcopy(model).double()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-4)
    assert model.merged_adapters == ["a"]
    assert all(isinstance(m.unmerged, _merge.Inverse) for m in model.modules() if isinstance(m, RoadLayer))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    twin.unmerge_adapter()
    torch.testing.assert_close(logits(twin).float(), expected, rtol=1e-4, atol=1e-4)
    twin.unload()
    torch.testing.assert_close(logits(twin).float(), base, rtol=1e-4, atol=1e-4)


def test_a_tied_weight_stays_tied():
    model = with_adapters("a", base=small_model(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
    embedding = model.base_model.model.embed_tokens.weight
    model.merge_adapter(keep_weights=False)
    assert model.base_model.lm_head.base_layer.weight is not embedding
    model.unmerge_adapter()
    assert model.base_model.lm_head.base_layer.weight is embedding


def test_a_block_without_inverse_is_refused_with_its_layer():
    model = with_adapters("a", variant="road_2")
    *_, last = (m for m in model.modules() if isinstance(m, RoadLayer))
    with torch.no_grad():
        # The two elements of the first pair in a group of 8.
        last.road_alpha["a"][0] = last.road_alpha["a"][4] = 0.0
    expected, before = logits(model), state(model)
    with pytest.raises(AdapterError, match=rf"^{last.module_path}: expected 2x2 blocks .* inverse .*, found 1 without"):
        model.merge_adapter(keep_weights=False)
    assert_same(before, state(model))
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("nearly singular", torch.float32),
        ("nearly singular", torch.bfloat16),
        ("too small", torch.float16),
        ("too large", torch.float16),
    ],
)
def test_a_merge_without_a_way_back_is_refused(case, dtype):
    model = with_adapters("a", base=small_model().to(dtype), variant="road_2")
    *others, last = (m for m in model.modules() if isinstance(m, RoadLayer))
    with torch.no_grad():
        for layer in others:
            layer.road_theta["a"].clamp_(-0.3, 0.3)
            layer.road_alpha["a"].clamp_(0.8, 1.25)
        theta, alpha = last.road_theta["a"], last.road_alpha["a"]
        if case == "nearly singular":
            # The determinant is 0 except for the rounding of π/2.
            theta[0], theta[4], alpha[0], alpha[4] = torch.pi / 2, 0.0, 1.0, 1.0
        else:
            theta.zero_()
            alpha.fill_(1e-8 if case == "too small" else 1e6)
    before = state(model)
    with pytest.raises(AdapterError, match=rf"^{last.module_path}: expected a merged weight .* found \d+ of \d+ rows"):
        model.merge_adapter(safe_merge=False, keep_weights=False)
    assert_same(before, state(model))


def test_unmerging_that_fails_leaves_all_merged():
    model = with_adapters("a")
    model.merge_adapter(keep_weights=False)
    expected, calls, rotate = logits(model), [], _merge._rotate

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return rotate(*args, **kwargs)

    with mock.patch.object(_merge, "_rotate", failing), pytest.raises(RuntimeError, match="out of memory"):
        model.unmerge_adapter()
    assert model.merged_adapters == ["a"]
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [True, False])
def test_merged_weights_that_accelerate_took_away_are_not_unmerged(keep):
    model = with_adapters("a")
    expected = logits(model)
    model.merge_adapter(keep_weights=keep)
    accelerate.cpu_offload(model.base_model, execution_device="cpu")
    for call in (model.unmerge_adapter, model.unload, model.disable_adapter_layers):
        with pytest.raises(AdapterError, match="expected merged weights where they were, found that accelerate took"):
            call()
    assert model.merged_adapters == ["a"]
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    accelerate.hooks.remove_hook_from_submodules(model.base_model)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("when", ["tried", "merged"])
def test_an_interruption_leaves_nothing_merged(when):
    model = with_adapters("a")
    expected, before = logits(model), state(model)
    count, calls = sum(isinstance(m, RoadLayer) for m in model.modules()), []
    merge = _merge.merge

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == (5 if when == "tried" else count + 5):
            raise KeyboardInterrupt
        return merge(*args, **kwargs)

    with mock.patch.object(_merge, "merge", interrupted), pytest.raises(KeyboardInterrupt):
        model.merge_adapter(keep_weights=False)
    if when == "tried":
        assert torch.equal(logits(model), expected)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert before[::2] == state(model)[::2]
    model.merge_adapter(keep_weights=False)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@contextlib.contextmanager
def interrupted(owner, name, count):
    """Raises KeyboardInterrupt in the ``count``-th call of a function."""
    function, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == count:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    with mock.patch.object(owner, name, failing), pytest.raises(KeyboardInterrupt):
        yield


STEPS = {
    "in a layer": (RoadLayer, "add", 9),
    "between theta and alpha": (nn.Parameter, "__new__", 12),
    "in a table": (Bank, "update", 9),
    "while it is activated": (RoadModel, "set_adapter", 1),
    "in base weights": (torch.Tensor, "copy_", 2),
}


@pytest.mark.parametrize("step", STEPS)
def test_an_interrupted_first_adapter_leaves_the_base_as_it_was(step, tmp_path):
    base, folder = small_model(), saved(tmp_path)
    if step == "in base weights":
        theirs = peft.get_peft_model(small_model(), peft.RoadConfig(target_modules=["q_proj"], init_weights=False))
        with torch.no_grad():
            for end in (theirs.get_input_embeddings(), theirs.get_output_embeddings()):
                end.weight.add_(1)
        theirs.save_pretrained(folder := tmp_path / "theirs", save_embedding_layers=True)
    before = state(base)
    with interrupted(*STEPS[step]):
        RoadModel.from_pretrained(base, folder)
    assert before[0] == state(base)[0]
    model = RoadModel(base)
    with interrupted(*STEPS[step]):
        model.load_adapter(folder)
    assert model.adapter_names == model.active_adapters == []
    assert [(n, p.requires_grad) for n, p in base.named_parameters()] == [(n, f[2]) for n, f in before[1].items()]
    assert all(torch.equal(p, before[1][name][3]) for name, p in base.named_parameters())
    model.to("cpu").load_adapter(folder)
    expected = logits(RoadModel.from_pretrained(small_model(), folder))
    assert_close(logits(model), expected, "float32", moved_from=logits(small_model()))


@pytest.mark.parametrize(
    ("step", "limit"),
    [("in a layer", None), ("in a layer", 2), ("between theta and alpha", None), ("in a table", None)],
)
def test_an_interrupted_further_adapter_leaves_the_others_as_they_were(step, limit, tmp_path):
    model, folder = RoadModel(small_model(), max_loaded=limit), saved(tmp_path)
    model.add_adapter("a", config(target_modules=["q_proj"]))
    before, expected = state(model), logits(model)
    with interrupted(*STEPS[step]):
        model.load_adapter(folder, "b")
    after = state(model)
    assert (before[0], before[2][0]) == (after[0], after[2][0])
    assert torch.equal(logits(model.to("cpu")), expected)
    model.load_adapter(folder, "b")
    rows = logits(model, adapter_names=["a", "b", "b", "a"])
    alone = logits(RoadModel.from_pretrained(small_model(), folder))
    assert_close(rows[1:3], alone[1:3], "float32", moved_from=logits(small_model())[1:3])
    assert_close(rows[::3], expected[::3], "float32")


@pytest.mark.parametrize(("owner", "name", "count"), [(torch.Tensor, "copy_", 9), (Bank, "update", 9)])
def test_an_interrupted_swap_changes_nothing(owner, name, count, tmp_path):
    model, folder = with_adapters(), saved(tmp_path)
    names = ["a", "b:2", "b", "__base__"]
    before, plain, expected = state(model), logits(model), logits(model, adapter_names=names)
    with interrupted(owner, name, count):
        model.hotswap_adapter(folder, "b")
    after = state(model)
    assert before[0] == after[0]
    assert all(torch.equal(p, before[1][name][3]) for name, p in model.named_parameters())
    assert {**before[2][0], "rows": None} == {**after[2][0], "rows": None}
    assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model, adapter_names=names), expected)
    model.hotswap_adapter(folder, "b")
    alone = logits(RoadModel.from_pretrained(small_model(), folder))
    assert_close(logits(model, adapter_names=names)[2], alone[2], "float32", moved_from=expected[2])


def test_a_module_that_stands_in_two_places_is_adapted_in_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(8, 8)
            self.two = self.one

        def forward(self, x):
            return self.two(self.one(x))

    base = Twice()
    model = RoadModel(base, config(target_modules=["one"]))
    assert base.one is base.two
    x = torch.randn(2, 8)
    torch.testing.assert_close(model(x), base.one(base.one(x)))
    assert isinstance(base.two, RoadLayer)


class Compiled(nn.Module):
    """A linear layer compiled by itself, one in a compiled block, and a plain one, before adapters are added."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = torch.compile(nn.Linear(16, 16), backend="eager")
        self.two = torch.compile(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), backend="eager")
        self.three = nn.Linear(16, 16)

    def forward(self, x):
        return self.three(self.two(self.one(x)))


@pytest.mark.parametrize("targets", ["all-linear", ["one", "two.0", "three"]])
@torch.no_grad()
def test_modules_that_were_compiled_before_are_adapted(targets):
    base, x = Compiled(), torch.randn(4, 16)
    plain = nn.Sequential(base.one._orig_mod, *base.two._orig_mod, base.three)
    modules, before = dict(base.named_modules()), base(x)
    twin = RoadModel(copy.deepcopy(plain), config())
    model = RoadModel(base, config(target_modules=targets))
    found = {layer.module_path: layer for layer in model.modules() if isinstance(layer, RoadLayer)}
    assert list(found) == ["one", "two.0", "three"]
    others = [module for module in twin.modules() if isinstance(module, RoadLayer)]
    for layer, other in zip(found.values(), others, strict=True):
        other.road_theta["default"].copy_(layer.road_theta["default"])
        other.road_alpha["default"].copy_(layer.road_alpha["default"])
    expected = twin(x)
    assert_close(model(x), expected, "float32", moved_from=before)
    names = ["default", "__base__"] * 2
    assert_close(model(x, adapter_names=names), twin(x, adapter_names=names), "float32")
    model.merge_adapter()
    assert_close(model(x), expected, "float32", moved_from=before)
    model.unmerge_adapter()
    assert_close(model(x), expected, "float32")
    assert model.unload() is base
    assert dict(base.named_modules()) == modules
    assert torch.equal(base(x), before)
    assert_close(RoadModel(base, config(target_modules=["one"])).merge_and_unload()(x), base(x), "float32")


def test_a_compiled_module_that_also_stands_elsewhere_is_adapted_in_both():
    one = nn.Linear(8, 8)
    base = nn.Sequential(one, torch.compile(one, backend="eager"))
    model = RoadModel(base, config(target_modules=["0"]))
    x = torch.randn(2, 8)
    assert base[0] is base[1]
    torch.testing.assert_close(model(x), base[0](base[0](x)))


def test_the_files_of_a_compiled_base_are_those_of_a_plain_one(tmp_path):
    def base():
        return small_model(num_hidden_layers=1)

    compiled = with_adapters(["default"], torch.compile(base(), backend="eager"))
    plain = with_adapters(["default"], base())
    for kind, model in (("plain", plain), ("compiled", compiled)):
        model.save_pretrained(tmp_path / kind)
    files = [read_peft(tmp_path / kind) for kind in ("plain", "compiled")]
    assert list(files[0].modules) == list(files[1].modules)
    expected = logits(plain)
    # As PEFT writes it, and as this project once did.
    old = {path.replace("model", "_orig_mod.model", 1): value for path, value in files[0].modules.items()}
    write_peft(tmp_path / "old", dataclasses.replace(files[0], modules=old))
    for kind in ("plain", "compiled", "old"):
        for given in (base(), torch.compile(base(), backend="eager")):
            model = RoadModel.from_pretrained(given, tmp_path / kind)
            torch.testing.assert_close(logits(model), expected)
            model.hotswap_adapter(tmp_path / "old", "default")
            torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("names", ["abc", "bbb"])
def test_threads_that_load_adapters_at_once(names, tmp_path):
    folder, model, errors = saved(tmp_path), RoadModel(small_model()), []
    found = threading.Barrier(len(names))

    def select(*args, select=_base.select):
        chosen = select(*args)
        with contextlib.suppress(threading.BrokenBarrierError):
            # If possible, all threads have selected layers before one of them wraps any.
            found.wait(0.2)
        return chosen

    def load(name):
        try:
            model.load_adapter(folder, name)
        except AdapterError as error:
            errors.append(str(error))

    with mock.patch.object(_base, "select", select):
        threads = [threading.Thread(target=load, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert errors == ["adapter_name: expected a new name, found 'b', which is there already"] * (3 - len(set(names)))
    expected = logits(RoadModel.from_pretrained(small_model(), folder))
    for name in names:
        assert_close(logits(model, adapter_names=[name] * 4), expected, "float32", moved_from=logits(small_model()))


def test_methods_of_the_base_do_not_pass_over_adapter_names():
    model = with_adapters()
    for call in (model.generate_batch, model.prepare_inputs_for_generation):
        with pytest.raises(AdapterError, match=rf"call of the model or its generate, found {call.__name__}, which"):
            call([[3, 4, 5]], adapter_names=["a"])
    assert model.generate_batch == model.generate_batch
    assert inspect.signature(model.generate_batch) == inspect.signature(model.base_model.generate_batch)
    assert pickle.loads(pickle.dumps(model.generate_batch)).__name__ == "generate_batch"
    assert model.get_input_embeddings == model.base_model.get_input_embeddings
    inputs = model.prepare_inputs_for_generation(IDS, adapter_names=None)
    assert torch.equal(inputs["input_ids"], IDS)


def test_two_models_do_not_disturb_each_other():
    one, two = with_adapters("a"), with_adapters("b")
    plain = logits(two)

    class Both(nn.Module):
        def forward(self, x):
            return one.base_model(x).logits, two.base_model(x).logits

    outer = copy.copy(one)
    outer._modules = {"base_model": Both()}
    given = outer(IDS, adapter_names=["a", "__base__", "a", "a"])
    assert torch.equal(given[0][1], logits(small_model())[1])
    assert torch.equal(given[1], plain)


def test_nothing_leaks_after_an_exception():
    model = with_adapters()
    model.set_adapter("b")
    plain = logits(model)
    with pytest.raises(IndexError):
        model(torch.full((2, 3), 10**6), adapter_names=["a", "__base__"])
    assert torch.equal(logits(model), plain)
    with pytest.raises(IndexError):
        model.generate(torch.full((2, 3), 10**6), adapter_names=["a", "__base__"], max_new_tokens=2)
    assert torch.equal(logits(model), plain)


REFUSED = {
    "unknown name": (lambda m, d: m(IDS, adapter_names=["a", "z", "a", "y"]), "one of 'a', 'b', found 'z', 'y'"),
    "too few names": (lambda m, d: m(IDS, adapter_names=["a"]), "for each of 4 rows, found 1"),
    "too many names": (lambda m, d: m.generate(IDS, adapter_names=["a"] * 5), "for each of 4 rows, found 5"),
    "no names": (lambda m, d: m(input_ids=IDS, adapter_names=[]), "for each of 4 rows, found 0"),
    "a name alone": (lambda m, d: m(IDS, adapter_names="a"), "expected a list"),
    "set unknown": (lambda m, d: m.set_adapter("z"), "found 'z'"),
    "set twice": (lambda m, d: m.set_adapter(["a", "a"]), "each name once"),
    "same name": (lambda m, d: m.load_adapter(d, "a"), "expected a new name, found 'a'"),
    "name of the base": (lambda m, d: m.load_adapter(d, "__base__"), "other than '__base__'"),
    "name with a dot": (lambda m, d: m.load_adapter(d, "v1.0"), r"found 'v1\.0'"),
    "name that is taken": (lambda m, d: m.load_adapter(d, "keys"), "found 'keys'"),
    "name of a module's flag": (lambda m, d: m.load_adapter(d, "training"), "found 'training'"),
    "name of a private field": (lambda m, d: m.add_adapter("_parameters", config()), "found '_parameters'"),
    "name of a counter": (lambda m, d: m.add_adapter("changes", config()), "found 'changes'"),
    "name with a null": (lambda m, d: m.load_adapter(d, "a\0b"), r"expected the name of a folder, .* found 'a\\x00b'"),
    "name beyond UTF-8": (lambda m, d: m.add_adapter("a\ud800", config()), "expected the name of a folder"),
    "name of 256 bytes": (lambda m, d: m.add_adapter("é" * 128, config()), "name of a folder, of 255 bytes at most"),
    "delete unknown": (lambda m, d: m.delete_adapter("z"), "found 'z'"),
    "delete active": (lambda m, d: m.delete_adapter("a"), "not active, found 'a'"),
    "delete several": (lambda m, d: m.delete_adapter(["a", "b"]), r"expected a name, found \['a', 'b'\]"),
    "set nothing": (lambda m, d: m.set_adapter(None), "expected a name, found None"),
    "load without a name": (lambda m, d: m.load_adapter(d, None), "found None"),
    "swap without a name": (lambda m, d: m.hotswap_adapter(d, None), "expected a name, found None"),
    "add PEFT's config": (
        lambda m, d: m.add_adapter("c", peft.RoadConfig(target_modules=["q_proj"])),
        r"expected a road_torch\.RoadConfig .*from_dict.*, found a peft\.",
    ),
    "add a dict": (lambda m, d: m.add_adapter("c", {"group_size": 8}), "found a builtins.dict"),
    "merge twice": (lambda m, d: m.merge_adapter(["a", "a"]), "merge_adapter: expected each name once, found a, a"),
    "compose text": (lambda m, d: m.add_weighted_adapter("ab", [1, 1], "c"), "expected a list of names, found 'ab'"),
    "unmerge": (lambda m, d: m.unmerge_adapter(), "expected merged adapters, found none"),
    "merge unknown": (lambda m, d: m.merge_adapter(["z"]), "found 'z'"),
    "save with pickle": (lambda m, d: m.save_pretrained(d / "new", False), "safe_serialization: expected True"),
    "save nowhere": (lambda m, d: m.save_pretrained(None), "folder: expected a path, found NoneType"),
    "save over nothing": (lambda m, d: m.save_pretrained("a\0b", overwrite=True), r"'a\\x00b': expected a path that"),
    "save too far": (lambda m, d: m.save_pretrained("x" * 300), "expected a path .*File name too long"),
    "load from nowhere": (lambda m, d: m.load_adapter(None, "c"), "folder: expected a path, found NoneType"),
    "swap in a model": (lambda m, d: m.hotswap_adapter(m, "a"), "folder: expected a path, found RoadModel"),
    "save unknown": (lambda m, d: m.save_pretrained(d / "new", selected_adapters=["z"]), "found 'z'"),
    "group size": (lambda m, d: m.add_adapter("c", config(group_size=48)), r"layers\.0.*48 divides, found 128"),
    "no target": (lambda m, d: m.add_adapter("c", config(target_modules=["q_prj"])), "nearest: q_proj"),
    "no linear": (lambda m, d: m.add_adapter("c", config(target_modules=["norm"])), "found LlamaRMSNorm"),
    "saved modules": (lambda m, d: m.load_adapter(d / "nothing", "c"), "expected a folder, found nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_call_changes_nothing(case, tmp_path):
    model, folder = with_adapters(), saved(tmp_path)
    call, message = REFUSED[case]
    before = state(model)
    with pytest.raises(AdapterError, match=message) as caught:
        call(model, folder)
    assert "\n" not in str(caught.value)
    assert_same(before, state(model))


@pytest.mark.parametrize("call", ["merge", "set", "names", "add", "delete", "disable_after"])
def test_while_merged(call):
    model = with_adapters()
    model.merge_adapter()
    merged = logits(model)
    before = state(model)
    calls = {
        "merge": lambda: model.merge_adapter(),
        "set": lambda: model.set_adapter("b"),
        "names": lambda: model(IDS, adapter_names=list("abab")),
        "add": lambda: model.add_adapter("c", config()),
        "delete": lambda: model.delete_adapter("a"),
    }
    if call in calls:
        with pytest.raises(AdapterError):
            calls[call]()
        assert_same(before, state(model))
    else:
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(small_model()))
            assert model.merged_adapters == []
    assert model.merged_adapters == ["a"]
    assert torch.equal(logits(model), merged)


def foreign(tmp_path, change):
    adapter = read_peft(saved(tmp_path))
    changed = change(adapter)
    write_peft(tmp_path / "changed", changed)
    return tmp_path / "changed"


def renamed(adapter):
    old = "model.layers.0.mlp.up_proj"
    modules = {("model.layers.9.mlp.up_proj" if path == old else path): pair for path, pair in adapter.modules.items()}
    return dataclasses.replace(adapter, modules=modules)


def without(adapter):
    modules = {path: pair for path, pair in adapter.modules.items() if path != "model.layers.1.mlp.up_proj"}
    return dataclasses.replace(adapter, modules=modules)


def narrower(adapter):
    changed = dataclasses.replace(adapter.config, target_modules=["up_proj"])
    return dataclasses.replace(adapter, config=changed)


def misshapen(adapter):
    path = "model.layers.1.self_attn.k_proj"
    return dataclasses.replace(
        adapter, modules={**adapter.modules, path: adapter.modules["model.layers.0.mlp.up_proj"]}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, r"modules of LlamaForCausalLM, found model\.layers\.9\.mlp\.up_proj"),
        (without, r"every module .* found none for model\.layers\.1\.mlp\.up_proj"),
        (narrower, r"only for modules .* found model\.layers\.0\.mlp\.down_proj, .* and \d+ more"),
        (misshapen, r"expected 32 θ for model\.layers\.1\.self_attn\.k_proj with 64 outputs .*found shape \[96\]"),
    ],
)
def test_an_adapter_for_another_model(change, message, tmp_path):
    folder = foreign(tmp_path, change)
    base = small_model()
    before = state(base)
    with pytest.raises(AdapterError, match=message) as caught:
        RoadModel.from_pretrained(base, folder)
    assert "\n" not in str(caught.value)
    assert_same(before, state(base))


SPOILT = {
    "truncated tensors": lambda data: data[:-4],
    "truncated header": lambda data: data[:200],
    "no header": lambda data: data[:4],
    "header beyond the file": lambda data: (len(data) + 1).to_bytes(8, "little") + data[8:],
    "header of a terabyte": lambda data: (10**12).to_bytes(8, "little") + data[8:],
    "more than the header says": lambda data: data + b"xx",
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_file_changes_nothing(case, tmp_path):
    model, folder = with_adapters(), saved(tmp_path)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(SPOILT[case](file.read_bytes()))
    before, expected = state(model), logits(model)
    with pytest.raises(AdapterError, match="expected a whole safetensors file") as caught:
        model.load_adapter(folder, "c")
    assert "\n" not in str(caught.value)
    assert_same(before, state(model))
    assert model.adapter_names == ["a", "b"]
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("parent", ["attention", "encoder"])
def test_layers_whose_weight_is_read_elsewhere_are_refused(parent):
    base = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(16, 2)}
        if parent == "attention"
        else {"encoder": nn.TransformerEncoderLayer(16, 2)}
    )
    target = "out_proj" if parent == "attention" else "linear1"
    before = state(base)
    with pytest.raises(AdapterError, match=f"{target}: .*without effect"):
        RoadModel(base, config(target_modules=[target]))
    assert_same(before, state(base))


def wavlm(kind=transformers.WavLMModel, **more):
    return kind(
        transformers.WavLMConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            conv_dim=(8, 8),
            conv_stride=(5, 4),
            conv_kernel=(10, 4),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            num_buckets=8,
            **more,
        )
    )


def mamba():
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1, time_step_rank=4)
    )


def mobilebert():
    return transformers.MobileBertForMaskedLM(
        transformers.MobileBertConfig(
            vocab_size=64,
            hidden_size=32,
            embedding_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            intra_bottleneck_size=16,
            num_feedforward_networks=1,
            true_hidden_size=16,
        )
    )


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def layoutlm(version=3):
    relative = {"has_relative_attention_bias": True, "has_spatial_attention_bias": True, "initializer_range": 0.5}
    sizes = {**SIZES, "coordinate_size": 4, "shape_size": 8, "vocab_size": 64, "visual_embed": False}
    config = getattr(transformers, f"LayoutLMv{version}Config")(**relative, **sizes)
    # The whole version 2 needs detectron2.
    return modeling_layoutlmv2.LayoutLMv2Encoder(config) if version == 2 else transformers.LayoutLMv3Model(config)


def reading_order():
    config = modeling_pp_doclayout_v2.PPDocLayoutV2ReadingOrderConfig(
        has_relative_attention_bias=True, has_spatial_attention_bias=False, **SIZES
    )
    return modeling_pp_doclayout_v2.PPDocLayoutV2ReadingOrderEncoder(config)


SOUND = {"input_values": torch.arange(500.0).sin()[None]}
TEXT = {"input_ids": torch.arange(6, 12)[None]}
BOXES = {"bbox": torch.tensor([[[0, 0, 5, 5], [3, 1, 9, 4]] * 3])}
HIDDEN = torch.arange(192.0).sin().view(1, 6, 32)
NO_MASK = torch.zeros(1, 1, 1, 6)
ENCODED = {"hidden_states": HIDDEN, "position_ids": torch.arange(6)[None], "attention_mask": NO_MASK, **BOXES}


@torch.no_grad()
def first(model, example):
    """Returns the first output of a call."""
    output = model(**example)
    return output if isinstance(output, torch.Tensor) else output[0]


def adapted_by_peft(base, targets):
    torch.manual_seed(1)
    their_config = peft.RoadConfig(target_modules=targets, group_size=2, init_weights=False)
    return peft.get_peft_model(copy.deepcopy(base), their_config).eval()


@pytest.mark.parametrize(
    ("build", "target", "example"),
    [
        (wavlm, "q_proj", SOUND),
        (wavlm, "out_proj", SOUND),
        (mamba, "dt_proj", TEXT),
        (mobilebert, "predictions.dense", TEXT),
        (lambda: modeling_maskformer.MaskformerMLPPredictionHead(32, 16, 8), "1.0", {"input": HIDDEN}),
        (lambda: modeling_mask2former.Mask2FormerMLPPredictionHead(32, 16, 8), "1.0", {"input": HIDDEN}),
        (layoutlm, "rel_pos_bias", {**TEXT, **BOXES}),
        (layoutlm, "rel_pos_y_bias", {**TEXT, **BOXES}),
        (lambda: layoutlm(2), "rel_pos_x_bias", ENCODED),
        (reading_order, "rel_pos_bias", ENCODED),
    ],
)
def test_layers_whose_weight_a_transformers_model_reads_are_refused(build, target, example):
    base = build().eval()
    theirs = adapted_by_peft(base, [target])
    assert torch.equal(first(theirs, example), first(base, example)), "PEFT rotates it: there is no need to refuse it"
    before = state(base)
    with pytest.raises(AdapterError, match=rf"{target}: .*\w+, which reads its weight"):
        RoadModel(base, config(target_modules=[target], group_size=2))
    assert_same(before, state(base))


@pytest.mark.parametrize(
    ("build", "parent", "names", "example"),
    [
        # The pooling head of SigLIP, the vision tower of Gemma 3, is a MultiheadAttention.
        (lambda: small_model("gemma3", num_hidden_layers=1), "model.vision_tower.head.attention", ["out_proj"], TEXT),
        (wavlm, "encoder.layers.0.attention", ["k_proj", "out_proj", "q_proj", "v_proj"], SOUND),
        (mobilebert, "cls.predictions", ["dense"], TEXT),
        (layoutlm, "encoder", ["rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"], {**TEXT, **BOXES}),
    ],
)
def test_what_peft_adapts_without_effect_is_left_out_on_request(build, parent, names, example, tmp_path):
    base = build().eval()
    plain = first(base, example)
    theirs = adapted_by_peft(base, "all-linear")
    theirs.save_pretrained(tmp_path)
    before = state(base)
    message = rf"only for layers that are called, found some for {parent}\.\w+[, ].*strict=False leaves them out"
    with pytest.raises(AdapterError, match=message):
        RoadModel.from_pretrained(base, tmp_path)
    assert_same(before, state(base))
    model = RoadModel.from_pretrained(base, tmp_path, strict=False)
    assert_close(first(model, example), first(theirs, example), "float32", moved_from=plain)
    model.save_pretrained(tmp_path / "again")
    left_out = read_peft(tmp_path).modules.keys() - read_peft(tmp_path / "again").modules.keys()
    assert left_out == {f"{parent}.{name}" for name in names}


def test_what_peft_adapts_without_any_effect(tmp_path):
    adapted_by_peft(wavlm(), ["q_proj", "v_proj"]).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"only for layers that are called, .* so that they have no effect$"):
        RoadModel.from_pretrained(wavlm(), tmp_path, strict=False)


def mixture(kind, **more):
    sizes = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return small_model(kind, num_hidden_layers=1, shared_expert_intermediate_size=32, **sizes, **more)


@pytest.mark.parametrize(
    ("build", "left_out"),
    [
        (mamba, ["dt_proj", "out_proj", "x_proj"]),
        (lambda: mixture("qwen2_moe"), ["shared_expert_gate"]),
        (lambda: mixture("phimoe", lm_head_bias=False), ["router"]),
        (lambda: mixture("llama4_text", layer_types=["full_attention"], moe_layers=[0]), ["router"]),
    ],
)
def test_all_linear_leaves_out_what_nobody_can_rotate(build, left_out, tmp_path):
    base = build().eval()
    other = copy.deepcopy(base)
    linear = [path for path, module in base.named_modules() if isinstance(module, nn.Linear) and path != "lm_head"]
    model = RoadModel(base, config(target_modules="all-linear", group_size=2)).eval()
    adapted = {path for path, module in base.named_modules() if isinstance(module, RoadLayer)}
    assert sorted({path.rpartition(".")[2] for path in {*linear} - adapted}) == left_out
    ids = torch.arange(6, 12)[None]
    with torch.no_grad():
        expected = model(ids).logits
        with model.disable_adapter():
            assert not torch.allclose(model(ids).logits, expected, atol=1e-3)
        # The file names the layers, since PEFT means others.
        model.save_pretrained(tmp_path)
        assert set(read_peft(tmp_path).config.target_modules) == adapted
        theirs = peft.PeftModel.from_pretrained(other, tmp_path)
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-4)


def speakers():
    """Both the model and its body have a module of the name feature_extractor, of which only the first is linear."""
    layers = {"tdnn_dim": (8, 8), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 8}
    return wavlm(transformers.WavLMForXVector, **layers)


@pytest.mark.parametrize("changes", [{}, {"exclude_modules": ["projector"]}])
def test_layers_that_are_named_select_no_others(changes, tmp_path):
    base = speakers().eval()
    other = copy.deepcopy(base)
    plain = first(base, SOUND)
    model = RoadModel(base, config(group_size=2, **changes)).eval()
    assert not isinstance(base.wavlm.feature_extractor, RoadLayer)
    model.save_pretrained(tmp_path)
    paths = {path for path, module in base.named_modules() if isinstance(module, RoadLayer)}
    assert {"feature_extractor", "wavlm.feature_projection.projection"} <= paths
    assert ("projector" in paths) is not bool(changes)
    again = RoadModel.from_pretrained(copy.deepcopy(other), tmp_path)
    theirs = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    for loaded in (again, theirs):
        assert_close(first(loaded, SOUND), first(model, SOUND), "float32", moved_from=plain)


def test_layers_that_are_left_select_no_others(tmp_path):
    base = speakers().eval()
    theirs = adapted_by_peft(base, r"feature_extractor|projector|tdnn\.0\.kernel")
    theirs.save_pretrained(tmp_path)
    model = RoadModel.from_pretrained(copy.deepcopy(base), tmp_path, strict=False)
    assert_close(first(model, SOUND), first(theirs, SOUND), "float32", moved_from=first(base, SOUND))


def test_all_linear_is_kept_where_only_the_head_is_odd(tmp_path):
    RoadModel(small_model(vocab_size=161), config(target_modules="all-linear")).save_pretrained(tmp_path)
    assert read_peft(tmp_path).config.target_modules == "all-linear"


def test_layers_whose_sizes_are_tensors(tmp_path):
    """Those of Inkling's vision tower are."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(*sizes) for sizes in torch.tensor([[32, 16], [16, 6]])))
    theirs = adapted_by_peft(base, ["0", "1"])
    theirs.save_pretrained(tmp_path)
    plain, expected = first(base, {"input": HIDDEN}), first(theirs, {"input": HIDDEN})
    model = RoadModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(first(model, {"input": HIDDEN}), expected, "float32", moved_from=plain)
    assert_close(first(model.merge_and_unload(), {"input": HIDDEN}), expected, "float32", moved_from=plain)
    RoadModel(base, config(group_size=2))
    assert {type(size) for layer in base for size in (layer.in_features, layer.out_features)} == {int}


def test_a_layer_without_sizes_yet():
    base = nn.Sequential(nn.Linear(8, 16), nn.LazyLinear(8))
    with pytest.raises(AdapterError, match="1: expected a layer whose sizes are known, found a LazyLinear"):
        RoadModel(base, RoadConfig(target_modules=["0", "1"], group_size=4))
    assert [type(module) for module in base] == [nn.Linear, nn.LazyLinear]


def test_a_model_with_road_layers_is_not_wrapped_again():
    model = with_adapters("a")
    for base in (model, model.base_model):
        with pytest.raises(AdapterError, match="without RoAd layers"):
            RoadModel(base)


FOREIGN = {
    "adding": lambda m, d: m.add_adapter("c", config()),
    "loading": lambda m, d: m.load_adapter(d, "c"),
    "activating": lambda m, d: m.set_adapter([]),
    "disabling": lambda m, d: m.disable_adapter().__enter__(),
    "merging": lambda m, d: m.merge_adapter([]),
    "merging for good": lambda m, d: m.merge_and_unload(),
}


@pytest.mark.parametrize("case", [*FOREIGN, "saving"])
def test_layers_of_another_model_are_refused(case, tmp_path):
    old, copied, folder = with_adapters(), with_adapters(), saved(tmp_path)
    new = with_adapters("n", old.unload())
    blocks = copied.base_model.model.layers
    blocks.append(copy.deepcopy(blocks[0]))
    for model in (copied,) if case == "saving" else (old, copied):
        before = state(model), state(new)
        with pytest.raises(AdapterError, match=r"expected layers that this model wrapped, found model\.layers\.0\."):
            FOREIGN.get(case, lambda m, d: m.save_pretrained(d / "new"))(model, folder)
        assert_same(before[0], state(model))
        assert_same(before[1], state(new))


def test_what_is_no_model_is_not_wrapped(tmp_path):
    for base in (None, "a model's name"):
        with pytest.raises(AdapterError, match=f"RoadModel: expected Module, found {type(base).__name__}"):
            RoadModel(base)
    with pytest.raises(AdapterError, match="RoadModel: expected Module, found PosixPath"):
        RoadModel.from_pretrained(tmp_path, small_model())


@pytest.mark.parametrize("where", ["weight", "bias"])
def test_a_merge_that_overflows_leaves_every_layer_as_it_was(where):
    model = with_adapters("a", target_modules=["q_proj", "o_proj"])
    last = [m for m in model.modules() if isinstance(m, RoadLayer)][-1]
    last.base_layer.bias = nn.Parameter(torch.ones(128), requires_grad=False)
    with torch.no_grad():
        getattr(last.base_layer, where).mul_(3e38 if where == "bias" else 1e38)
        last.road_alpha["a"].fill_(1e6)
    before = state(model)
    with pytest.raises(AdapterError, match=rf"layers\.2\..*\.{where}: expected finite values after merging"):
        model.merge_adapter()
    assert_same(before, state(model))


def test_experts_are_refused_in_a_mixed_batch():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x):
            return self.experts[0](x)

    model = RoadModel(Experts(), config(target_modules=r"experts\.\d"))
    model(torch.randn(4, 8))
    with pytest.raises(AdapterError, match=r"experts\.0: .* found an expert"):
        model(torch.randn(4, 8), adapter_names=["default"] * 4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = with_adapters("a", inference_mode=False).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 42
    for name, expected in gradients[0].items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


class Checkpointed(nn.Module):
    """A model that calls torch.utils.checkpoint itself."""

    def __init__(self, reentrant):
        super().__init__()
        self.up, self.reentrant = nn.Linear(8, 8), reentrant

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.up, x, use_reentrant=self.reentrant)


def test_a_mixed_batch_under_another_checkpointing():
    """The model's own checkpointing recomputes layers when the call is over."""
    model = RoadModel(Checkpointed(True), config(target_modules=["up"], inference_mode=False), "a")
    model.add_adapter("b", config(target_modules=["up"]))
    x = torch.randn(2, 8, requires_grad=True)
    mixed = model(x, adapter_names=["b", "a"])
    with pytest.raises(AdapterError, match=r"up: expected a mixed batch without reentrant checkpointing"):
        mixed.sum().backward()
    assert model.base_model.up.road_theta["a"].grad is None
    # Recomputing plain calls is allowed.
    model(x).sum().backward()
    given = model.base_model.up.road_theta["a"].grad
    assert_close(
        given, torch.autograd.grad(model.base_model.up(x).sum(), model.base_model.up.road_theta["a"])[0], "float32"
    )


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="torch 2.8 shows what saves tensors"
)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("names", [["b", "a"], ["b"]])
def test_a_mixed_batch_under_checkpointing_that_is_not_reentrant(names, trained):
    model = RoadModel(Checkpointed(False), config(target_modules=["up"], inference_mode=not trained), "a")
    model.add_adapter("b", config(target_modules=["up"]))
    x = torch.randn(len(names), 8, requires_grad=True)
    with pytest.raises(
        AdapterError, match=r"up: expected a mixed batch without checkpointing, found a call in"
    ) as caught:
        model(x, adapter_names=names)
    assert "\n" not in str(caught.value)
    # Without gradients nothing is recomputed, and plain calls may be recomputed.
    with torch.no_grad():
        assert model(x, adapter_names=names).shape == x.shape
    plain = torch.autograd.grad(model(x).sum(), x)[0]
    assert torch.equal(plain, torch.autograd.grad(model.base_model.up(x).sum(), x)[0])


@torch.no_grad()
def test_a_base_whose_device_accelerate_spells_otherwise():
    expected = with_adapters()
    base = small_model()
    for module in base.modules():
        if isinstance(module, nn.Linear):
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(execution_device="cpu:0"))
    model = with_adapters(base=base)
    assert torch.equal(logits(model), logits(expected))
    names = ["a", "__base__", "b", "a"]
    assert torch.equal(logits(model, adapter_names=names), logits(expected, adapter_names=names))
    layer = next(m for m in model.modules() if isinstance(m, RoadLayer))
    assert layer.bank is layer.bank


@torch.no_grad()
def test_a_base_that_accelerate_keeps_on_disk(tmp_path):
    names = ["a", "__base__", "b", "a"]
    expected = with_adapters()
    offloaded = small_model()
    accelerate.disk_offload(offloaded, tmp_path, execution_device="cpu")
    assert offloaded.lm_head.weight.is_meta
    model = with_adapters(base=offloaded)
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert torch.equal(model(IDS, adapter_names=names).logits, expected(IDS, adapter_names=names).logits)
    with pytest.raises(
        AdapterError, match=r"expected a plain floating-point weight to merge into, found Linear with Tensor .* on meta"
    ):
        model.merge_adapter()
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("how", ["disk", "cpu", "dispatched"])
@torch.no_grad()
def test_adapters_whose_base_accelerate_takes_away_later(how, whole, tmp_path):
    names = ["a", "__base__", "b", "a"]
    expected, model = with_adapters(), with_adapters()
    target = model if whole else model.base_model
    if how == "disk":
        accelerate.disk_offload(target, tmp_path / "disk", execution_device="cpu")
    elif how == "cpu":
        accelerate.cpu_offload(target, execution_device="cpu")
    else:
        blocks = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
        ends = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
        places = {f"base_model.{path}" if whole else path: place for path, place in (blocks | ends).items()}
        accelerate.dispatch_model(target, places, main_device="cpu", offload_dir=tmp_path / "disk", force_hooks=True)
    assert model.base_model.model.layers[1].mlp.up_proj.weight.is_meta
    assert not any(p.is_meta for name, p in model.named_parameters() if ".road_" in name)
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(logits(model, adapter_names=names), logits(expected, adapter_names=names))
    model.save_pretrained(tmp_path / "saved")
    model.load_adapter(tmp_path / "saved" / "b", "c")
    model.hotswap_adapter(tmp_path / "saved" / "b", "a")
    given = logits(model, adapter_names=["a", "__base__", "b", "c"])
    assert torch.equal(given, logits(expected, adapter_names=["b", "__base__", "b", "b"]))
    accelerate.hooks.remove_hook_from_submodules(model)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(logits(model, adapter_names=["a", "__base__", "b", "c"]), given)


def test_config_reaches_the_base():
    model = with_adapters()
    assert model.config.model_type == "llama"
    assert model.device.type == "cpu"
    with pytest.raises(AttributeError, match="nonsense"):
        _ = model.nonsense
    assert isinstance(small_config(), type(model.config))
    model.config = other = small_config()
    assert model.base_model.config is other
    model.mine = 1
    assert not hasattr(model.base_model, "mine")


def test_a_new_model_is_in_its_base_s_mode():
    assert RoadModel(small_model().train()).training
    assert not RoadModel(small_model().eval()).training


def test_an_adapter_of_the_record_type_is_what_is_saved(tmp_path):
    folder = saved(tmp_path, variant="road_2")
    adapter = read_peft(folder)
    assert isinstance(adapter, Adapter)
    assert adapter.config.inference_mode
    assert adapter.config.variant == "road_2"
    assert len(adapter.modules) == 21
