"""A decoder on meshes with the axes data, fsdp and tensor: the same training, in shares."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _compare import assert_close, named_values
from _hlo import collectives, moved
from _models import small_checkpoint
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import road_jax
from benchmarks import capacity
from road_core import AdapterError, RoadConfig
from road_jax import models
from road_jax.models import _mesh
from road_jax.train import TrainOptions, _data, _step, train


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One with biases and a tied head, and one with a head of its own."""
    folder = tmp_path_factory.mktemp("bases")
    small_checkpoint(folder / "tied", "qwen2", num_hidden_layers=2, tie_word_embeddings=True)
    small_checkpoint(folder / "own", num_hidden_layers=2, tie_word_embeddings=False)
    return folder


def batch(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(6, 160, (8, 16)).astype(np.int32)
    segments = np.repeat(np.asarray([[1] * 7 + [2] * 6 + [0] * 3], np.int32), 8, axis=0)
    at = np.sort(rng.integers(0, 12, (8, 5)).astype(np.int32), axis=1)
    return _data.Batch(ids, segments, at, rng.integers(6, 160, (8, 5)).astype(np.int32), np.ones((8, 5), np.float32))


def in_codes(variables):
    """Attention in int8 and the MLP in nf4, some of whose blocks a mesh cuts."""
    variables = road_jax.quantize(variables, "nf4", exclude=("q_proj", "k_proj", "v_proj", "o_proj"))
    return road_jax.quantize(variables, "int8")


def make(checkpoint, sizes, *, scan=True, accumulate=1, group_size=8, quantized=False):
    count = int(np.prod([sizes.get(name, 1) for name in _mesh.AXES]))
    mesh = Mesh(np.asarray(jax.devices()[:count]).reshape([sizes.get(name, 1) for name in _mesh.AXES]), _mesh.AXES)
    module, variables = models.load(checkpoint, dtype=jnp.float32, scan=scan, remat="none")
    if quantized:
        variables = in_codes(variables)
    road = road_jax.transform(module, RoadConfig(target_modules="all-linear", group_size=group_size))
    adapter = road.init(jax.random.key(0), variables, np.ones((1, 8), np.int32))
    # With θ = 0, the first step would be the same wherever the adapter is placed.
    adapter = jax.tree.map(
        lambda leaf: leaf + np.broadcast_to(0.1 * np.cos(np.arange(leaf.shape[-1], dtype=np.float32)), leaf.shape),
        adapter,
    )
    tx, _ = _step.optimizer(1e-2, 4, warmup=0.0, weight_decay=0.0)
    state = jax.device_get(_step.State(adapter, tx.init(adapter)))
    program = _step.make_program(road, tx, variables, state, parallel="jit", accumulate=accumulate, mesh=mesh)
    return program, program.place(variables), program.place_state(state), variables


def run(*args, **options):
    program, variables, state, _ = make(*args, **options)
    losses = []
    for step in range(3):
        state, metrics = program.train(state, variables, batch(step))
        losses.append(float(metrics.loss))
    return losses, program.fetch(state).adapter


@pytest.fixture(scope="module")
def expected(checkpoints):
    return run(checkpoints / "tied", {"data": 1})


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"data": 8}, {}),
        ({"fsdp": 8}, {}),
        ({"data": 4, "tensor": 2}, {"accumulate": 2}),
        ({"fsdp": 4, "tensor": 2}, {"scan": False}),
    ],
    ids=["data", "fsdp", "tensor, in parts", "unrolled"],
)
def test_a_mesh_trains_as_one_device(sizes, options, checkpoints, expected):
    losses, adapter = run(checkpoints / "tied", sizes, **options)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-3)
    if options.get("scan", True):
        for found, wanted in zip(jax.tree.leaves(adapter), jax.tree.leaves(expected[1]), strict=True):
            assert_close(found, wanted, "float16")  # Adam divides by the root of small gradients


@pytest.mark.parametrize("kind", ["gemma3", "phi3", "olmo2", "qwen2_moe"])
def test_other_families_on_a_mesh(kind, tmp_path):
    small_checkpoint(tmp_path, kind, num_hidden_layers=2)
    alone, adapter = run(tmp_path, {"data": 1})
    losses, shared = run(tmp_path, {"data": 2, "fsdp": 2, "tensor": 2})
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-3)
    for found, wanted in zip(jax.tree.leaves(shared), jax.tree.leaves(adapter), strict=True):
        assert_close(found, wanted, "float16")


def test_a_quantised_base_trains_in_shares_as_on_one_device(checkpoints, expected):
    whole, adapter = run(checkpoints / "tied", {"data": 1}, quantized=True)
    losses, shared = run(checkpoints / "tied", {"data": 2, "fsdp": 2, "tensor": 2}, quantized=True)
    np.testing.assert_allclose(losses, whole, rtol=1e-5)
    assert abs(losses[0] - expected[0][0]) > 1e-4 * losses[0]
    for found, wanted in zip(jax.tree.leaves(shared), jax.tree.leaves(adapter), strict=True):
        assert_close(found, wanted, "float16")


@pytest.mark.parametrize(
    ("kind", "sizes", "codes", "scales"),
    [
        ("nf4", {"fsdp": 2, "tensor": 4}, (48, 32), (48, 1)),
        ("nf4", {"fsdp": 4, "tensor": 2}, (96, 16), (96, 2)),  # half a block: each share holds all scales of its rows
        ("int8", {"fsdp": 4, "tensor": 2}, (96, 32), (96, 1)),
    ],
)
def test_codes_and_scales_are_kept_and_dequantised_in_shares(kind, sizes, codes, scales):
    mesh = models.make_mesh(sizes)
    kernel = jnp.asarray(named_values("kernel", 2, 128, 192))
    variables = road_jax.quantize({"params": {"q_proj": {"kernel": kernel}}}, kind)
    found = models.shardings(variables, mesh)
    placed = jax.device_put(variables, found)["params"]["q_proj"]["kernel"]
    assert placed.codes.addressable_shards[0].data.shape == (2, *codes)
    assert placed.scales.addressable_shards[0].data.shape == (2, *scales)
    kept = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    dequantize = jax.jit(lambda kernel: kernel.dequantize(), out_shardings=kept)
    np.testing.assert_array_equal(dequantize(placed), variables["params"]["q_proj"]["kernel"].dequantize())
    assert not collectives(dequantize, placed)
    adapter = {"q_proj": {"road_theta": np.zeros((2, 96)), "road_alpha": np.ones((2, 96))}}
    assert road_jax.shardings(adapter, found)["q_proj"]["road_theta"].spec == P(None, "tensor")


@pytest.mark.no_leaks
def test_a_step_leaks_no_tracer_and_takes_the_states_buffers(checkpoints):
    program, variables, state, _ = make(checkpoints / "tied", {"data": 4, "tensor": 2})
    _, metrics = program.train(state, variables, batch(0))
    assert np.isfinite(metrics.loss)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(variables))


@dataclasses.dataclass(frozen=True)
class Shifts:
    """The floor that RoAd is compared with: trains only a number that is added to each pair of outputs."""

    model: nn.Module
    config: None = None

    def apply(self, variables, shifts, *args, **kwargs):
        def shift(next_fn, args, kwargs, context):
            scope = context.module.scope
            y = next_fn(*args, **kwargs)
            if context.method_name == "__call__" and scope.has_variable("params", "road_theta"):
                y += jnp.broadcast_to(jnp.repeat(scope.get_variable("params", "road_theta"), 2), y.shape)
            return y

        params = flatten_dict(variables["params"]) | flatten_dict(shifts)
        with nn.intercept_methods(shift):
            return self.model.apply({"params": unflatten_dict(params)}, *args, **kwargs)


def compiled_step(count, road, adapter, variables, mesh):
    """Returns counts for a whole compiled training step."""
    tx, _ = _step.optimizer(1e-2, 4, warmup=0.0, weight_decay=0.0)
    state = _step.State(adapter, tx.init(adapter))
    program = _step.make_program(road, tx, variables, state, parallel="jit", accumulate=1, mesh=mesh)
    placed = program.place_state(state), program.place(variables)
    rows = jax.device_put(_step._arrays(batch(0)), NamedSharding(mesh, P(("data", "fsdp"))))
    where = jax.tree.map(lambda leaf: leaf.sharding, placed[0])
    train = functools.partial(_step.train_step, _step.on_mesh(road, mesh), tx)
    return count(jax.jit(train, out_shardings=(where, None)), *placed, rows)


def test_a_step_adds_to_the_floors_collectives_its_gradients_alone(checkpoints):
    mesh = models.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    module, variables = models.load(checkpoints / "tied", dtype=jnp.float32, remat="none")
    road = road_jax.transform(module, RoadConfig(target_modules="all-linear", group_size=8))
    adapter = jax.device_get(road.init(jax.random.key(0), variables, np.ones((1, 8), np.int32)))
    shifts = {path: leaf for path, leaf in flatten_dict(adapter).items() if path[-1] == "road_theta"}
    floor = compiled_step(collectives, Shifts(module), unflatten_dict(shifts), variables, mesh)
    found = compiled_step(collectives, road, adapter, variables, mesh)
    # Per layer, the floor has one gradient and RoAd has two, each with a sum over the rows (XLA may join them).
    assert set(found) == set(floor) == {"all-reduce", "all-gather"}
    assert found["all-reduce"] <= floor["all-reduce"] + len(shifts)
    assert found["all-gather"] == floor["all-gather"]


@pytest.mark.parametrize("remat", ["none", "linears", "full"])
def test_fsdp_gathers_what_it_stores_and_nothing_of_the_batch(remat, checkpoints):
    mesh = models.make_mesh({"fsdp": 8})
    module, variables = models.load(checkpoints / "own", dtype=jnp.float32, remat=remat)
    variables = in_codes(variables)
    road = road_jax.transform(module, RoadConfig(target_modules="all-linear", group_size=8))
    adapter = jax.device_get(road.init(jax.random.key(0), variables, np.ones((1, 8), np.int32)))
    found = compiled_step(moved, road, adapter, variables, mesh)
    assert {kind for kind, _ in found} == {"all-gather", "all-reduce"}
    leaves = flatten_dict(variables["params"])
    head = leaves["lm_head", "kernel"]
    kernels = [leaf for path, leaf in leaves.items() if "layers" in path and path[-1] == "kernel"]
    # One layer at a time, once in each pass.
    codes = {kind: 2 * sum(leaf.codes[0].size for leaf in kernels if leaf.kind == kind) for kind in ("int8", "nf4")}
    assert found["all-gather", "s8"] == codes["int8"]
    assert found["all-gather", "u8"] == codes["nf4"] + head.codes.size
    scales = 2 * sum(leaf.scales[0].size for leaf in kernels) + head.scales.size
    assert found["all-gather", "f32"] <= scales + leaves["model", "embed_tokens", "embedding"].size
    # Gradients, the loss and the sum of the targets' weights.
    assert found["all-reduce", "f32"] <= sum(leaf.size for leaf in jax.tree.leaves(adapter)) + 8


@pytest.mark.parametrize(("remat", "quantize"), [("none", None), ("linears", None), ("linears", "nf4"), ("full", None)])
def test_fsdp_keeps_its_share_of_the_base_once(remat, quantize):
    """A second copy, laid out for the gathers before the loop over layers, would take a share's bytes again."""
    config = capacity.config_of(hidden=256, mlp=512, layers=64, heads=4, kv_heads=4, vocabulary=64)
    temp, arguments = {}, {}
    for axis in ("data", "fsdp"):
        program = capacity.compiled(config, {axis: 8}, 1, 8, quantize, remat=remat)
        memory = program.memory_analysis()
        temp[axis], arguments[axis] = memory.temp_size_in_bytes, memory.argument_size_in_bytes
    # Less than one share: a layer whose kernels are gathered.
    assert temp["fsdp"] - temp["data"] < 0.25 * arguments["fsdp"]


def held(tree, device):
    shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"fsdp": 8}, {"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_each_device_holds_its_share_of_the_base(sizes, checkpoints):
    _, placed, state, variables = make(checkpoints / "tied", sizes)
    fsdp, tensor = sizes.get("fsdp", 1), sizes.get("tensor", 1)
    # Weights are sharded over both axes, biases along what is computed in shares, norms are replicated.
    shares = {"kernel": fsdp * tensor, "embedding": fsdp * tensor, "bias": tensor, "weight": 1}
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    expected = sum(leaf.nbytes // shares[path[-1].key] for path, leaf in leaves)
    assert {held(placed, device) for device in jax.devices()} == {expected}
    up, down = (state.adapter["model"]["layers"]["mlp"][name]["road_theta"] for name in ("up_proj", "down_proj"))
    # θ follows what is computed in shares; Adam's moments follow θ.
    assert up.addressable_shards[0].data.shape == (2, 96 // tensor)
    assert down.addressable_shards[0].data.shape == (2, 64)
    moments = state.opt_state[0].mu["model"]["layers"]["mlp"]["up_proj"]["road_theta"]
    assert moments.sharding == up.sharding


@pytest.fixture
def options(checkpoints, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "one two", "completion": "three"}\n' * 40)
    mesh = "data=2,fsdp=2,tensor=2"
    return TrainOptions(
        base=checkpoints / "tied",
        data=data,
        out=tmp_path / "run",
        mesh=mesh,
        group_size=8,
        steps=4,
        max_length=16,
        learning_rate=3e-2,
        dtype="float32",
        eval_lines=8,
    )


def test_a_run_on_a_mesh_with_a_head_trained_whole(options, checkpoints):
    options = dataclasses.replace(options, base=checkpoints / "own", modules_to_save=("lm_head",), dtype="bfloat16")
    result = train(options)
    assert result.after["loss"] < 0.8 * result.before["loss"]
    adapter, config = road_jax.load_adapter(options.out)
    assert config.modules_to_save == ["lm_head"]
    _, variables = models.load(options.base, dtype=jnp.bfloat16)
    head = variables["params"]["lm_head"]["kernel"].astype(jnp.float32)
    assert adapter["lm_head"]["kernel"].dtype == jnp.float32
    assert float(jnp.abs(adapter["lm_head"]["kernel"] - head).max()) > 1e-3
    assert adapter["model"]["layers"]["mlp"]["up_proj"]["road_theta"].shape == (2, 96)


def test_a_run_quantises_in_shares_as_on_one_device(options):
    losses = []
    for mesh in ("data=8", "data=2,fsdp=2,tensor=2"):
        out = options.out.with_name(mesh)
        losses.append(train(dataclasses.replace(options, out=out, mesh=mesh, quantize="nf4")).after["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh": "data=2,fsdp=2"}, "mesh: expected sizes that multiply to the 8 devices, found data=2,fsdp=2"),
        ({"mesh": "data=2,model=4"}, "mesh: expected the axes data, fsdp, tensor, found 'model'"),
        ({"mesh": "2x2x2"}, "mesh: expected axes and sizes as data=2,fsdp=2,tensor=2, found '2x2x2'"),
        ({"mesh": "data=0,fsdp=8"}, "mesh: expected sizes that multiply to the 8 devices, found data=0,fsdp=8"),
        (
            {"mesh": "data=2,tensor=4"},
            "mesh: expected an axis tensor that divides the model's num_key_value_heads 2, found tensor=4",
        ),
        ({"group_size": 64}, "gate_proj: expected 2 shards of whole groups of 64 outputs, found 192 outputs"),
        ({"parallel": "pmap"}, "parallel: expected jit for a mesh of data=2,fsdp=2,tensor=2, found pmap"),
        ({"batch_size": 6}, r"batch_size: expected a multiple of the 4 shares \(data times fsdp\), .* found 6"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_at_the_start(changes, said, options):
    with pytest.raises(AdapterError, match=said):
        train(dataclasses.replace(options, **changes))
    assert not options.out.exists()


def test_codes_that_do_not_divide_are_refused():
    kernel = road_jax.quantize({"params": {"q_proj": {"kernel": jnp.ones((64, 100))}}}, "nf4")
    said = r"q_proj\.kernel: expected nf4 codes that a mesh of 8 x 1 shares divides, found 100 x 32"
    with pytest.raises(AdapterError, match=said):
        models.shardings(kernel, models.make_mesh({"tensor": 8}))


def test_a_mesh_without_the_axes_is_refused(checkpoints):
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "model"))
    said = r"mesh: expected the axes data, fsdp, tensor \(make_mesh\), found data, model"
    with pytest.raises(AdapterError, match=said):
        models.load(checkpoints / "own", mesh=mesh)
    _, variables = models.load(checkpoints / "own")
    with pytest.raises(AdapterError, match=said):
        models.shardings(variables, mesh)
    for size in (8.0, "8"):
        with pytest.raises(AdapterError, match=f"mesh: expected whole numbers as sizes, found data={size!r}"):
            models.make_mesh({"data": size})


@pytest.mark.parametrize("scan", [True, False])
def test_rows_that_shares_do_not_divide(scan, checkpoints):
    module, variables = models.load(checkpoints / "own", scan=scan)
    ids = batch(0).input_ids[:3]
    expected = module.apply(variables, ids)
    mesh = models.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shared = jax.device_put(variables, models.shardings(variables, mesh))
    module = module.clone(mesh=mesh)
    for apply in (module.apply, jax.jit(module.apply)):
        assert_close(apply(shared, ids), expected, "float32")
