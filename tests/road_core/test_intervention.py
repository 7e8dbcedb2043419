import json
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from _compare import assert_close, named_values

from road_core import (
    AdapterError,
    Intervention,
    InterventionConfig,
    intervene,
    parameter_size,
    position_mask,
    read_intervention,
    rotate,
    write_intervention,
)

HIDDEN = 32


def make(dtype=np.float32, **fields):
    config = InterventionConfig(**{"layers": (3, 1), "group_size": 8, **fields})
    size = parameter_size(config.variant, HIDDEN)
    return Intervention(
        config,
        {
            i: (
                named_values(f"{i} theta", size).astype(dtype),
                named_values(f"{i} alpha", size, mean=1.0, std=0.2).astype(dtype),
            )
            for i in config.layers
        },
    )


def dense_rotation(theta, group_size):
    """R of road_1 with α = 1, written out as a matrix, and the block of each row."""
    half = group_size // 2
    R, block = np.zeros((2 * len(theta), 2 * len(theta))), np.zeros(2 * len(theta), int)
    for pair, angle in enumerate(theta):
        i = pair // half * group_size + pair % half
        j = i + half
        R[i, i], R[i, j], R[j, i], R[j, j] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        block[i] = block[j] = pair
    return R, block


@pytest.mark.parametrize("group_size", [2, 8, 32])
@pytest.mark.parametrize("subspace", [(0.0, 1.0), (0.0, 0.5), (0.25, 0.6)])
def test_with_alpha_1_it_is_the_interchange_of_pyvene_and_the_papers_identity(group_size, subspace):
    theta = named_values("theta", HIDDEN // 2).astype(np.float64)
    b = named_values("h", 5, HIDDEN).astype(np.float64)
    R, block = dense_rotation(theta, group_size)
    start, stop = (round(fraction * HIDDEN / 2) for fraction in subspace)
    rows = (block >= start) & (block < stop)
    actual = intervene(
        b, theta, np.ones(HIDDEN // 2), np.ones(5), variant="road_1", group_size=group_size, subspace=subspace
    )

    # As pyvene does it: the base, with its own rows in the rotated space replaced by those of the rotated source.
    R_s, s = R[rows], b @ R.T
    assert_close(actual, b + (s @ R_s.T - b @ R_s.T) @ R_s, "float64", moved_from=b)
    # LoReFT's form h + Pᵀ(W h + c − P h), with P = Rᵀ, and W = 1 and c = 0 within the subspace: the paper's identity.
    within = R[np.ix_(rows, rows)]
    expected = b.copy()
    expected[:, rows] += (b[:, rows] - b[:, rows] @ within) @ within.T
    assert_close(actual, expected, "float64")


def test_with_other_alpha_the_literal_formula_is_another_function():
    """Written out, b + Rᵀ(R s − R b) becomes b + α²(s − b), which isn't α times a rotation."""
    theta, alpha = named_values("theta", HIDDEN // 2).astype(np.float64), np.full(HIDDEN // 2, 1.5)
    b = named_values("h", 5, HIDDEN).astype(np.float64)
    R = 1.5 * dense_rotation(theta, 8)[0]
    ours = intervene(b, theta, alpha, np.ones(5), variant="road_1", group_size=8)
    assert_close(ours, b @ R.T, "float64", moved_from=b)
    literal = b + (b @ R.T @ R.T - b @ R.T) @ R
    assert_close(literal, b + 1.5**2 * (ours - b), "float64", moved_from=ours)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_only_the_masks_tokens_and_the_subspaces_pairs_change(variant):
    h = named_values("h", 2, 4, HIDDEN)
    size = parameter_size(variant, HIDDEN)
    theta, alpha = named_values("theta", size), named_values("alpha", size, mean=1.0)
    mask = np.array([[0, 1, 0, 1], [1, 0, 0, 0]], bool)
    fields = {"variant": variant, "group_size": 8, "subspace": (0.5, 1)}
    actual = intervene(h, theta, alpha, mask, **fields)
    np.testing.assert_array_equal(actual[~mask], h[~mask])
    np.testing.assert_array_equal(actual[..., : HIDDEN // 2], h[..., : HIDDEN // 2])
    np.testing.assert_array_equal(actual[mask], rotate(h, theta, alpha, **fields)[mask])
    assert (actual[mask][:, HIDDEN // 2 :] != h[mask][:, HIDDEN // 2 :]).all()


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", ["11111", "11111", "11111", "11111"]),
        ("last", ["00001", "00100", "00010", "00101"]),
        ("first", ["00100", "10000", "01000", "10010"]),
        ("first:2", ["00110", "11000", "01100", "11011"]),
        ("first+last:2", ["00111", "11100", "01110", "11111"]),
        ("first:9", ["00111", "11100", "01110", "11111"]),
    ],
)
def test_position_mask(positions, expected):
    """Left and right padding, an answer after the prompt, and two texts in a row (the first of three tokens)."""
    prompt = [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 2, 2]]
    found = position_mask(prompt, positions).astype(int)
    assert ["".join(map(str, row)) for row in found] == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("variant", ["road_1", "road_4"])
def test_what_is_written_is_read_bit_for_bit(dtype, variant, tmp_path):
    made = make(dtype, variant=variant, positions="first:2+last:3", subspace=(0, 0.5))
    write_intervention(tmp_path / "a", made)
    read = read_intervention(tmp_path / "a")
    assert read.config == made.config
    assert read.config.layers == (1, 3)
    assert read.hidden_size == HIDDEN
    assert read.digest() == made.digest()
    assert {k: v.tobytes() for k, v in read.tensors().items()} == {k: v.tobytes() for k, v in made.tensors().items()}
    write_intervention(tmp_path / "b", read)
    for name in ("intervention_config.json", "intervention.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_cleared_is_the_same_function():
    made = make(subspace=(0.25, 0.5))
    h = named_values("h", 3, HIDDEN)
    for i, (theta, alpha) in made.cleared().layers.items():
        plain = intervene(h, theta, alpha, np.ones(3), variant="road_1", group_size=8)
        within = intervene(h, *made.layers[i], np.ones(3), variant="road_1", group_size=8, subspace=(0.25, 0.5))
        np.testing.assert_array_equal(plain, within)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": ()}, "layers: expected indices from 0 up, each once, found ()"),
        ({"layers": (1, 1)}, "layers: expected indices from 0 up, each once, found (1, 1)"),
        ({"layers": (-1,)}, "layers: expected indices from 0 up"),
        ({"layers": "1"}, "layers: expected indices from 0 up"),
        ({"positions": "middle"}, "positions: expected 'all', 'first:k', 'last:k' or 'first:k+last:k', found 'middle'"),
        ({"positions": "first:0"}, "positions: expected 'all'"),
        ({"positions": "last+last:2"}, "positions: expected 'all'"),
        ({"positions": ""}, "positions: expected 'all'"),
        ({"positions": 3}, "positions: expected 'all'"),
        ({"group_size": 3}, "InterventionConfig.group_size: expected an even number from 2 up, found 3"),
        ({"subspace": (0.5, 0.5)}, "InterventionConfig.subspace: expected two fractions"),
    ],
)
def test_a_config_checks_itself(fields, message):
    with pytest.raises(AdapterError, match=re.escape(message)):
        InterventionConfig(**{"layers": (0,), **fields})


def test_an_intervention_checks_itself():
    theta, alpha = np.zeros(16, np.float32), np.ones(16, np.float32)
    config = InterventionConfig(layers=(0, 1), group_size=8)
    with pytest.raises(AdapterError, match=r"expected θ and α of the blocks \[0, 1\], found \[0\]"):
        Intervention(config, {0: (theta, alpha)})
    with pytest.raises(AdapterError, match=r"expected θ of one axis and size, found \[\[12\], \[16\]\]"):
        Intervention(config, {0: (theta, alpha), 1: (theta[:12], alpha[:12])})
    with pytest.raises(AdapterError, match=r"layers\.1\.road_alpha: expected finite values, found 16"):
        Intervention(config, {0: (theta, alpha), 1: (theta, alpha * np.nan)})
    with pytest.raises(AdapterError, match="expected a subspace that takes in at least one"):
        Intervention(InterventionConfig(layers=(0,), group_size=8, subspace=(0, 0.01)), {0: (theta, alpha)})


def test_a_changed_folder_is_refused(tmp_path):
    write_intervention(tmp_path, made := make(), overwrite=True)
    with pytest.raises(AdapterError, match="expected an empty or new folder"):
        write_intervention(tmp_path, made)
    config, tensors = tmp_path / "intervention_config.json", tmp_path / "intervention.safetensors"
    fields, data = json.loads(config.read_text()), tensors.read_bytes()

    def refused(message, **changes):
        config.write_text(json.dumps({**fields, **changes}))
        with pytest.raises(AdapterError, match=message):
            read_intervention(tmp_path)
        config.write_text(json.dumps(fields))

    refused("expected the digest", positions="all")
    refused("expected the digest", variant="road_2", group_size=4)
    refused("expected the digest", subspace=[0, 0.5])
    refused(r"for \[1\], found a difference in layers\.3\.road_alpha, layers\.3\.road_theta", layers=[1])
    refused("intervention_type: expected 'ROAD', found 'LOREFT'", intervention_type="LOREFT")
    refused("found a difference in dropout", dropout=0.1)
    config.write_text(json.dumps({k: v for k, v in fields.items() if k != "positions"}))
    with pytest.raises(AdapterError, match=r"intervention_config\.json: .* found a difference in positions"):
        read_intervention(tmp_path)
    config.write_text(json.dumps(fields))
    # A file without a digest, written by another tool.
    safetensors.numpy.save_file(made.tensors(), tensors)
    with pytest.raises(AdapterError, match="expected the digest None"):
        read_intervention(tmp_path)
    tensors.write_bytes(data[:-1])
    with pytest.raises(AdapterError, match="expected a whole safetensors file"):
        read_intervention(tmp_path)
    tensors.write_bytes(data)
    assert read_intervention(tmp_path).config == made.config
