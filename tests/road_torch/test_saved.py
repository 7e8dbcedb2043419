"""modules_to_save: training, saving, loading, mixing and merging copies of whole modules; and non-strict loading."""

import copy
import dataclasses
from unittest import mock

import accelerate
import peft
import pytest
import torch
import transformers
from _compare import assert_close, named_values
from _models import small_config, small_model
from torch import nn

from road_core import compose, read_peft, write_peft
from road_torch import AdapterError, RoadConfig, RoadLayer, RoadModel
from road_torch._layer import layers
from road_torch._saved import SavedModule

IDS = torch.arange(3, 31).reshape(4, 7)


def classifier(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return transformers.LlamaForSequenceClassification(small_config(num_labels=3)).to(dtype).eval()


def config(**changes):
    fields = {
        "target_modules": ["q_proj", "down_proj"],
        "group_size": 8,
        "init_weights": False,
        "inference_mode": True,
        "task_type": "SEQ_CLS",
    }
    return RoadConfig(**{**fields, **changes})


def road(names="ab", base=None, **changes):
    model = RoadModel(classifier() if base is None else base)
    for name in names:
        torch.manual_seed(ord(name))
        model.add_adapter(name, config(**changes))
        fill(model.base_model.score, name)
    return model.eval()


def fill(module, name):
    """Gives an adapter's copy values that depend on its name."""
    with torch.no_grad():
        for key, value in module.modules_to_save[name].named_parameters():
            value.copy_(torch.from_numpy(named_values(f"{name} {key}", *value.shape)))


@torch.no_grad()
def logits(model, **kwargs):
    return model(IDS, **kwargs).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_loads_what_we_write(dtype, tmp_path):
    model = road("a", classifier(dtype=dtype))
    assert model.peft_config["a"].modules_to_save == ["score"]
    model.save_pretrained(tmp_path / "saved", selected_adapters=["a"])
    theirs = peft.PeftModel.from_pretrained(classifier(dtype=dtype), tmp_path / "saved" / "a").eval()
    name = str(dtype).removeprefix("torch.")
    assert_close(
        logits(theirs).double(), logits(model).double(), name, moved_from=logits(classifier(dtype=dtype)).double()
    )
    again = RoadModel.from_pretrained(classifier(dtype=dtype), tmp_path / "saved" / "a", "x")
    assert torch.equal(logits(again), logits(model))
    assert again.base_model.score.weight.dtype == dtype


def distilbert():
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64, "vocab_size": 64, "max_position_embeddings": 32}
    return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**sizes)).eval()


WHOLE = {
    "the end of a head's name": (distilbert, {"target_modules": "all-linear"}, ["pre_classifier", "classifier"]),
    "a targeted head": (
        small_model,
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["head"], "task_type": None},
        ["lm_head"],
    ),
    "what holds layers": (
        small_model,
        {"target_modules": "all-linear", "modules_to_save": ["lp"], "task_type": None},
        ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp"],
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_is_saved_whole_by_the_end_of_its_name_is_not_rotated(case, tmp_path):
    base, changes, paths = WHOLE[case]
    model = RoadModel(base(), config(**changes)).eval()
    for path in paths:
        held = model.base_model.get_submodule(path)
        assert type(held) is SavedModule
        assert not list(layers(held))
        fill(held, "default")
    model.save_pretrained(tmp_path / "saved")
    ours = RoadModel.from_pretrained(base(), tmp_path / "saved")
    assert torch.equal(logits(ours), logits(model))
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "saved").eval()
    assert_close(logits(theirs), logits(model), "float32", moved_from=logits(base()))


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_we_load_what_peft_writes(task, tmp_path):
    torch.manual_seed(0)
    fields = {"target_modules": ["q_proj"], "group_size": 8, "init_weights": False, "task_type": task}
    theirs = peft.get_peft_model(
        classifier(), peft.RoadConfig(**fields, modules_to_save=["score", "embed_tokens"])
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    ours = RoadModel.from_pretrained(classifier(), tmp_path, "a")
    assert_close(logits(ours), logits(theirs), "float32", moved_from=logits(classifier()))
    merged = ours.merge_and_unload()
    assert_close(logits(merged), logits(theirs.merge_and_unload()), "float32", moved_from=logits(classifier()))
    assert type(merged.score) is nn.Linear
    assert type(merged.model.embed_tokens) is nn.Embedding


def test_each_row_has_its_adapter_s_head():
    model = road("ab")
    model.add_adapter("c", config(task_type=None))
    by_name = {"__base__": logits(classifier())}
    for name in "abc":
        model.set_adapter(name)
        by_name[name] = logits(model)
        assert (by_name[name] - by_name["__base__"]).abs().max() > 1e-2
    for names in (["b", "__base__", "a", "c"], ["a", "a", "b", "b"], ["c", "__base__", "c", "c"], ["a"] * 4):
        mixed = logits(model, adapter_names=names)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], by_name[name][row], rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), by_name["__base__"])
        assert torch.equal(logits(model, adapter_names=list("abca")), by_name["__base__"])


def test_a_head_that_was_compiled_before(tmp_path):
    base = classifier()
    base.score = torch.compile(base.score, backend="eager")
    model, plain = road(base=base), road()
    for name in (["a", "b", "__base__", "a"], ["b"] * 4):
        torch.testing.assert_close(logits(model, adapter_names=name), logits(plain, adapter_names=name))
    model.save_pretrained(tmp_path / "saved")
    assert list(read_peft(tmp_path / "saved" / "a").modules_to_save) == ["score.weight"]
    again = RoadModel.from_pretrained(classifier(), tmp_path / "saved" / "a")
    torch.testing.assert_close(logits(again), logits(plain))
    assert isinstance(model.unload().score, torch._dynamo.OptimizedModule)


def test_a_head_and_an_embedding_in_generation():
    base = small_model()
    model = RoadModel(base)
    for name, saved in {"a": ["lm_head"], "b": ["embed_tokens", "norm"], "c": None}.items():
        model.add_adapter(name, config(task_type=None, modules_to_save=saved))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * parameter.std())
    kwargs = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "num_beams": 2}
    names = ["b", "__base__", "a", "c"]
    mixed = model.generate(IDS, adapter_names=names, attention_mask=torch.ones_like(IDS), **kwargs)
    for row, name in enumerate(names):
        model.set_adapter([] if name == "__base__" else name)
        one = IDS[row : row + 1]
        assert torch.equal(mixed[row], model.generate(one, attention_mask=torch.ones_like(one), **kwargs)[0])
    # As in PEFT, "norm" selects every module whose path ends with it.
    assert sum("layernorm" in name and "modules_to_save.b" in name for name, _ in model.named_parameters()) == 6


def test_copies_are_trained_and_the_originals_are_not():
    model = road("ab", inference_mode=False).train()
    head = model.base_model.score
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=torch.tensor([0, 1, 2, 1])).loss.backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert "base_model.score.modules_to_save.a.weight" in changed
    assert all(name.endswith((".a", ".a.weight")) for name in changed)
    model.set_adapter("b")
    assert [n for n, p in head.named_parameters() if p.requires_grad] == ["modules_to_save.b.weight"]


def test_merging_deleting_and_unloading():
    base = classifier()
    original, plain = base.score, logits(base)
    model = road("ab", base)
    expected = logits(model, adapter_names=["b"] * 4)
    model.merge_adapter(["b"])
    assert_close(logits(model), expected, "float32", moved_from=plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.unmerge_adapter()
    model.delete_adapter("b")
    assert list(base.score.modules_to_save) == ["a"]
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    assert model.unload() is base
    assert base.score is original
    assert torch.equal(logits(base), plain)
    merged = twin.merge_and_unload()
    assert_close(logits(merged), logits(road("a")), "float32", moved_from=plain)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 8)])
        self.codes = Codes(8, 8)
        self.pair = Pair()
        self.last = nn.Identity()

    def forward(self, x):
        return self.last(self.pair(self.body(x), 2.0))


class Codes(nn.Linear):
    """A layer like those of quantisers, whose bias can be trained but not its weight."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        del self.weight
        self.register_buffer("qweight", torch.zeros(8, 8, dtype=torch.int32))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, scale):
        return scale * self.inner(x)


def net(**changes):
    return RoadModel(Net(), config(task_type=None, target_modules=["body"], **changes))


REFUSED = {
    "nothing": ({"modules_to_save": ["hed"]}, r"modules_to_save: expected a match for \['hed'\]"),
    "list": ({"modules_to_save": ["heads"]}, r"heads: expected a module .* that is called .* found ModuleList"),
    "integers": (
        {"modules_to_save": ["codes"]},
        r"codes: .* floating-point weights, found Codes with qweight of .*int32",
    ),
    "rotated": (
        {"target_modules": ["pair.inner"], "modules_to_save": ["body"]},
        "body: .* found one that adapters rotate",
    ),
    "whole": ({"target_modules": ["pair"], "modules_to_save": None}, "pair: expected a linear layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    changes, message = REFUSED[case]
    model = net()
    modules = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(AdapterError, match=message) as caught:
        model.add_adapter("b", config(**{"task_type": None, "target_modules": ["body"], **changes}))
    assert "\n" not in str(caught.value)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert model.adapter_names == ["default"]


class Counting(nn.Module):
    """A model whose head has running statistics, and an integer that float32 can't represent."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.head[0].num_batches_tracked.fill_(2**24 + 1)
        self.head.register_buffer("seen", torch.tensor([True, False]))

    def forward(self, x):
        return self.head(self.body(x))


def counting():
    torch.manual_seed(0)
    return Counting()


def train_a_little(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()
    for step in range(3):
        x = torch.from_numpy(named_values(f"step {step}", 16, 8)).float()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_running_statistics_are_trained_and_saved_as_in_peft(tmp_path):
    fields = {"target_modules": ["body"], "modules_to_save": ["head"], "group_size": 8}
    theirs = train_a_little(peft.get_peft_model(counting(), peft.RoadConfig(**fields)))
    base = counting()
    model = train_a_little(RoadModel(base, RoadConfig(**fields)))
    x = torch.from_numpy(named_values("x", 4, 8)).float()
    with torch.no_grad():
        expected = theirs(x)
        assert (expected - counting().eval()(x)).abs().max() > 0.1
        torch.testing.assert_close(model(x), expected)
        assert torch.equal(base.head.original_module[0].running_mean, torch.zeros(8))

        theirs.save_pretrained(tmp_path / "theirs")
        model.save_pretrained(tmp_path / "ours")
        again = RoadModel.from_pretrained(counting(), tmp_path / "theirs").eval()
        torch.testing.assert_close(again(x), expected)
        back = peft.PeftModel.from_pretrained(counting(), tmp_path / "ours").eval()
        assert torch.equal(back(x), model(x))
        again.load_adapter(tmp_path / "ours", "ours")
        head = again.base_model.head.modules_to_save["ours"]
        assert head[0].num_batches_tracked == 2**24 + 4
        assert head.seen.tolist() == [True, False]

        mixed = again(x, adapter_names=["ours", "__base__", "default", "ours"])
        torch.testing.assert_close(mixed[[0, 3]], model(x)[[0, 3]])
        torch.testing.assert_close(mixed[2], expected[2])
        torch.testing.assert_close(mixed[1], counting().eval()(x)[1])


def test_an_integer_for_a_weight(tmp_path):
    model = net(modules_to_save=["pair"])
    model.save_pretrained(tmp_path / "saved")
    adapter = read_peft(tmp_path / "saved")
    saved = {key: array.astype("int64") for key, array in adapter.modules_to_save.items()}
    write_peft(tmp_path / "other", dataclasses.replace(adapter, modules_to_save=saved))
    with pytest.raises(AdapterError, match=r"pair\.inner\.\w+: expected torch.float32, found torch.int64"):
        RoadModel.from_pretrained(Net(), tmp_path / "other")


def test_a_copy_and_a_rotation_of_one_module():
    model = net(modules_to_save=["pair"])
    with pytest.raises(
        AdapterError, match=r"pair\.inner: expected a module to rotate, found one that 'default' brings"
    ):
        model.add_adapter("b", config(task_type=None, target_modules=["inner"]))


def test_two_copies_of_one_module_at_once():
    model = road("ab")
    for call in (model.set_adapter, model.merge_adapter):
        with pytest.raises(AdapterError, match="one adapter at most that brings score whole, found a, b"):
            call(["a", "b"])
    assert model.active_adapters == ["a"]


def test_copies_are_swapped_in_place(tmp_path):
    model, other = road("ab", inference_mode=False), road("yz")
    other.save_pretrained(tmp_path / "other")
    names = ["a", "b", "__base__", "b"]
    before, rows = logits(model), logits(model, adapter_names=names)
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with mock.patch.object(RoadModel, "_forget", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        model.hotswap_adapter(tmp_path / "other" / "z", "b")
    assert torch.equal(logits(model, adapter_names=names), rows)
    model.hotswap_adapter(tmp_path / "other" / "z", "b")
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == parameters
    assert torch.equal(logits(model), before)
    expected = logits(other, adapter_names=["y", "z", "__base__", "z"])
    assert_close(logits(model, adapter_names=names)[1:], expected[1:], "float32", moved_from=rows[1:])
    handle = model.base_model.score.register_forward_pre_hook(
        lambda *_: model.hotswap_adapter(tmp_path / "other" / "y", "a")
    )
    for given in (names, None):
        with pytest.raises(AdapterError, match="expected an adapter with modules_to_save that no call uses, found 'a'"):
            logits(model, adapter_names=given)
    handle.remove()
    assert torch.equal(logits(model), before)


def shorter(tensors):
    return {"score.weight": tensors["score.weight"][:2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_type": None}, r"the whole modules of 'a' \(score\), found none"),
        ({"modules_to_save": ["norm"], "task_type": None}, r"\(score\), found .*\.input_layernorm, .* more$"),
        (shorter, r"score\.weight: expected shape \[3, 128\], found \[2, 128\]"),
    ],
)
def test_other_copies_are_not_swapped_in(change, message, tmp_path):
    model, other = road("a"), RoadModel(classifier())
    other.add_adapter("default", config(**({} if callable(change) else change)))
    other.save_pretrained(tmp_path / "other")
    if callable(change):
        adapter = read_peft(tmp_path / "other")
        changed = dataclasses.replace(adapter, modules_to_save=change(adapter.modules_to_save))
        write_peft(tmp_path / "other", changed, overwrite=True)
    before = {name: p._version for name, p in model.named_parameters()}
    with pytest.raises(AdapterError, match=message):
        model.hotswap_adapter(tmp_path / "other", "a")
    assert {name: p._version for name, p in model.named_parameters()} == before


@pytest.mark.parametrize(("names", "weights"), [("ab", [1, 1]), ("ba", [2, 1.0])])
def test_a_composition_brings_one_adapter_s_modules(names, weights, tmp_path):
    model = road("a")
    model.add_adapter("b", config(task_type=None, variant="road_2"))
    model.add_weighted_adapter(list(names), weights, "sum")
    before = logits(classifier())
    mix = "+".join(f"{name}:{weight}" for name, weight in zip(names, weights, strict=True))
    given = logits(model, adapter_names=["sum", mix, "sum", "__base__"])
    # As a mix in a batch, and as PEFT computes.
    expected = logits(model, adapter_names=[mix] * 4)
    assert_close(given, torch.cat((expected[:3], before[3:])), "float32", moved_from=before)
    model.save_pretrained(tmp_path / "saved")
    theirs = peft.PeftModel.from_pretrained(classifier(), tmp_path / "saved" / "sum").eval()
    assert_close(logits(theirs), expected, "float32", moved_from=before)
    again = RoadModel.from_pretrained(classifier(), tmp_path / "saved" / "sum")
    assert torch.equal(logits(again), logits(model, adapter_names=["sum"] * 4))
    # The same as from files.
    found = read_peft(tmp_path / "saved" / "sum")
    composed = compose([read_peft(tmp_path / "saved" / name) for name in names], weights)
    assert found.config.modules_to_save == composed.config.modules_to_save == ["score"]
    assert found.tensors().keys() == composed.tensors().keys()
    assert all((value == composed.tensors()[key]).all() for key, value in found.tensors().items())


def test_a_composition_s_copy_is_its_own():
    model = road("a", inference_mode=False)
    model.add_weighted_adapter(["a"], [1], "sum")
    copies = model.base_model.score.modules_to_save
    kept, expected = copies["a"].weight.clone(), logits(model, adapter_names=["a"] * 4)
    assert torch.equal(copies["sum"].weight, kept)
    model.set_adapter("sum")
    trained = [name for name, p in model.base_model.score.named_parameters() if p.requires_grad]
    assert trained == ["modules_to_save.sum.weight"]
    model.train()(IDS, labels=torch.tensor([0, 1, 2, 1])).loss.backward()
    torch.optim.SGD(copies["sum"].parameters(), lr=0.1).step()
    model.eval()
    assert not torch.equal(copies["sum"].weight, kept)
    assert torch.equal(copies["a"].weight, kept)
    assert torch.equal(logits(model, adapter_names=["a"] * 4), expected)
    after = logits(model)
    model.delete_adapter("a")
    assert list(copies) == ["sum"]
    assert torch.equal(logits(model), after)
    assert_close(logits(model.merge_and_unload()), after, "float32", moved_from=logits(classifier()))


def test_a_composition_of_copies_is_refused():
    model = road("ab")
    model.add_adapter("c", config(task_type=None))
    for names, weights, message in (
        (["a", "b"], [1, 1], "compose: expected one adapter at most with modules_to_save, found 'a', 'b'"),
        (["a", "c", "a"], [1, 1, 1], "compose: expected one adapter at most with modules_to_save, found 'a', 'a'"),
        (["c", "a"], [1, 0.5], "compose: expected weight 1 for 'a', which brings score whole, found 0.5"),
        (["a", "c"], [1], "weights: expected one for each of 2 adapters, found 1"),
        ([], [], "compose: expected at least one adapter, found none"),
    ):
        with pytest.raises(AdapterError, match=f"^{message}$"):
            model.add_weighted_adapter(names, weights, "sum")
        assert model.adapter_names == ["a", "b", "c"]
        assert list(model.base_model.score.modules_to_save) == ["a", "b"]


def test_a_module_that_takes_more_than_rows_in_a_mixed_batch():
    model = net(modules_to_save=["pair"])
    model.add_adapter("b", config(task_type=None, target_modules=["body"]))
    x = torch.randn(2, 8)
    with pytest.raises(AdapterError, match="pair: expected a call with one tensor"):
        model(x, adapter_names=["default", "b"])
    with torch.no_grad():
        assert torch.equal(model(x, adapter_names=["default", "default"]), model(x))


class Gives(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.inner, self.change = nn.Linear(8, 8), change

    def forward(self, x):
        return self.change(self.inner(x))


@pytest.mark.parametrize("change", [lambda y: (y, y), lambda y: y[1:], lambda y: y.sum()])
def test_a_module_that_gives_something_else_than_rows_in_a_mixed_batch(change):
    base = Net()
    base.last = Gives(change)
    model = RoadModel(base, config(task_type=None, target_modules=["body"], modules_to_save=["last"]))
    model.add_adapter("b", config(task_type=None, target_modules=["body"]))
    with pytest.raises(AdapterError, match="last: expected a module that gives one tensor with a row for each that it"):
        model(torch.randn(4, 8), adapter_names=["default", "b", "b", "default"])


def changed_file(tmp_path, change):
    road("a").save_pretrained(tmp_path / "saved", selected_adapters=["a"])
    adapter = read_peft(tmp_path / "saved" / "a")
    write_peft(tmp_path / "changed", change(adapter))
    return tmp_path / "changed"


def replace_saved(**tensors):
    return lambda adapter: dataclasses.replace(adapter, modules_to_save=tensors)


WRONG = {
    "missing": (replace_saved(), "score: expected a value for every tensor .* none for weight"),
    "shape": (
        replace_saved(**{"score.weight": named_values("w", 2, 128)}),
        r"score\.weight: expected shape \[3, 128\]",
    ),
    "extra": (
        replace_saved(**{"score.weight": named_values("w", 3, 128), "score.bias": named_values("b", 3)}),
        "score: expected only tensors of the module .*, found bias",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_refused(case, tmp_path):
    change, message = WRONG[case]
    folder = changed_file(tmp_path, change)
    base = classifier()
    modules = dict(base.named_modules())
    with pytest.raises(AdapterError, match=message):
        RoadModel.from_pretrained(base, folder)
    assert dict(base.named_modules()) == modules


def test_missing_tensors_by_the_caller_s_word(tmp_path):
    def change(adapter):
        modules = {path: pair for path, pair in adapter.modules.items() if "layers.1" not in path}
        return dataclasses.replace(adapter, modules=modules, modules_to_save={})

    folder = changed_file(tmp_path, change)
    model = RoadModel(classifier())
    with pytest.raises(
        AdapterError, match=r"found none for model\.layers\.1\.self_attn\.q_proj, model\.layers\.1\.mlp"
    ):
        model.load_adapter(folder, "a")
    assert not any(isinstance(module, RoadLayer) for module in model.modules())
    model.load_adapter(folder, "a", strict=False)
    layer = model.base_model.model.layers[1].mlp.down_proj
    assert torch.equal(layer.road_theta["a"], torch.zeros(64))
    assert torch.equal(layer.road_alpha["a"], torch.ones(64))
    expected = road("a")
    with torch.no_grad():
        for path in ("self_attn.q_proj", "mlp.down_proj"):
            one = expected.base_model.get_submodule(f"model.layers.1.{path}")
            one.road_theta["a"].zero_()
            one.road_alpha["a"].fill_(1.0)
        expected.base_model.score.modules_to_save["a"].weight.copy_(classifier().score.weight)
    torch.testing.assert_close(logits(model), logits(expected))
    # Unexpected or misshapen tensors are refused in any case.
    narrower = dataclasses.replace(read_peft(folder).config, target_modules=["q_proj"])
    write_peft(tmp_path / "extra", dataclasses.replace(read_peft(folder), config=narrower))
    with pytest.raises(AdapterError, match="only for modules that target_modules selects"):
        model.load_adapter(tmp_path / "extra", "b", strict=False)


@pytest.mark.parametrize("first", ["wrapped", "offloaded"])
def test_copies_that_accelerate_took_away_are_neither_trained_nor_saved(first, tmp_path):
    base = small_model()
    if first == "offloaded":
        accelerate.cpu_offload(base, execution_device="cpu")
    config = RoadConfig(target_modules=["q_proj"], group_size=8, modules_to_save=["lm_head"])
    model = RoadModel(base, config, "a").train()
    if first == "wrapped":
        accelerate.cpu_offload(model.base_model, execution_device="cpu")
    expected = logits(small_model())
    assert torch.equal(logits(model), expected)
    with pytest.raises(AdapterError, match=r"^lm_head: expected the copy of 'a' on a device to be trained"):
        model(IDS)
    with pytest.raises(AdapterError, match=r"^lm_head\.weight: expected the values of 'a' in memory"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(AdapterError, match=r"^lm_head\.weight: expected the values of 'a' in memory"):
        model.add_weighted_adapter(["a"], [1], "sum")
    RoadModel(small_model(), config).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match=r"^lm_head\.weight: expected the values of 'a' in memory"):
        model.hotswap_adapter(tmp_path / "other", "a")
    assert model.adapter_names == ["a"]
    assert not (tmp_path / "saved").exists()
    if first == "wrapped":
        accelerate.hooks.remove_hook_from_submodules(model.base_model)
        assert torch.equal(logits(model), expected)
        model.save_pretrained(tmp_path / "saved")


class Tied(nn.Module):
    """Calls its embedding, and also computes with the embedding's weight itself, as DeBERTa's head does."""

    def __init__(self):
        super().__init__()
        self.embedding, self.proj = nn.Embedding(32, 16), nn.Linear(16, 16)

    def forward(self, ids, head=True):
        weight = self.embedding.weight
        x = self.proj(self.embedding(ids)).to(weight.dtype, copy=len(weight) == 32 and weight.device.type == "cpu")
        return x @ weight.T if head else x


@torch.no_grad()
def test_a_tensor_that_the_model_reads_is_that_of_the_rows():
    torch.manual_seed(0)
    model, ids = RoadModel(Tied()), torch.arange(6).reshape(3, 2)
    for name in "ab":
        model.add_adapter(name, config(target_modules=["proj"], task_type=None, modules_to_save=["embedding"]))
        fill(model.base_model.embedding, name)
    alone = {}
    for name in "ab":
        model.set_adapter(name)
        alone[name] = model(ids)
    for name in "ab":
        assert torch.equal(model(ids, adapter_names=[name] * 3), alone[name])
        # The weight's shape, dtype and device may be read in any mixed batch.
        mixed = model(ids, head=False, adapter_names=["a", "b", "__base__"])
        model.set_adapter(name)
        assert torch.equal(mixed["ab".index(name)], model(ids, head=False)["ab".index(name)])
    with pytest.raises(AdapterError, match=r"embedding\.weight: expected a module that is called, .* each row"):
        model(ids, adapter_names=["a", "b", "__base__"])


def test_a_saved_embedding_is_untied_when_merged_for_good(tmp_path):
    base = small_model(tie_word_embeddings=True)
    model = RoadModel(base, config(task_type=None, modules_to_save=["embed_tokens"]), "a").eval()
    fill(base.model.embed_tokens, "a")
    expected = logits(model)
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert_close(logits(again), expected, "float32")


def test_an_embedding_that_nothing_calls_is_not_trained():
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    base = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    with pytest.raises(
        AdapterError, match=r"shared: expected .* is called, found one in place of which encoder\.embed"
    ):
        RoadModel(base, config(task_type=None, target_modules=["q"], modules_to_save=["shared"]))
