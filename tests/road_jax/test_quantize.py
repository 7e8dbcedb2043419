"""Quantised kernels against bitsandbytes, bit for bit, and computing with them."""

from typing import Any

import bitsandbytes as bnb
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
import torch
import transformers
from _compare import assert_close, named_values
from _models import small_checkpoint
from flax import linen as nn
from flax import serialization
from flax.linen.dtypes import promote_dtype
from jax.sharding import PartitionSpec as P
from safetensors.torch import load_file, save_file

import road_jax
from road_core import AdapterError, RoadConfig
from road_jax import _quantize, models
from road_jax._tree import flatten
from road_jax.models import _codes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ["nf4", "int8"]


def kernels(dtype, *stack):
    """A kernel ``[*stack, in, out]`` and the torch weights ``[out, in]`` of its layers."""
    weights = torch.from_numpy(named_values("weight", *(stack or (1,)), 128, 192)).to(DTYPES[dtype])
    kernel = jnp.asarray(np.swapaxes(weights.float().numpy(), -1, -2)).astype(dtype)
    return kernel if stack else kernel[0], list(weights)


def theirs(weight, kind):
    """Codes and scales of bitsandbytes, and the weight that it computes with, in float32."""
    if kind == "int8":
        params = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
        codes = params.CB if params.CB is not None else params.data
        plain = bnb.functional.int8_vectorwise_dequant(codes, params.SCB).to(weight.dtype)
        return codes.numpy(), params.SCB.numpy(), plain.float().numpy()
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    plain = bnb.functional.dequantize_4bit(packed, state)
    return packed.numpy().ravel(), state.absmax.numpy(), plain.float().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_scales_and_values_are_bitsandbytes(kind, dtype):
    for stack in ((), (3,)):
        kernel, weights = kernels(dtype, *stack)
        bias = jnp.ones((*stack, 128))
        variables = {"params": {"proj": {"kernel": kernel, "bias": bias}, "lm_head": {"kernel": kernel}}}
        quantized = road_jax.quantize(variables, kind)["params"]
        assert quantized["lm_head"]["kernel"] is kernel
        found = quantized["proj"]["kernel"]
        plain = jax.jit(lambda kernel: kernel.dequantize())(found)
        assert plain.dtype == kernel.dtype
        assert plain.shape == kernel.shape
        for layer, weight in enumerate(weights):
            at = (layer,) if stack else ()
            codes, scales, values = theirs(weight, kind)
            np.testing.assert_array_equal(found.codes[at].ravel(), codes.ravel())
            np.testing.assert_array_equal(found.scales[at].ravel(), scales)
            np.testing.assert_array_equal(np.asarray(plain[at].T, np.float32), values)
    assert found.nbytes < kernel.nbytes * (0.6 if kind == "int8" else 0.3) * (1 if dtype != "float32" else 0.5)


def test_a_layer_of_zeros_stays_zero():
    variables = {"params": {"proj": {"kernel": jnp.zeros((64, 64))}}}
    for kind in KINDS:
        plain = road_jax.dequantize(road_jax.quantize(variables, kind))
        np.testing.assert_array_equal(plain["params"]["proj"]["kernel"], 0)


class Model(nn.Module):
    """A stack, under scan or under scan and remat, and a head."""

    remat: bool = False
    policy: Any = None

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.Dense(64, name="down")(nn.gelu(nn.Dense(128, name="up")(x))), None

        body = nn.remat(Block, policy=self.policy) if self.remat else Block
        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scan(name="blocks")(x, None)
        return nn.Dense(10, name="lm_head")(x)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_computing_with_codes_is_computing_with_their_values(kind, remat):
    model, x = Model(remat), jnp.asarray(named_values("x", 2, 5, 64))
    variables = model.init(jax.random.key(0), x)
    variables["params"]["blocks"]["up"]["bias"] += 0.3
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=8))
    adapter = road.init(jax.random.key(1), variables, x)
    adapter = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), adapter)
    quantized = road_jax.quantize(variables, kind)
    plain = road_jax.dequantize(quantized)

    def loss(adapter, variables):
        return jnp.sum(jnp.square(road.apply(variables, adapter, x)))

    expected = road.apply(plain, adapter, x)
    found = jax.jit(road.apply)(quantized, adapter, x)
    assert_close(found, expected, "float32", moved_from=road.apply(variables, adapter, x))
    assert_close(road.apply(quantized, {}, x), model.apply(plain, x), "float32")
    slow, fast = jax.grad(loss)(adapter, plain), jax.jit(jax.grad(loss))(adapter, quantized)
    for expected, gradient in zip(jax.tree.leaves(slow), jax.tree.leaves(fast), strict=True):
        assert_close(gradient, expected, "float32", moved_from=np.zeros_like(expected))


@pytest.mark.no_leaks
def test_the_backward_pass_keeps_no_dequantised_kernel():
    """The residuals of a deep scan contain codes, not whole kernels."""
    model, x = Model(), jnp.ones((1, 4, 64))
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=8))
    adapter = road.init(jax.random.key(1), variables, x)
    quantized = road_jax.quantize(variables, "nf4")

    def loss(adapter, variables):
        return jnp.sum(jnp.square(road.apply(variables, adapter, x)))

    memory = jax.jit(jax.grad(loss)).lower(adapter, quantized).compile().memory_analysis()
    kernels = 3 * 2 * 64 * 128 * 4
    assert memory.temp_size_in_bytes < kernels


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_keeps_products_keeps_those_with_codes(kind):
    model, x = Model(True, jax.checkpoint_policies.dots_with_no_batch_dims_saveable), jnp.ones((1, 4, 64))
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=8))
    adapter = road.init(jax.random.key(1), variables, x)

    def products(variables):
        gradient = jax.grad(lambda adapter: jnp.sum(jnp.square(road.apply(variables, adapter, x))))
        return str(jax.make_jaxpr(gradient)(adapter)).count("dot_general")

    assert products(road_jax.quantize(variables, kind)) == products(variables)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "nf4, double", "int8"])
def test_a_checkpoint_of_bitsandbytes_is_taken_as_it_stands(kind, scan, tmp_path):
    base, saved = small_checkpoint(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "saved"
    options = {"load_in_8bit": True}
    if kind != "int8":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": "double" in kind}
    config = transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            expected[name] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            codes = module.weight.CB if module.weight.CB is not None else module.weight.data
            expected[name] = bnb.functional.int8_vectorwise_dequant(codes, module.weight.SCB).bfloat16()
    model.save_pretrained(saved)
    module, variables = models.load(saved, scan=scan)
    mesh = models.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    _, shared = models.load(saved, scan=scan, mesh=mesh)
    assert jax.tree.all(jax.tree.map(np.array_equal, shared, variables))
    assert jax.tree.map(lambda leaf: leaf.sharding, shared) == models.shardings(variables, mesh)
    with pytest.raises(AdapterError, match="expected plain weights to quantise, found none"):
        models.load(saved, scan=scan, quantize="nf4")
    plain = road_jax.dequantize(variables)["params"]["model"]["layers"]
    assert len(expected) == 3 * 7
    for name, weight in expected.items():
        *_, layer, part, projection = name.split(".")
        node = plain[part] if scan else plain[layer][part]
        kernel = node[projection]["kernel"][int(layer)] if scan else node[projection]["kernel"]
        assert kernel.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(kernel.T, np.float32), weight.float().numpy())

    road = road_jax.transform(module, RoadConfig(target_modules="all-linear", group_size=8))
    ids = np.arange(6, 18, dtype=np.int32).reshape(2, 6)
    logits = np.asarray(jax.jit(road.apply)(variables, {}, ids), np.float32)
    if kind != "int8":
        with torch.no_grad():
            wanted = model(torch.from_numpy(ids).long()).logits.float().numpy()
        assert_close(logits, wanted, "bfloat16")
    said = road_jax.generate(road, variables, ids.tolist(), adapter={}, max_new_tokens=4)
    assert [len(row) for row in said] == [4, 4]


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_quantised_while_it_is_read(kind, scan, tmp_path, monkeypatch):
    small_checkpoint(tmp_path, "qwen2", dtype=torch.float32)
    expected = road_jax.quantize(models.load(tmp_path, dtype=jnp.bfloat16, scan=scan)[1], kind)
    encoded = []

    def encode(name, weight, kind):
        encoded.append(weight.size)
        return _quantize.encode(name, weight, kind)

    monkeypatch.setattr(_codes, "encode", encode)
    kernels = [128 * 192] * 3 + [128 * 128, 128 * 64] * 2
    for sizes in (None, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}):
        mesh = sizes and models.make_mesh(sizes)
        encoded.clear()
        _, found = models.load(tmp_path, dtype=jnp.bfloat16, scan=scan, mesh=mesh, quantize=kind)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
        # Never more than one layer's weight at once, and nothing twice, except for blocks that shares cut.
        assert max(encoded) <= max(kernels)
        cut = kind == "nf4" and sizes and "tensor" in sizes
        assert 1 <= sum(encoded) / (3 * sum(kernels)) <= (2 if cut else 1)
        if mesh is not None:
            assert jax.tree.map(lambda leaf: leaf.sharding, found) == models.shardings(expected, mesh)
    _, found = models.load(tmp_path, quantize=kind, scan=scan, exclude=("lm_head", "q_proj", "up_proj"))
    plain = {path[-2] for path, leaf in flatten(found["params"]).items() if isinstance(leaf, jax.Array)}
    assert plain == {
        *("q_proj", "k_proj", "v_proj", "up_proj", "lm_head", "embed_tokens"),
        *("input_layernorm", "post_attention_layernorm", "norm"),
    }


@pytest.mark.parametrize(
    ("exclude", "stay"),
    [
        ("lm_head", ["lm_head"]),
        (("blocks.up",), ["blocks.up"]),
        (("blocks", "lm_head"), ["blocks.down", "blocks.up", "lm_head"]),
        ((), []),
    ],
)
def test_what_is_excluded_is_named_by_the_end_of_its_path(exclude, stay):
    model, x = Model(), jnp.ones((1, 4, 64))
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=8))
    for quantize in (road_jax.quantize, lambda *args, **options: road.quantize(*args, x, **options)):
        if len(stay) == 3:
            with pytest.raises(AdapterError, match="found none"):
                quantize(variables, "nf4", exclude=exclude)
            continue
        found = flatten(quantize(variables, "nf4", exclude=exclude)["params"])
        plain = [path[:-1] for path, leaf in found.items() if path[-1] == "kernel" and isinstance(leaf, jax.Array)]
        assert sorted(map(".".join, plain)) == stay
        with pytest.raises(AdapterError, match="exclude: expected modules of the params, found no 'dwon'"):
            quantize(variables, "nf4", exclude=("up", "dwon"))


class Mixed(nn.Module):
    """Dense layers beside others whose kernels look the same."""

    bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(4, use_bias=self.bias, name="attention")(x)
        x = nn.Conv(64, (3,), use_bias=self.bias, name="conv")(x)
        return nn.Dense(64, use_bias=self.bias, precision="highest", name="dense")(inputs=x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_only_dense_kernels_are_taken(kind, bias):
    x = jnp.asarray(named_values("x", 2, 5, 64))
    model = Mixed(bias)
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=8))
    with pytest.raises(AdapterError, match=r"quantize: expected sample inputs of the model, or Road\.init before"):
        road.quantize(variables, kind)
    quantized = road.quantize(variables, kind, x)
    kept = {name: params for name, params in quantized["params"].items() if name != "dense"}
    assert kept == {name: variables["params"][name] for name in kept}
    assert isinstance(quantized["params"]["dense"]["kernel"], road_jax.QuantizedKernel)
    adapter = road.init(jax.random.key(1), variables, x)
    expected = road.apply(road_jax.dequantize(quantized), adapter, x)
    moved_from = model.apply(variables, x)
    assert_close(road.apply(quantized, adapter, x), expected, "float32", moved_from=moved_from)
    assert str(jax.make_jaxpr(road.apply)(quantized, adapter, x)).count("HIGHEST") == 2

    if bias:
        # The shapes of the biases show the same.
        assert jax.tree.structure(road_jax.quantize(variables, kind)) == jax.tree.structure(quantized)
    elif kind == "nf4":
        with pytest.raises(AdapterError, match=r"attention\.\w+: expected inputs that blocks of 64 divide.*exclude"):
            road_jax.quantize(variables, kind)
    else:
        for exclude, error in (
            ((), "attention.query: expected a Dense layer for a quantised kernel, found DenseGeneral"),
            (("query", "key", "value", "out"), "conv: expected a Dense layer for a quantised kernel, found Conv"),
        ):
            with pytest.raises(AdapterError, match=error):
                road.apply(road_jax.quantize(variables, kind, exclude=exclude), adapter, x)


def test_a_product_of_the_layers_own_is_kept():
    def doubled(*operands, **options):
        return 2 * jax.lax.dot_general(*operands, **options)

    x = jnp.asarray(named_values("x", 2, 64))
    model = nn.Sequential([nn.Dense(64, dot_general=doubled)])
    variables = road_jax.quantize(model.init(jax.random.key(0), x), "int8")
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=8))
    assert_close(road.apply(variables, {}, x), model.apply(road_jax.dequantize(variables), x), "float32")


class Nested(nn.Module):
    """A scan in a scan, with the inner stack's axis where it is put."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        class Inner(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return jnp.tanh(nn.Dense(64, name="up")(x)), None

        inner = nn.scan(Inner, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)

        class Outer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return inner(name="inner")(x, None)

        outer = nn.scan(Outer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return outer(name="outer")(x, None)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_stacks_within_stacks(kind):
    x = jnp.asarray(named_values("x", 2, 64))
    model = Nested()
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=8))
    quantized = road.quantize(variables, kind, x)
    assert quantized["params"]["outer"]["inner"]["up"]["kernel"].codes.shape[:3] == (2, 3, 64)
    assert jax.tree.structure(road_jax.quantize(variables, kind)) == jax.tree.structure(quantized)
    expected = model.apply(road_jax.dequantize(quantized), x)
    assert_close(road.apply(quantized, {}, x), expected, "float32", moved_from=model.apply(variables, x))


def test_a_stack_behind_is_refused():
    x = jnp.ones((2, 64))
    model = Nested(1)
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=8))
    with pytest.raises(
        AdapterError, match=r"outer\.inner\.up: expected a stack's axes before .* found them at \[0, 2\]"
    ):
        road.quantize(variables, "int8", x)
    with pytest.raises(AdapterError, match="quantize: expected kernels of Dense layers, found none"):
        road.quantize(variables, "int8", exclude=("up",))


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_and_places_are_kept(kind):
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
            bias = nn.with_partitioning(nn.initializers.ones, ("model",))
            return nn.Dense(64, kernel_init=kernel, bias_init=bias, name="dense")(x)

    x = jnp.asarray(named_values("x", 2, 128))
    model, mesh = Boxed(), jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    variables = model.init(jax.random.key(0), x)
    plain = nn.meta.unbox(variables)
    variables = jax.device_put(variables, nn.get_sharding(variables, mesh))
    quantized = road_jax.quantize(variables, kind)
    kernel = quantized["params"]["dense"]["kernel"]
    assert kernel.codes.names == ("model", "data")
    assert kernel.codes.value.sharding.spec == P("model", "data")
    assert nn.get_partition_spec(quantized)["params"]["dense"]["kernel"].codes == P("model", "data")
    back = road_jax.dequantize(quantized)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    expected = road_jax.quantize(plain, kind)["params"]["dense"]["kernel"]
    np.testing.assert_array_equal(kernel.codes.value, expected.codes)
    np.testing.assert_array_equal(kernel.scales.value, expected.scales)
    assert kernel.nbytes == expected.nbytes
    road = road_jax.transform(model, RoadConfig(target_modules=["dense"], group_size=8))
    found = jax.jit(road.apply)(quantized, road.init(jax.random.key(1), plain, x), x)
    assert_close(found, model.apply(back, x), "float32", moved_from=model.apply(variables, x))
    with pytest.raises(AdapterError, match=rf"dense: expected a plain kernel to merge into, found {kind} codes"):
        road.merge(quantized, road.init(jax.random.key(1), plain, x))


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_flax_and_orbax(kind, tmp_path):
    """With a target, what was saved is restored; without one there is a one-sentence error."""
    model, x = Model(), jnp.asarray(named_values("x", 2, 4, 64))
    plain = model.init(jax.random.key(0), x)
    quantized = road_jax.quantize(plain, kind)
    shapes = jax.eval_shape(lambda: quantized)
    written = serialization.to_bytes(quantized)
    checkpointer = orbax.checkpoint.StandardCheckpointer()
    checkpointer.save(tmp_path / "saved", quantized)
    checkpointer.wait_until_finished()
    back = [serialization.from_bytes(target, written) for target in (quantized, shapes)]
    for found in (*back, checkpointer.restore(tmp_path / "saved", shapes)):
        assert jax.tree.structure(found) == jax.tree.structure(quantized)
        for ours, expected in zip(jax.tree.leaves(found), jax.tree.leaves(quantized), strict=True):
            np.testing.assert_array_equal(ours, expected)
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=8))
    for pieces in (checkpointer.restore(tmp_path / "saved"), serialization.from_bytes(plain, written)):
        with pytest.raises(AdapterError, match=r"blocks\.down\.kernel: expected an array .* restored without a target"):
            road.apply(pieces, {}, x)
        with pytest.raises(AdapterError, match=r"kernel: expected an array .* restored without a target"):
            road.init(jax.random.key(0), pieces, x)
    with pytest.raises(AdapterError, match=r"blocks/down/kernel: expected the state of a quantised .*, found ndarray"):
        serialization.from_bytes(quantized, serialization.to_bytes(plain))


def upcast(inputs, kernel, bias, *, dtype):
    return promote_dtype(inputs, kernel, bias, dtype=jnp.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fields", "kernel", "bias", "inputs"),
    [
        ({}, "bfloat16", "float32", "bfloat16"),
        ({}, "bfloat16", "bfloat16", "bfloat16"),
        ({}, "float16", "float16", "bfloat16"),
        ({}, "float32", None, "int32"),
        ({"dtype": jnp.bfloat16}, "float32", "float32", "float32"),
        ({"promote_dtype": upcast}, "bfloat16", "bfloat16", "bfloat16"),
    ],
)
def test_dtypes_are_those_of_dense(kind, fields, kernel, bias, inputs):
    model = nn.Dense(32, use_bias=bias is not None, **fields)
    params = {"kernel": jnp.asarray(named_values("k", 64, 32)).astype(kernel)}
    if bias is not None:
        params["bias"] = jnp.asarray(named_values("b", 32)).astype(bias)
    x = (8 * jnp.asarray(named_values("x", 3, 64))).astype(inputs)
    quantized = road_jax.quantize({"params": params}, kind)
    with jax.numpy_dtype_promotion("standard"):
        expected = model.apply(road_jax.dequantize(quantized), x)
        found = road_jax.transform(model, RoadConfig(target_modules="all-linear")).apply(quantized, {}, x)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_is_refused(tmp_path):
    kernel = jnp.ones((64, 64))
    with pytest.raises(AdapterError, match="quantize: expected nf4 or int8, found 'fp3'"):
        road_jax.quantize({"params": {"a": {"kernel": kernel}}}, "fp3")
    with pytest.raises(AdapterError, match="found none"):
        road_jax.quantize({"params": {"a": {"embedding": kernel}}}, "nf4")
    with pytest.raises(AdapterError, match="a: expected a kernel with values to quantise, found one being traced"):
        jax.eval_shape(lambda kernel: road_jax.quantize({"params": {"a": {"kernel": kernel}}}, "int8"), kernel)
    empty = {"params": {"a": {"kernel": jnp.ones((0, 64))}, "b": {"kernel": kernel}}}
    assert road_jax.quantize(empty, "nf4")["params"]["a"]["kernel"] is empty["params"]["a"]["kernel"]
    with pytest.raises(AdapterError, match="exclude: expected names of modules, found None"):
        road_jax.quantize({"params": {"a": {"kernel": kernel}}}, "nf4", exclude=None)
    for call in (lambda tree: road_jax.quantize(tree, "nf4"), road_jax.dequantize):
        with pytest.raises(
            AdapterError, match="variables: expected a dict with params under 'params', found one with a"
        ):
            call({"a": {"kernel": kernel}})
    with pytest.raises(AdapterError, match="a: expected inputs that blocks of 64 divide, found 32"):
        road_jax.quantize({"params": {"a": {"kernel": kernel[:32]}}}, "nf4")
    with pytest.raises(AdapterError, match="a: expected finite values"):
        road_jax.quantize({"params": {"a": {"kernel": kernel * jnp.nan}}}, "int8")
    with pytest.raises(AdapterError, match=r"a: expected finite values \(int8: in float16\)"):
        road_jax.quantize({"params": {"a": {"kernel": kernel * 1e5}}}, "int8")

    model, x = Model(), jnp.ones((1, 4, 64))
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=8))
    adapter = road.init(jax.random.key(1), variables, x)
    with pytest.raises(AdapterError, match=r"blocks\.down: expected a plain kernel to merge into, found nf4 codes"):
        road.merge(road_jax.quantize(variables, "nf4"), adapter)

    general = nn.Sequential([nn.DenseGeneral((2, 32), use_bias=False)])
    variables = road_jax.quantize(general.init(jax.random.key(0), x), "int8")
    road = road_jax.transform(general, RoadConfig(target_modules=".*", group_size=8))
    with pytest.raises(AdapterError, match=r"layers_0: expected a Dense .* found DenseGeneral .*exclude"):
        road.apply(variables, {}, x)

    base, saved = small_checkpoint(tmp_path / "base"), tmp_path / "saved"
    with pytest.raises(AdapterError, match="exclude: expected modules of the params, found no 'lm_haed'"):
        models.load(base, quantize="nf4", exclude=("lm_haed",))
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    model.save_pretrained(saved)
    with pytest.raises(AdapterError, match=r"proj\.weight in fp4"):
        models.load(saved)
    with pytest.raises(AdapterError, match="quantize: expected nf4 or int8, found 'fp4'"):
        models.load(base, quantize="fp4")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.inf
    save_file(weights, base / "model.safetensors")
    with pytest.raises(AdapterError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: expected finite values"):
        models.load(base, quantize="nf4")


@pytest.mark.parametrize("cut", [P(None, "model"), P("model"), P("data")], ids=["outputs", "inputs", "as the rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_on_a_mesh_with_explicit_axes(kind, cut):
    x, model = jnp.asarray(named_values("x", 8, 256)), nn.Dense(128)
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=8, init_weights=False))
    adapter = road.init(jax.random.key(1), variables, x)

    @jax.jit
    def step(adapter, variables, x):
        return jax.value_and_grad(lambda x, a: jnp.sum(jnp.sin(road.apply(variables, a, x))), (0, 1))(x, adapter)

    expected = jax.tree.leaves(step(adapter, road_jax.quantize(variables, kind), x))
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    params = {"kernel": jax.device_put(variables["params"]["kernel"], jax.NamedSharding(mesh, cut))}
    quantized = road_jax.quantize({"params": {**variables["params"], **params}}, kind)
    with jax.set_mesh(mesh):
        found = jax.tree.leaves(step(adapter, quantized, jax.device_put(x, P("data"))))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, "float32", moved_from=np.zeros_like(b))
