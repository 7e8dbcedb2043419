"""Mixed batches under gradient checkpointing: a backward pass recomputes layers with the call's adapters."""

import copy
import functools
import pickle

import bitsandbytes as bnb
import pytest
import torch
import torch.utils.checkpoint
from _models import Net, small_model
from torch import nn

from road_torch import AdapterError, RoadConfig, RoadModel
from road_torch._checkpoint import Checkpoint

IDS = torch.arange(3, 31).reshape(4, 7)
NAMES = ["a", "__base__", "b", "a"]
OTHERS = ["b", "c", "b+c", "__base__"]

kinds = pytest.mark.parametrize("reentrant", [False, True])


def config(**changes):
    fields = {"target_modules": "all-linear", "group_size": 8, "init_weights": False}
    return RoadConfig(**{**fields, **changes})


def quantized(base):
    for module in base.model.layers.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name.endswith(("q_proj", "down_proj")):
                new = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, compute_dtype=torch.float32)
                new.weight = bnb.nn.Params4bit(child.weight.detach(), requires_grad=False, quant_type="nf4")
                setattr(module, name, new.to("cpu"))
    return base


def made(reentrant=None, *, base=None, max_loaded=None, saved=None):
    """Returns a decoder with adapters a, b (both trained) and c, checkpointed unless ``reentrant`` is None."""
    model = RoadModel(small_model(num_hidden_layers=2) if base is None else base, max_loaded=max_loaded)
    for name in "abc":
        torch.manual_seed(ord(name))
        model.add_adapter(name, config(inference_mode=name == "c", modules_to_save=saved if name in "ac" else None))
    model.set_adapter(["a", "b"])
    if reentrant is not None:
        enable(model, reentrant)
    return model.train()


def enable(model, reentrant):
    model.base_model.activation_checkpointing_enable({"use_reentrant": reentrant})


def loss(model, names, ids=IDS):
    return model(ids, labels=ids, use_cache=False, adapter_names=names).loss


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(given, expected):
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(given[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=name)


def functions(model):
    return [vars(m)["_gradient_checkpointing_func"] for m in model.modules() if hasattr(m, "gradient_checkpointing")]


@pytest.mark.parametrize("kind", ["float32", "nf4"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@kinds
def test_gradients_are_those_without_checkpointing(reentrant, kind):
    found = []
    for checkpointing in (None, reentrant):
        base = small_model(num_hidden_layers=2)
        model = made(checkpointing, base=quantized(base) if kind == "nf4" else base)
        # One backward pass for two calls with different names, then one for each call.
        (loss(model, NAMES) + 2 * loss(model, OTHERS)).backward()
        values = gradients(model)
        for names in (OTHERS, NAMES):
            loss(model, names).backward()
        values |= {f"again {name}": value for name, value in gradients(model).items()}
        # Plain calls follow the active adapters, as before.
        loss(model, None).backward()
        values |= {f"plain {name}": value for name, value in gradients(model).items()}
        with torch.no_grad():
            values |= {f"logits {names}": model(IDS, adapter_names=names).logits for names in (NAMES, OTHERS)}
        kwargs = {"max_new_tokens": 2, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
        values["tokens"] = model.eval().generate(IDS, adapter_names=NAMES, **kwargs)
        assert model._shared.calls == []
        found.append(values)
    # θ and α of a and b in 14 layers, three times.
    assert len(found[0]) == 3 * 2 * 2 * 14 + 3
    assert_same(found[1], found[0])


@kinds
def test_modules_that_adapters_bring_whole(reentrant):
    found = []
    for checkpointing in (None, reentrant):
        model = made(checkpointing, saved=["post_attention_layernorm"])
        loss(model, NAMES).backward()
        found.append(gradients(model))
    assert any("modules_to_save" in name for name in found[0])
    assert_same(found[1], found[0])


@kinds
def test_gradients_for_what_comes_before_a_frozen_model(reentrant):
    """No adapter is trained, so coefficients are gathered by row in both passes."""
    found = []
    for checkpointing in (None, reentrant):
        model = made(checkpointing)
        model.set_adapter("c")
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=IDS, adapter_names=NAMES).loss.backward()
        found.append({"embedded": embedded.grad})
    assert_same(found[1], found[0])


@kinds
def test_adapters_that_made_room_before_the_backward_pass(reentrant):
    found = []
    for checkpointing in (None, reentrant):
        model = made(checkpointing, max_loaded=3)
        model.add_adapter("d", config(inference_mode=True))
        first = loss(model, NAMES[:1] + ["c"] * 3)
        second = loss(model, ["d", "b", "a", "d"])
        assert "c" not in model._shared.rows
        (first + second).backward()
        found.append(gradients(model))
    assert_same(found[1], found[0])


CHANGES = {
    "deleted": (lambda m, d: m.delete_adapter("c"), "'c' replaced or deleted"),
    "replaced": (
        lambda m, d: [m.delete_adapter("c"), m.add_adapter("c", config(inference_mode=True))],
        "'c' replaced or deleted",
    ),
    "swapped": (lambda m, d: m.hotswap_adapter(d, "c"), "'c' replaced or deleted"),
    "swapped twice": (lambda m, d: [m.hotswap_adapter(d, "c") for _ in range(2)], "'c' replaced or deleted"),
    "not active": (lambda m, d: m.set_adapter("c"), "others active"),
    "disabled": (lambda m, d: m.disable_adapter_layers(), "all disabled"),
    "merged": (lambda m, d: m.merge_adapter("c"), "some merged"),
    "unloaded": (lambda m, d: m.unload(), "'b' replaced or deleted"),
}


@pytest.mark.parametrize("change", CHANGES)
@kinds
def test_adapters_that_change_before_the_backward_pass(reentrant, change, tmp_path):
    model = made(reentrant)
    model.save_pretrained(tmp_path / "c", selected_adapters=["c"])
    given = loss(model, ["b", "c", "c", "__base__"])
    act, sentence = CHANGES[change]
    act(model, tmp_path / "c" / "c")
    with pytest.raises(AdapterError, match=rf"expected the adapters of a call .* found {sentence}") as caught:
        given.backward()
    assert "\n" not in str(caught.value)


@kinds
def test_what_does_not_matter_to_a_backward_pass(reentrant, tmp_path):
    found = []
    for checkpointing in (None, reentrant):
        model = made(checkpointing)
        model.save_pretrained(tmp_path / str(checkpointing), selected_adapters=["c"])
        given = loss(model, NAMES)
        model.hotswap_adapter(tmp_path / str(checkpointing) / "c", "c")
        model.delete_adapter("c")
        model.add_adapter("d", config())
        with model.disable_adapter():
            given = given + loss(model, ["a"] * 4)
        given.backward()
        found.append(gradients(model))
    assert_same(found[1], found[0])


@kinds
def test_the_base_is_given_back_as_it_was(reentrant):
    model = made(reentrant)
    before = functions(model.base_model)
    loss(model, NAMES).backward()
    wrapped = functions(model)
    assert len(before) == len(wrapped) > 0
    assert all(isinstance(function, Checkpoint) for function in wrapped)
    loss(model, NAMES).backward()
    assert all(one is other for one, other in zip(functions(model), wrapped, strict=True))
    gradients(model)
    assert pickle.loads(pickle.dumps(wrapped[0])).function.keywords == {"use_reentrant": reentrant}
    twin = copy.deepcopy(model)
    loss(twin, NAMES).backward()
    loss(model, NAMES).backward()
    expected = gradients(model)
    assert_same(gradients(twin), expected)
    # Checkpointing that is enabled in another way works, too.
    model.base_model.activation_checkpointing_disable()
    enable(model, not reentrant)
    loss(model, NAMES).backward()
    assert_same(gradients(model), expected)
    enable(model, reentrant)
    before = functions(model)
    loss(model, NAMES).backward()
    base = model.unload()
    assert all(one is other for one, other in zip(functions(base), before, strict=True))


class Blocks(nn.Module):
    """A model with its own checkpointing, around that of transformers or within it."""

    def __init__(self, *, inner, outer, own=None):
        super().__init__()
        self.net = Net(8, 64)
        self.gradient_checkpointing = True
        if own is not None:
            self._gradient_checkpointing_func = own
        self.inner, self.outer = inner, outer

    def block(self, x):
        if self.inner is None:
            return self.net(x)
        return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=self.inner)

    def between(self, x):
        return self._gradient_checkpointing_func(self.block, x)

    def forward(self, x):
        if self.outer is None:
            return self.between(x)
        return torch.utils.checkpoint.checkpoint(self.between, x, use_reentrant=self.outer)


@pytest.mark.parametrize(("inner", "outer"), [(False, None), (True, None), (None, False), (None, True)])
@pytest.mark.parametrize("trained", [False, True])
@kinds
def test_another_checkpointing_beside_that_of_transformers(reentrant, inner, outer, trained):
    own = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)
    model = RoadModel(Blocks(inner=inner, outer=outer, own=own)).train()
    for name in "ab":
        model.add_adapter(name, config(target_modules=["up", "down"], inference_mode=not trained))
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(AdapterError, match=r"expected a mixed batch without (reentrant )?checkpointing"):
        model(x, adapter_names=["b", "a"]).sum().backward()


def test_checkpointing_of_a_compiled_model():
    torch.compiler.reset()
    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    x, found = torch.randn(2, 8), []
    for own in (checkpoint, lambda block, x: block(x)):
        model = RoadModel(Blocks(inner=None, outer=None, own=own)).train()
        for name in "ab":
            torch.manual_seed(ord(name))
            model.add_adapter(name, config(target_modules=["up", "down"]))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True) if not found else model
        compiled(x, adapter_names=["b", "a"]).sum().backward()
        found.append(gradients(model))
    assert_same(*found)


def test_checkpointing_that_can_not_be_followed():
    model = RoadModel(Blocks(inner=None, outer=None), config(target_modules=["up"]), "a").train()
    with pytest.raises(AdapterError, match="through transformers' gradient_checkpointing_enable, found Blocks with"):
        model(torch.randn(2, 8), adapter_names=["a", "a"])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_blocks_in_training_below_a_model_that_evaluates():
    expected = made()
    loss(expected, NAMES).backward()
    model = made(True)
    torch.nn.Module.train(model.base_model)
    model.training = False
    loss(model, NAMES).backward()
    assert_same(gradients(model), gradients(expected))


class Reentrant(nn.Module):
    """A model that calls reentrant checkpointing itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
        return x


def test_plain_steps_go_on_after_a_refused_backward_pass():
    model = RoadModel(Reentrant(), config(target_modules=r"layers\.\d"), "a")
    x = torch.randn(2, 3, 8, requires_grad=True)
    with pytest.raises(AdapterError, match="expected a mixed batch without reentrant checkpointing"):
        model(x, adapter_names=["a", "__base__"]).sum().backward()
    for _ in range(2):
        model(x).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".road_" in name)
