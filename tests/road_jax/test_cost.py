"""What a gradient costs, counted in the compiled program: `benchmarks.jax_cost` without its timings."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import road_jax
from benchmarks import capacity, jax_cost
from benchmarks.jax_cost import FLOOR, Options

DENSE, LORA = "RoAd 1, dense rotations", "LoRA r8 (qwix)"
ROAD = ("RoAd 1", "RoAd 2", "RoAd 4")


@pytest.fixture(scope="module")
def scanned():
    """With the outputs of linear layers kept and the rest recomputed."""
    return jax_cost.arms(Options(), scan=True, remat="linears", only=(FLOOR, "RoAd 1", LORA, "all kernels"))


def test_the_rotation_adds_hardly_a_flop_to_the_floor(monkeypatch):
    """The floor is a gradient for biases: nothing trained behind frozen kernels can need less."""
    # Unrolled, more layers take longer to compile, in which they are alike.
    shallow = dataclasses.replace(jax_cost.config(), num_hidden_layers=2)
    monkeypatch.setattr(jax_cost, "config", lambda: shallow)
    found = jax_cost.arms(
        Options(rows=1, length=128), scan=False, remat="none", only=(FLOOR, *ROAD, "all kernels", DENSE)
    )
    floor = found[FLOOR].flops()
    for name in ROAD:
        assert floor < found[name].flops() < 1.02 * floor
    assert found["all kernels"].flops() > 1.3 * floor
    assert found[DENSE].flops() > 1.3 * floor


def test_the_rotation_keeps_little_beyond_the_floor(scanned):
    assert scanned["RoAd 1"].temp_mib() < 1.3 * scanned[FLOOR].temp_mib()
    assert scanned["RoAd 1"].temp_mib() < scanned[LORA].temp_mib()


def test_peak_memory_with_blocks_recomputed():
    found = jax_cost.arms(Options(), scan=True, remat="full", only=(FLOOR, "RoAd 1", "RoAd 1 on nf4"))
    assert found["RoAd 1"].peak_mib() < 1.3 * found[FLOOR].peak_mib()
    assert found["RoAd 1 on nf4"].peak_mib() < found[FLOOR].peak_mib()


def test_the_dense_rotations_are_the_same():
    theta, alpha = jnp.sin(jnp.arange(64.0)), 1 + 0.3 * jnp.cos(jnp.arange(64.0))
    y = jnp.sin(jnp.arange(256.0)).reshape(2, 128)
    expected = road_jax.rotate(y, theta, alpha, variant="road_1", group_size=64)
    found = y @ jax_cost.rotation_matrix(theta, alpha)
    assert jnp.abs(found - expected).max() < 1e-5
    assert jnp.abs(expected - y).max() > 0.5


def test_what_follows_a_rotation_is_computed_in_vectors():
    """XLA on CPU computes element by element in a loop that also joins the halves of a rotation."""

    def gated(y, theta, alpha):
        return jax.nn.silu(road_jax.rotate(y, theta, alpha, variant="road_1", group_size=64)) * y

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 128), (64,), (64,))]
    text = jax.jit(gated).trace(*shapes).lower(lowering_platforms=("cpu",)).compile().as_text()
    with_exponential = [part for part in text.split("\n\n") if " exponential(" in part]
    assert with_exponential
    assert not any(" concatenate(" in part for part in with_exponential)
    assert " concatenate(" in text


def test_the_capacity_plan_counts_what_the_paper_counts():
    count = capacity.sizes(capacity.config_of(*capacity.MODELS["7B"]))
    assert count["RoAd 1"] == 1_359_872
    assert count["full"] == 6_738_415_616


def test_the_capacity_plan_is_near_what_compiles(scanned, monkeypatch):
    # These are compiled already.
    monkeypatch.setattr(jax_cost, "arms", lambda *_, only, **__: {name: scanned[name] for name in only})
    found = capacity.check()
    assert any("fsdp" in case for case, *_ in found)
    for case, planned, compiled in found:
        assert 0.75 < compiled / planned < 1.1, case


def test_the_capacity_plan_counts_what_the_compiler_counts():
    for method, planned, compiled in capacity.check_flops():
        assert 0.97 < compiled / planned < 1.02, method
