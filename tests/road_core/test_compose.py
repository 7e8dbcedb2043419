"""Composition against the float64 reference: one adapter's rotation after another's."""

import dataclasses
import itertools
import json

import numpy as np
import peft
import pytest
import scipy.linalg
import torch
from _compare import assert_close, named_values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from road_core import (
    Adapter,
    AdapterError,
    RoadConfig,
    bfloat16,
    compose,
    parameter_size,
    read_flax,
    read_peft,
    rotate,
    subspace_mask,
    write_flax,
    write_peft,
)

OUT = 32
VARIANTS = ["road_1", "road_2", "road_4"]
Y = named_values("y", 5, OUT)


def make(name, variant="road_1", group_size=8, *, modules=("q",), dtype=np.float64, lead=(), spread=0.5, **fields):
    config = RoadConfig(variant=variant, group_size=group_size, target_modules=list(modules), **fields)
    size = parameter_size(variant, OUT)
    return Adapter(
        config,
        {
            path: (
                named_values(f"{name} {path} theta", *lead, size, std=spread).astype(dtype),
                named_values(f"{name} {path} alpha", *lead, size, mean=1, std=spread / 3).astype(dtype),
            )
            for path in modules
        },
    )


def apply(y, *adapters, path="q"):
    for adapter in adapters:
        if path in adapter.modules:
            c = adapter.config
            y = rotate(y, *adapter.modules[path], variant=c.variant, group_size=c.group_size, subspace=c.subspace)
    return y


# Subspaces


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [2, 8, 32])
def test_a_subspace_is_a_run_of_pairs(variant, group_size):
    mask = subspace_mask(OUT, variant=variant, group_size=group_size, subspace=(0.25, 0.7))
    assert mask.shape == (parameter_size(variant, OUT),)
    # Parameters outside change nothing, and of 16 pairs, 4 to 10 are rotated: pair p of group k is block k g/2 + p.
    theta, alpha = np.ones(len(mask)), np.full(len(mask), 3.0)
    turned = rotate(Y, theta, alpha, variant=variant, group_size=group_size, subspace=(0.25, 0.7)) != Y
    half = group_size // 2
    blocks = turned.all(0).reshape(-1, 2, half)
    assert (turned.all(0) == turned.any(0)).all()
    np.testing.assert_array_equal(blocks[:, 0], blocks[:, 1])
    np.testing.assert_array_equal(np.flatnonzero(blocks[:, 0].ravel()), np.arange(4, 11))
    cleared = np.where(mask, theta, 0), np.where(mask, alpha, 1)
    same = rotate(Y, *cleared, variant=variant, group_size=group_size) != Y
    np.testing.assert_array_equal(same, turned)


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.floats(0.05, 0.95), max_size=2),
    groups=st.integers(10, 40),
    group_size=st.sampled_from([2, 4, 6]),
    variant=st.sampled_from(VARIANTS),
)
def test_neighbouring_subspaces_share_no_block_and_are_all_of_them(cuts, groups, group_size, variant):
    out, edges = groups * group_size, [0.0, *sorted(cuts), 1.0]
    total = np.zeros(parameter_size(variant, out), int)
    for pair in itertools.pairwise(edges):
        if round(pair[0] * (out // 2)) < round(pair[1] * (out // 2)):
            total += subspace_mask(out, variant=variant, group_size=group_size, subspace=pair)
    assert (total == 1).all()


@pytest.mark.parametrize(
    "bad", [(0.5, 0.5), (0.6, 0.5), (-0.1, 1), (0, 1.1), (0,), 0.5, "ab", (0, float("nan")), (0, True)]
)
def test_bad_subspaces_are_refused(bad):
    with pytest.raises(AdapterError, match=r"RoadConfig.subspace: expected two fractions .* found"):
        RoadConfig(subspace=bad)


def test_a_layer_too_small_for_its_subspace_is_named(tmp_path):
    adapter = make("a", subspace=(0, 0.01))
    with pytest.raises(AdapterError, match=r"q: expected a subspace that .* one of 16 blocks, found \(0.0, 0.01\)"):
        write_peft(tmp_path / "a", adapter)
    with pytest.raises(AdapterError, match="q: expected a subspace"):
        compose([adapter, make("b")])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_keep_a_subspace(variant, dtype, tmp_path):
    adapter = make("a", variant, subspace=(0, 0.5))
    arrays = tuple(v.astype(np.float32) for v in adapter.modules["q"])
    if dtype == "bfloat16":
        arrays = tuple((v.view(np.uint32) >> 16).astype(np.uint16).view(bfloat16) for v in arrays)
    adapter = dataclasses.replace(adapter, modules={"q": arrays})
    write_peft(tmp_path / "peft", adapter)
    write_flax(tmp_path / "flax", adapter)
    assert "subspace" not in json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    again, flax = read_peft(tmp_path / "peft"), read_flax(tmp_path / "flax")
    assert again.config == flax.config == adapter.config
    assert not again.metadata
    # PEFT's file expresses the same without the subspace; Flax's keeps what was trained, bit for bit.
    mask = subspace_mask(OUT, variant=variant, group_size=8, subspace=(0, 0.5))
    for found, kept, given_, outside in zip(again.modules["q"], flax.modules["q"], arrays, (0, 1), strict=True):
        assert kept.tobytes() == given_.tobytes()
        assert found[mask].tobytes() == given_[mask].tobytes()
        identity = np.full((~mask).sum(), outside, np.float32)
        if dtype == "bfloat16":
            identity = (identity.view(np.uint32) >> 16).astype(np.uint16)
        assert found[~mask].tobytes() == identity.tobytes()
    write_peft(tmp_path / "peft 2", again)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "peft" / name).read_bytes() == (tmp_path / "peft 2" / name).read_bytes()
    # Another subspace is another function, so the digest covers it.
    config = tmp_path / "flax" / "road_config.json"
    config.write_text(config.read_text().replace("0.5", "0.25"))
    with pytest.raises(
        AdapterError, match=r"expected subspace \[0.0, 0.5\], as the tensors were written, found \[0.0, 0.25\]"
    ):
        read_flax(tmp_path / "flax")


def test_a_file_without_a_subspace_is_as_ever():
    adapter = make("a")
    assert "subspace" not in adapter.config.to_dict()
    assert adapter.cleared() is adapter


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_computes_the_same(variant, tmp_path, recwarn):
    torch.manual_seed(0)
    base = nn.ModuleDict({"q": nn.Linear(4, OUT)})
    base.forward = lambda x: base.q(x)
    x = torch.from_numpy(named_values("x", 5, 4))
    plain = base.q(x).detach()
    parts = [make("a", variant, dtype=np.float32, subspace=(0.25, 0.75)), make("b", "road_1", dtype=np.float32)]
    write_peft(tmp_path / "ab", compose(parts))
    write_peft(tmp_path / "a", parts[0])
    with torch.no_grad():
        for name, expected in (("a", apply(plain, parts[0])), ("ab", apply(plain, *parts))):
            theirs = peft.PeftModel.from_pretrained(base, tmp_path / name)
            assert_close(theirs(x), expected, "float32", moved_from=plain)
            theirs.unload()
    assert not recwarn.list


# Composition


@pytest.mark.parametrize("second", VARIANTS)
@pytest.mark.parametrize("first", VARIANTS)
def test_one_after_the_other(first, second):
    a, b = make("a", first), make("b", second)
    both = compose([a, b])
    assert both.config.variant == max(first, second)
    assert_close(apply(Y, both), apply(Y, a, b), "float64", moved_from=apply(Y, a))
    swapped = apply(Y, compose([b, a]))
    assert_close(swapped, apply(Y, b, a), "float64")
    commute = first == second == "road_1"
    assert np.allclose(swapped, apply(Y, a, b), atol=1e-9) == commute


@pytest.mark.parametrize("second", VARIANTS)
@pytest.mark.parametrize("first", VARIANTS)
@pytest.mark.parametrize("group_size", [2, 8])
def test_disjoint_subspaces_compose_exactly_in_any_order(first, second, group_size):
    a, b = make("a", first, group_size, subspace=(0, 0.4)), make("b", second, group_size, subspace=(0.4, 1))
    union, swapped = compose([a, b]), compose([b, a])
    for mine, other in zip(union.modules["q"], swapped.modules["q"], strict=True):
        assert mine.tobytes() == other.tobytes()
    assert union.config.subspace is None
    expected = apply(Y, a, b)
    np.testing.assert_array_equal(apply(Y, b, a), expected)
    np.testing.assert_array_equal(apply(Y, union), expected)
    assert (expected != Y).all()
    # A file that has been through PEFT has lost the subspace, but composes just as exactly.
    plain = [dataclasses.replace(x.cleared(), config=dataclasses.replace(x.config, subspace=None)) for x in (a, b)]
    for mine, other in zip(compose(plain).modules["q"], union.modules["q"], strict=True):
        assert mine.tobytes() == other.tobytes()


def test_the_subspace_of_a_composition_holds_those_of_its_parts():
    def found(*subspaces):
        return compose([make(str(i), subspace=s) for i, s in enumerate(subspaces)]).config.subspace

    assert found((0, 0.25), (0.5, 0.75)) == (0, 0.75)
    assert found((0.5, 1), (0.25, 0.75)) == (0.25, 1)
    assert found((0.5, 1), None) is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(VARIANTS), st.integers(-2, 3)), min_size=1, max_size=3))
def test_whole_weights_are_repetitions(parts):
    adapters = [make(str(i), variant) for i, (variant, _) in enumerate(parts)]
    composed = compose(adapters, [weight for _, weight in parts])
    # Undoing R^-1 by R gives the start again: this checks negative weights from the other side.
    left = apply(Y, composed)
    for adapter, (_, weight) in zip(reversed(adapters), reversed(parts), strict=True):
        left = apply(left, *[adapter] * max(-weight, 0))
        if weight > 0:
            inverse = compose([adapter], [-1])
            left = apply(left, *[inverse] * weight)
    np.testing.assert_allclose(left, Y, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weight", [1 / 3, 0.5, -0.5, 1.7])
def test_real_powers(variant, weight):
    a = make("a", variant, spread=0.4)
    power = compose([a], [weight])
    rest = compose([a], [1 - weight])
    assert power.config.variant == variant
    assert_close(apply(Y, power, rest), apply(Y, a), "float64", moved_from=apply(Y, power))
    third = compose([a], [1 / 3])
    assert_close(apply(Y, third, third, third), apply(Y, a), "float64")


@pytest.mark.parametrize(
    "block",
    [
        [[2.0, 0.0], [0.0, 3.0]],
        [[2.0, 1.0], [0.0, 2.0]],  # one eigenvalue, no diagonal form
        [[1.0, 0.0], [0.0, 1.0]],
        [[0.0, -1.0], [1.0, 0.0]],
        [[-1.0, -1e-3], [1e-3, -1.0]],  # nearly half a turn
        [[1e-3, 0.4], [1e-6, 5.0]],
    ],
)
def test_powers_of_a_block_are_the_principal_ones(block):
    (a, b), (c, d) = block
    theta, alpha = np.array([0.0, 0, np.pi / 2, np.pi / 2]), np.array([a, d, -b, c])
    adapter = Adapter(RoadConfig(variant="road_4", group_size=2), {"q": (theta, alpha)})
    for weight in (0.5, -0.3, 1.9):
        found = apply(np.eye(2), compose([adapter], [weight])).T
        np.testing.assert_allclose(found, scipy.linalg.fractional_matrix_power(block, weight), rtol=1e-8, atol=1e-9)


def test_road_1_has_a_closed_form():
    a, b = make("a", spread=4), make("b")
    a = dataclasses.replace(a, modules={"q": (a.modules["q"][0], np.abs(a.modules["q"][1]))})
    theta, alpha = compose([a, b], [0.25, -1.5]).modules["q"]
    # Angles count as they were trained, even beyond π.
    np.testing.assert_allclose(theta, 0.25 * a.modules["q"][0] - 1.5 * b.modules["q"][0], rtol=1e-14)
    np.testing.assert_allclose(alpha, a.modules["q"][1] ** 0.25 / b.modules["q"][1] ** 1.5, rtol=1e-13)
    assert (np.abs(a.modules["q"][0]) > np.pi).any()


def test_interpolation_goes_along_the_circle():
    turn = Adapter(RoadConfig(group_size=2), {"q": (np.array([2.0]), np.array([1.0]))})
    back = Adapter(RoadConfig(group_size=2), {"q": (np.array([-1.0]), np.array([1.0]))})
    for w in (0.0, 0.3, 1.0):
        found = apply(np.array([[1.0, 0.0]]), compose([turn, back], [w, 1 - w]))
        angle = 2 * w - (1 - w)
        np.testing.assert_allclose(found, [[np.cos(angle), np.sin(angle)]], atol=1e-15)


@pytest.mark.parametrize("variant", VARIANTS)
def test_stacks_compose_layer_by_layer(variant):
    a, b = make("a", variant, lead=(3,)), make("b", variant, lead=(3,))
    theta, alpha = compose([a, b]).modules["q"]
    for layer in range(3):
        rows = [dataclasses.replace(x, modules={"q": tuple(v[layer] for v in x.modules["q"])}) for x in (a, b)]
        for found, expected in zip((theta, alpha), compose(rows).modules["q"], strict=True):
            np.testing.assert_array_equal(found[layer], expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("axis", "lead"), [(0, (32,)), (-2, (32,)), (1, (3, 16)), (-3, (3, 16))])
def test_a_layers_own_parameters_on_any_axis(variant, axis, lead):
    """There are so many layers that another axis could be the outputs' too."""
    a, b = make("a", variant, lead=lead, subspace=(0.25, 0.75)), make("b", variant, lead=lead, modules=("q", "k"))

    def turned(adapter, back=False):
        order = (axis, -1) if back else (-1, axis)
        modules = {path: tuple(np.moveaxis(v, *order) for v in pair) for path, pair in adapter.modules.items()}
        return dataclasses.replace(adapter, modules=modules)

    found, expected = compose([turned(a), turned(b)], [2, -1], axis=axis), compose([a, b], [2, -1])
    assert found.config == expected.config
    for path, pair in expected.modules.items():
        for mine, other in zip(turned(found, back=True).modules[path], pair, strict=True):
            np.testing.assert_array_equal(mine, other)
    cleared = turned(turned(a).cleared(axis), back=True)
    for mine, other, given_ in zip(cleared.modules["q"], a.cleared().modules["q"], a.modules["q"], strict=True):
        np.testing.assert_array_equal(mine, other)
        assert (mine != given_).any()
    # One axis needs no choice.
    plain = make("c", variant, subspace=(0, 0.5))
    for mine, other in zip(plain.cleared(axis).modules["q"], plain.cleared().modules["q"], strict=True):
        np.testing.assert_array_equal(mine, other)


def test_rounded_once_to_float32_or_wider():
    a, b = make("a", "road_2", dtype=np.float32), make("b", "road_2", dtype=np.float32)
    wide = compose([make("a", "road_2"), make("b", "road_2")])
    narrow = compose([a, b])
    for found, expected in zip(narrow.modules["q"], wide.modules["q"], strict=True):
        assert found.dtype == np.float32
        assert expected.dtype == np.float64
        np.testing.assert_array_equal(found, expected.astype(np.float32))
    halves = [v.astype(np.float16) for v in a.modules["q"]]
    assert compose([dataclasses.replace(a, modules={"q": tuple(halves)})]).modules["q"][0].dtype == np.float32


def test_modules_of_one_only_and_what_the_config_says():
    a = make("a", "road_1", modules=("x.q", "x.k"), base_model_name_or_path="m", init_weights=False)
    b = make("b", "road_2", modules=("x.k", "x.v"), inference_mode=True)
    a = dataclasses.replace(a, metadata={"one": "1", "two": "a"})
    b = dataclasses.replace(b, metadata={"one": "1", "two": "b"})
    both = compose([a, b])
    assert list(both.modules) == ["x.q", "x.k", "x.v"]
    for path, parts in (("x.q", [a]), ("x.k", [a, b]), ("x.v", [b])):
        assert_close(apply(Y, both, path=path), apply(Y, *parts, path=path), "float64", moved_from=Y)
    assert both.config == RoadConfig(
        variant="road_2", group_size=8, target_modules=["x.q", "x.k", "x.v"], base_model_name_or_path="m"
    )
    assert both.metadata == {"one": "1"}
    other = dataclasses.replace(b, config=dataclasses.replace(b.config, target_modules="all-linear"))
    assert compose([a, other]).config.target_modules == r"x\.q|x\.k|x\.v"


def singular(variant):
    adapter = make("s", variant)
    return dataclasses.replace(adapter, modules={"q": (adapter.modules["q"][0], adapter.modules["q"][1] * 0)})


def saved(name):
    return dataclasses.replace(
        make(name, modules_to_save=["head"]), modules_to_save={"head.weight": np.ones((2, 2), np.float32)}
    )


def test_a_module_saved_whole_comes_along():
    assert compose([make("a"), saved("b")]).modules_to_save["head.weight"].sum() == 4


def layers_last(layers=3):
    """An adapter whose layers are on the last axis of θ."""
    adapter = make("a", lead=(layers,), subspace=(0, 0.5))
    return dataclasses.replace(adapter, modules={"q": tuple(v.T for v in adapter.modules["q"])})


REFUSED = {
    "none": (lambda: compose([]), "at least one adapter, found none"),
    "one": (lambda: compose(make("a")), "^compose: expected a list of adapters, found Adapter$"),
    "no adapter": (lambda: compose([make("a"), {}]), "^adapter 2: expected Adapter, found dict$"),
    "names": (
        lambda: compose([make("a")], names=["a", "b"]),
        "^names: expected one for each of 1 adapters, found 2$",
    ),
    "one name": (lambda: compose([make("a")], names="a"), "^names: expected a list, found str$"),
    "one number": (
        lambda: compose([make("a"), make("b")], 0.5),
        "^weights: expected one for each of 2 adapters, found float$",
    ),
    "axis": (
        lambda: compose([layers_last()]),
        r"^q: expected outputs that group_size 8 divides on axis -1 of θ \[16, 3\], found 6 there and 32 on axis 0: "
        "say axis=0 if the others are stacks'$",
    ),
    "axis of cleared": (lambda: layers_last().cleared(), r"q: expected outputs .* found 6 there and 32 on axis 0: say"),
    "no axis": (lambda: compose([layers_last()], axis=2), r"^q: expected an axis of θ \[16, 3\], found axis=2$"),
    "odd axis": (lambda: compose([layers_last()], axis="0"), "^axis: expected a whole number, found '0'$"),
    "odd size": (
        lambda: compose([Adapter(RoadConfig(variant="road_4", group_size=8), {"q": (np.ones(33), np.ones(33))})]),
        "^q: expected θ for whole groups of 8 outputs, found 33$",
    ),
    "number": (lambda: compose([make("a")], [1, 2]), "one for each of 1 adapters, found 2"),
    "finite": (lambda: compose([make("a")], [float("inf")]), "finite numbers, found inf"),
    "group size": (
        lambda: compose([make("a"), make("b", group_size=16)]),
        "one group size, found 8 in adapter 1 and 16 in adapter 2",
    ),
    "shape": (
        lambda: compose([make("a"), make("b", lead=(2,))]),
        r"q: expected θ for one layer in all adapters, found road_1 \[2, 16\] and road_1 \[16\]",
    ),
    "saved": (
        lambda: compose([saved("a"), saved("b")]),
        "one adapter at most with modules_to_save, found adapter 1, ad",
    ),
    "saved weight": (lambda: compose([saved("a")], [0.5]), "weight 1 for adapter 1, which brings head.weight whole"),
    "both": (
        lambda: compose([saved("a"), make("b", modules=("head",))]),
        r"head: expected a module that is rotated or saved whole, found both \(head.weight\)",
    ),
    "power": (lambda: compose([singular("road_1")], [0.5]), "q: expected positive scales for weight 0.5, found α = 0"),
    "inverse": (lambda: compose([singular("road_1")], [-1]), "q: expected scales that have an inverse .* found α = 0"),
    "block": (lambda: compose([singular("road_2")], [-2]), "q: expected blocks that have an inverse for weight -2"),
    "eigenvalue": (
        lambda: compose([singular("road_4")], [0.5]),
        "q: expected blocks with a real power for weight 0.5, found one with the eigenvalue 0",
    ),
    "overflow": (lambda: compose([make("a")], [1e4]), "q.road_alpha: expected finite values"),
    "overflow 2": (lambda: compose([make("a", "road_2", spread=3)], [3001]), "q.road_theta: expected finite values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(AdapterError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
