"""Rows that name several adapters, and subspaces, against road_core's float64 reference applied in order."""

import gc
import weakref

import pytest
import torch
import transformers
from _compare import assert_close, named_values
from _models import Net, small_checkpoint, small_model

import road_core
from road_core import read_peft, subspace_mask, write_peft
from road_torch import AdapterError, RoadConfig, RoadModel, _routing, load

IN, OUT = 16, 64
X = torch.from_numpy(named_values("x", 4, 3, IN))
VARIANTS = ["road_1", "road_2", "road_4"]


def add(model, name, variant="road_1", **changes):
    fields = {"target_modules": ["up", "down"], "group_size": 8, "inference_mode": True}
    model.add_adapter(name, RoadConfig(variant=variant, **{**fields, **changes}))
    for layer in (model.base_model.up, model.base_model.down):
        if name in layer.road_theta:
            fill(layer, name)


@torch.no_grad()
def fill(layer, name):
    n = len(layer.road_theta[name])
    layer.road_theta[name].copy_(torch.from_numpy(named_values(f"{name} t", n)))
    layer.road_alpha[name].copy_(torch.from_numpy(named_values(f"{name} a", n, mean=1, std=0.1)))


def road(*, max_loaded=None, **adapters):
    model = RoadModel(Net(IN, OUT), max_loaded=max_loaded).eval()
    for name, variant in adapters.items():
        add(model, name, variant)
    return model


def reference(model, *names):
    """Returns the net's output in float64, with adapters applied in order."""
    value, net = X.double(), Net(IN, OUT).double()
    for path in ("up", "down"):
        value, layer = getattr(net, path)(value).detach(), getattr(model.base_model, path)
        for name in names:
            if name in getattr(layer, "road_theta", ()):
                c = model.peft_config[name]
                pair = layer.road_theta[name].detach(), layer.road_alpha[name].detach()
                value = torch.from_numpy(
                    road_core.rotate(value, *pair, variant=c.variant, group_size=c.group_size, subspace=c.subspace)
                )
    return value


@torch.no_grad()
def check(model, rows):
    """Checks a mixed batch. ``rows`` has pairs of a row's name and the adapters that it means."""
    given = model(X, adapter_names=[name for name, _ in rows])
    for row, (_, names) in enumerate(rows):
        moved_from = reference(model)[row] if names else None
        assert_close(given[row], reference(model, *names)[row], "float32", moved_from=moved_from)


@pytest.mark.parametrize("second", VARIANTS)
@pytest.mark.parametrize("first", VARIANTS)
def test_a_row_may_name_several_adapters(first, second):
    model = road(a=first, b=second)
    add(model, "c", first, target_modules=["down"])
    check(model, [("a+b", "ab"), ("b+a", "ba"), ("a", "a"), ("__base__", "")])
    check(model, [(["b", "c"], "bc"), ("b+c+a", "bca"), ("a+a", "aa"), (["b"], "b")])
    model.set_adapter(["b", "a"])
    with torch.no_grad():
        assert_close(model(X, adapter_names=["b+a"] * 4), model(X), "float32", moved_from=Net(IN, OUT)(X))


def test_one_pass_for_a_mix_and_formed_once(monkeypatch):
    model = road(a="road_1", b="road_2")
    add(model, "other", group_size=16)
    layer, formed = model.base_model.up, []
    form = type(layer)._form
    monkeypatch.setattr(type(layer), "_form", lambda self, name: formed.append(name) or form(self, name))
    with torch.no_grad():
        model(X, adapter_names=["a+b", "b+a", "b", "a:1+b"])
        assert sum(not isinstance(name, str) for name in formed) == 4  # two mixes in two layers
        formed.clear()
        model(X, adapter_names=["b+a", "a+b", "__base__", "b"])
    assert not formed


@torch.no_grad()
def test_weights():
    model = road(a="road_1", b="road_1", c="road_4")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "wanted")
    model.add_weighted_adapter(["c", "a"], [0.5, -1.0], "mixed")
    given = model(X, adapter_names=["a:0.7+b:0.3", ["a:.7", "b:3e-1"], "c:0.5+a:-1", "c:1+c:-1"])
    for row, name in enumerate(["wanted", "wanted", "mixed", "__base__"]):
        assert_close(given[row], model(X, adapter_names=[name] * 4)[row], "float32")


def test_a_name_with_a_plus_is_a_name_first():
    model = road(a="road_1", b="road_1")
    add(model, "a+b", "road_2")
    add(model, "a:2", "road_2")
    check(model, [("a+b", ["a+b"]), (["a", "b"], "ab"), ("a:2", ["a:2"]), ("b+a:2", ["b", "a:2"])])


@torch.no_grad()
def test_a_mix_follows_its_adapters(tmp_path):
    model, other = road(a="road_1", b="road_2"), road(z="road_1")
    other.save_pretrained(tmp_path / "z", selected_adapters=["z"])
    names = [("a+b", "ab"), ("b+a", "ba"), ("a", "a"), ("b", "b")]
    check(model, names)
    model.base_model.up.road_theta["a"].add_(0.5)
    check(model, names)
    before = reference(model, "a", "b")
    model.hotswap_adapter(tmp_path / "z" / "z", "a")
    check(model, names)
    assert not torch.allclose(before, reference(model, "a", "b"))
    model.delete_adapter("b")
    with pytest.raises(AdapterError, match="expected one of 'a', found 'b'"):
        model(X, adapter_names=["a+b"] * 4)
    add(model, "b", "road_4")
    check(model, names)
    base = model.unload()
    torch.testing.assert_close(base(X), Net(IN, OUT)(X))


def test_deleted_adapters_of_mixes_are_let_go():
    model = road(a="road_1", b="road_1")
    with torch.no_grad():
        model(X, adapter_names=["a+b"] * 4)
    theta = weakref.ref(model.base_model.up.road_theta["b"])
    model.delete_adapter("b")
    gc.collect()
    assert theta() is None


def test_mixes_beyond_some_give_their_rows_to_others(monkeypatch):
    monkeypatch.setattr(_routing, "MIXES", 3)
    model, unbounded = road(a="road_1", b="road_1"), road(a="road_1", b="road_1")
    for weight in (0.1, 0.2, 0.3, 0.1, 0.4, 0.5):
        names = [f"a:{weight}+b", "a", "b", "__base__"]
        with torch.no_grad(), monkeypatch.context() as patch:
            found = model(X, adapter_names=names)
            patch.setattr(_routing, "MIXES", 99)
            assert torch.equal(found, unbounded(X, adapter_names=names))
    kept = [name[0][1] for name in model._shared.rows if not isinstance(name, str)]
    assert kept == [0.1, 0.4, 0.5]
    assert len(model.base_model.up.bank.first) == 8
    # All mixes of one call have a row, even beyond the limit.
    with torch.no_grad():
        names = [f"a:{weight}+b" for weight in (0.1, 0.2, 0.3, 0.4)]
        assert torch.equal(model(X, adapter_names=names), unbounded(X, adapter_names=names))


def test_little_room():
    # The active adapter keeps its place.
    model = road(max_loaded=3, a="road_1", b="road_2", c="road_1")
    check(model, [("a+b", "ab"), ("b+c", "bc"), ("a+b", "ab"), ("__base__", "")])
    check(model, [("c", "c"), ("b+c", "bc"), ("c", "c"), ("__base__", "")])
    check(model, [("a+b", "ab")] * 4)
    with pytest.raises(AdapterError, match="max_loaded: expected at most 3 adapters at once"):
        model(X, adapter_names=["a+b", "b+c", "c+a", "a"])
    check(model, [("a+b", "ab")] * 4)


def test_compiled():
    model = road(a="road_1", b="road_4")
    compiled = torch.compile(model, backend="eager")
    names = ["a+b", "b", "b+a", "__base__"]
    with torch.no_grad():
        expected = model(X, adapter_names=names)
        assert_close(compiled(X, adapter_names=names), expected, "float32", moved_from=model(X))
        names.reverse()
        assert_close(compiled(X, adapter_names=names), model(X, adapter_names=names), "float32")


def test_gradients_go_through_a_mix():
    model = road(a="road_1", b="road_2")
    add(model, "t", "road_1", inference_mode=False)
    model.set_adapter("t")
    model.train()
    rows = ["a+t", "t:0.5+b", "b:0.5+t", "a"]
    for layer in (model.base_model.up, model.base_model.down):
        layer.road_theta["b"].data.mul_(0.3)
    given = model(X, adapter_names=rows)
    model.eval()
    with torch.no_grad():
        assert_close(given.detach(), model(X, adapter_names=rows), "float32", moved_from=model(X))
    given.square().sum().backward()
    layer = model.base_model.down
    found, step = layer.road_theta["t"].grad, 1e-3
    assert layer.road_theta["a"].grad is None
    with torch.no_grad():
        ends = []
        for sign in (1, -2):
            layer.road_theta["t"][3] += sign * step
            ends.append(model(X, adapter_names=rows).double().square().sum())
    assert_close(found[3], (ends[0] - ends[1]) / (2 * step), "bfloat16")
    add(model, "u", "road_2", inference_mode=False)
    model.set_adapter("u")
    with pytest.raises(AdapterError, match="expected weight 1 for 'u' in training, as for every road_2"):
        model(X, adapter_names=["u:2"] * 4)


def trained(**changes):
    model = RoadModel(Net(IN, OUT))
    add(model, "t", inference_mode=False, **changes)
    return model.train()


@pytest.mark.parametrize("rows", [["t:0.5"] * 4, ["t:0.5", "t:-1", "t", "__base__"]])
def test_powers_of_scales_outside_the_subspace_are_not_taken(rows):
    model = trained(subspace=(0.25, 0.5))
    layer = model.base_model.up
    inside = torch.from_numpy(subspace_mask(OUT, variant="road_1", group_size=8, subspace=(0.25, 0.5)).copy())
    given = model(X, adapter_names=rows)
    given.square().sum().backward()
    expected = {kind: getattr(layer, kind)["t"].grad.clone() for kind in ("road_theta", "road_alpha")}
    model.zero_grad()
    with torch.no_grad():
        layer.road_alpha["t"][~inside] = torch.tensor([0.0, -1.0]).repeat(12)
        layer.road_theta["t"][~inside] = torch.inf
    again = model(X, adapter_names=rows)
    again.square().sum().backward()
    assert torch.equal(again, given)
    for kind, gradient in expected.items():
        assert torch.equal(getattr(layer, kind)["t"].grad, gradient)
        assert (gradient[~inside] == 0).all()
        assert (gradient[inside] != 0).all()


@pytest.mark.parametrize(
    ("weight", "alpha", "message"),
    [
        (0.5, -0.25, "up: expected positive scales for weight 0.5, found α = -0.25"),
        (0.5, 0.0, "up: expected positive scales for weight 0.5, found α = 0"),
        (-1, 0.0, "up: expected scales that have an inverse for weight -1, found α = 0"),
    ],
)
def test_a_power_that_training_has_lost(weight, alpha, message):
    model = trained()
    names = [f"t:{weight}"] * 4
    mixes = (names, [names[0], "t", "__base__", "t"])
    for rows in mixes:
        model(X, adapter_names=rows)
    with torch.no_grad():
        model.base_model.up.road_alpha["t"][3] = alpha
    for rows in mixes:
        for with_grad in (True, False):
            with torch.set_grad_enabled(with_grad), pytest.raises(AdapterError, match=f"^{message}$"):
                model(X, adapter_names=rows)
    # Whole powers exist, of 0 too.
    model(X, adapter_names=["t:0", "t:2", "t:3", "t"]).square().sum().backward()
    assert model.base_model.up.road_alpha["t"].grad.isfinite().all()


def test_powers_in_training_are_traced():
    model, names = trained(), ["t:0.5", "t:2", "t", "__base__"]
    with torch.no_grad():
        for layer in (model.base_model.up, model.base_model.down):
            layer.road_alpha["t"].abs_()
    expected = model(X, adapter_names=names)
    assert_close(
        torch.compile(model, backend="aot_eager")(X, adapter_names=names).detach(),
        expected.detach(),
        "float32",
        moved_from=Net(IN, OUT)(X).detach(),
    )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (X,), {"adapter_names": names}).square().sum()

    found = torch.func.grad(loss)(parameters)
    for name, gradient in zip(parameters, torch.autograd.grad(loss(parameters), parameters.values()), strict=True):
        assert_close(found[name].detach(), gradient, "float32")


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantised_bases(quantize, tmp_path):
    small_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    base, _ = load(tmp_path / "base", quantize=quantize, dtype="float32")
    ids = torch.arange(6, 14, device=base.device).reshape(2, 4)
    model = RoadModel(base)
    for name, variant in (("a", "road_1"), ("b", "road_2")):
        model.add_adapter(name, RoadConfig(variant=variant, target_modules="all-linear", inference_mode=True))
        for module in model.modules():
            if name in getattr(module, "road_theta", {}):
                fill(module, name)
    with torch.no_grad():
        mixed = model(ids, adapter_names=["a+b", "b"]).logits
        model.set_adapter(["a", "b"])
        assert_close(mixed[0], model(ids).logits[0], "float32", moved_from=mixed[1])


def test_the_whole_of_one_adapter_in_a_mix():
    base = transformers.LlamaForSequenceClassification(small_model().config).eval()
    model = RoadModel(base)
    fields = {"target_modules": ["q_proj"], "inference_mode": True}
    model.add_adapter("head", RoadConfig(**fields, task_type="SEQ_CLS"))
    model.add_adapter("head2", RoadConfig(**fields, task_type="SEQ_CLS"))
    model.add_adapter("a", RoadConfig(**fields, init_weights=False))
    with torch.no_grad():
        model.base_model.score.modules_to_save["head"].weight.mul_(3)
        ids = torch.arange(6, 14).reshape(2, 4)
        mixed = model(ids, adapter_names=["head+a", "a"]).logits
        alone = model(ids, adapter_names=["a", "a"]).logits
    assert_close(mixed[0], 3 * alone[0], "float32", moved_from=alone[0])
    for name, message in (
        ("head+head2", "one adapter at most that brings score whole, found head, head2"),
        ("head:0.5+a", "adapters without modules_to_save, found 'head' with score"),
    ):
        with pytest.raises(AdapterError, match=message):
            model(ids, adapter_names=[name, "a"])


REFUSED = {
    "unknown": ("a+z", "expected one of 'a', 'b', 'g', found 'z'"),
    "unknown weighted": ("z:2+a", "found 'z'"),
    "no weight": ("a:x", "found 'a:x'"),
    "base": ("a+__base__", "found '__base__'"),
    "empty part": ("a+", "found ''"),
    "not finite": ("a:nan+b", "expected finite weights, found nan for 'a'"),
    "empty": ([], r"expected a name or a list of names for each row, found \[\]"),
    "number": (3, "expected a name or a list of names for each row, found 3"),
    "group sizes": ("a+g", "one group size, found 8 in 'a' and 16 in 'g'"),
    "power": ("a:0.5+b", "up: expected positive scales for weight 0.5, found α = -1"),
    "inverse": ("b:-1", "up: expected blocks that have an inverse for weight -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    model = road(a="road_1", b="road_2")
    add(model, "g", group_size=16)
    with torch.no_grad():
        model.base_model.up.road_alpha["a"][2] = -1
        model.base_model.up.road_alpha["b"][:] = 0
    name, message = REFUSED[case]
    for _ in range(2):
        with pytest.raises(AdapterError, match=message) as caught:
            model(X, adapter_names=["a", name, "a", "a"])
        assert "\n" not in str(caught.value)
    check(model, [("a", "a"), ("g", "g"), ("b+a", "ba"), ("__base__", "")])


# Subspaces


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_touches_its_blocks_only(variant, tmp_path):
    subspace = (0.25, 0.5)
    model = RoadModel(Net(IN, OUT), RoadConfig(variant=variant, group_size=8, target_modules=["up"], subspace=subspace))
    layer, plain = model.base_model.up, Net(IN, OUT)(X).detach()
    mask = torch.from_numpy(subspace_mask(OUT, variant=variant, group_size=8, subspace=subspace).copy())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        for parameter in (layer.road_theta["default"], layer.road_alpha["default"]):
            assert (parameter.grad[~mask] == 0).all()
            assert (parameter.grad[mask] != 0).any()
        optimizer.step()
    # Weight decay moved α outside of the subspace, but that doesn't change the output.
    assert (layer.road_alpha["default"][~mask] != 1).all()
    up = layer(X).detach()
    blocks = torch.from_numpy(subspace_mask(OUT, variant="road_2", group_size=8, subspace=(0.25, 0.5)).copy())
    assert torch.equal(up[..., ~blocks], layer.base_layer(X)[..., ~blocks])
    assert not torch.allclose(up[..., blocks], layer.base_layer(X)[..., blocks])
    expected = reference(model, "default")
    model.eval()
    assert_close(model(X).detach(), expected, "float32", moved_from=plain)
    model.save_pretrained(tmp_path / "saved")
    again = RoadModel.from_pretrained(Net(IN, OUT), tmp_path / "saved")
    assert again.peft_config["default"].subspace == (0.25, 0.5)
    assert torch.equal(again(X), model(X))
    compiled = torch.compile(model.train(), backend="aot_eager")
    assert_close(compiled(X).detach(), expected, "float32")
    merged = model.merge_and_unload()
    assert_close(merged(X).detach(), expected, "float32", moved_from=plain)


@pytest.mark.parametrize("second", VARIANTS)
@pytest.mark.parametrize("first", VARIANTS)
def test_disjoint_subspaces_commute_bit_for_bit(first, second):
    model = RoadModel(Net(IN, OUT)).eval()
    add(model, "a", first, subspace=(0, 0.5))
    add(model, "b", second, subspace=(0.5, 1))
    names = ["a+b", "b+a", "a", "b"]
    with torch.no_grad():
        given = model(X[:1].repeat(4, 1, 1), adapter_names=names)
    assert torch.equal(given[0], given[1])
    check(model, [("a+b", "ab"), ("b+a", "ba"), ("a", "a"), ("b", "b")])


def test_a_bad_subspace_changes_nothing(tmp_path):
    model = road(a="road_1")
    with pytest.raises(AdapterError, match=r"up: expected a subspace that .* one of 32 blocks, found \(0.0, 0.01\)"):
        add(model, "b", subspace=(0, 0.01))
    model.save_pretrained(tmp_path / "a", selected_adapters=["a"])
    adapter = read_peft(tmp_path / "a" / "a")
    assert adapter.config.subspace is None
    write_peft(tmp_path / "b", adapter)
    assert model.adapter_names == ["a"]
