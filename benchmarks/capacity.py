"""Computes what training takes on meshes that aren't available here: bytes per chip and FLOPs per token.

Methods are RoAd 1, LoRA r8 and full training. Sizes come from ``jax.eval_shape`` of `road_jax.models.Decoder`, so
nothing is allocated. The plan counts

- weights: every kernel and the embedding, split over ``model`` and, with ``fsdp``, over ``data`` as well;
- trained: params, gradients and Adam's two moments in float32 (full training has bfloat16 params besides);
- kept activations: with ``remat="linears"``, a layer's input and the outputs of its linear layers, for each token of a
  chip's rows; for LoRA also the outputs of its factors;
- temporary activations: one layer recomputed in the backward pass, or the logits of some targets with their gradient,
  if these are more. A loss at every token is assumed.

The planned activations are checked against the compiler's memory analysis of small models of several widths and of the
plan's own programs, which are compiled from shapes for as many pretend devices. The planned FLOPs are checked against
the compiler's count. Writes the plan and these checks to ``docs/capacity.md``.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

import road_jax
from benchmarks import jax_cost
from road_jax import RoadConfig, models
from road_jax._quantize import quantized_shapes
from road_jax._tree import flatten, unflatten
from road_jax.models import Decoder, DecoderConfig
from road_jax.models._decoder import Remat, part_of
from road_jax.models._loss import TARGETS
from road_jax.models._mesh import AXES, rows_sharding
from road_jax.train import _step

GIB = 2**30

MODELS = {
    "7B": (4096, 11008, 32, 32, 32, 32000),
    "70B": (8192, 28672, 80, 64, 8, 128256),
    "405B": (16384, 53248, 126, 128, 8, 128256),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to train one model.

    Attributes:
        model: a name of `MODELS`.
        data: chips along ``data``.
        tensor: chips along ``model``.
        fsdp: whether weights are split over ``data`` too.
        bits: bits per weight: 16, or 4.5 for nf4 with its scales.
        rows: rows of a chip's batch.
        length: tokens per row.
    """

    model: str
    data: int
    tensor: int
    fsdp: bool
    bits: float
    rows: int
    length: int


PLANS = (
    Plan("7B", 1, 1, False, 16, 1, 2048),
    Plan("7B", 1, 1, False, 4.5, 4, 2048),
    Plan("7B", 8, 1, True, 16, 4, 2048),
    Plan("70B", 1, 4, False, 16, 1, 2048),
    Plan("70B", 1, 1, False, 4.5, 1, 2048),
    Plan("70B", 8, 8, True, 16, 1, 2048),
    Plan("405B", 4, 8, True, 16, 1, 2048),
    Plan("405B", 16, 8, True, 16, 1, 2048),
)

# Plans whose programs are compiled for pretend devices.
CHECKED = (
    Plan("7B", 1, 1, False, 4.5, 4, 2048),
    Plan("7B", 8, 1, True, 16, 1, 2048),
    Plan("7B", 8, 1, True, 4.5, 1, 2048),
    Plan("70B", 1, 4, False, 16, 1, 2048),
    Plan("70B", 8, 8, True, 16, 1, 2048),
    Plan("405B", 4, 8, True, 16, 1, 2048),
)

# Arms of `benchmarks.jax_cost` and their names here.
ARMS = {"RoAd 1": "RoAd 1", "LoRA r8 (qwix)": "LoRA r8", "all kernels": "full"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Writes the capacity plan."""

    # File for the plan.
    out: Path = Path("docs/capacity.md")


def config_of(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> DecoderConfig:
    """Returns the config of a Llama of these sizes."""
    fields = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    return DecoderConfig.from_hugging_face(fields, "capacity")


def sizes(config: DecoderConfig) -> dict[str, int]:
    """Returns numbers of parameters: kernels, all others, the head, and what each method trains."""
    model = Decoder(config)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    leaves = flatten(variables["params"])
    kernels = {path: leaf for path, leaf in leaves.items() if path[-1] == "kernel" and "layers" in path}
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear"))
    adapter = jax.eval_shape(lambda v: road.init(jax.random.key(0), v, jnp.zeros((1, 8), jnp.int32)), variables)
    return {
        "kernels": sum(leaf.size for leaf in kernels.values()),
        "others": sum(leaf.size for path, leaf in leaves.items() if path not in kernels),
        "head": config.vocab_size * config.hidden_size,
        "RoAd 1": sum(leaf.size for leaf in jax.tree.leaves(adapter)),
        "LoRA r8": sum(8 * leaf.shape[0] * (leaf.shape[-1] + leaf.shape[-2]) for leaf in kernels.values()),
        "full": sum(leaf.size for leaf in leaves.values()),
    }


def outputs(config: DecoderConfig) -> int:
    """Returns the total number of outputs per token of one decoder layer's linear layers."""
    c = config
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    return heads + 2 * c.hidden_size + 2 * c.intermediate_size


def activations(
    config: DecoderConfig, tokens: int, length: int, itemsize: int, tensor: int, logits: int, method: str = "RoAd 1"
) -> float:
    """Returns a chip's bytes of kept and temporary activations, for ``tokens`` tokens in rows of ``length``.

    ``logits`` is the number of targets whose logits are there at a time.
    """
    c = config
    # A layer's output projections are whole on every chip; the others are split over `model`.
    given = 2 * c.hidden_size + (outputs(c) - 2 * c.hidden_size) / tensor
    # The policy keeps every product with a weight, including those of LoRA's two factors, the second in full width.
    factors = given + 7 * 8 if method == "LoRA r8" else 0
    kept = tokens * itemsize * (c.hidden_size + given + factors) * c.num_hidden_layers
    # Recomputed in the backward pass: outputs of linear layers, plain and adapted; with gradients and attention.
    scores = 3 * 4 * tokens * keys_seen(length) * c.num_attention_heads / tensor
    passing = tokens * itemsize * (2 if method == "full" else 3) * given + scores
    # The loss and its gradient are computed before the backward pass goes through the layers.
    return kept + max(passing, 3 * 4 * logits * c.vocab_size / tensor)


def keys_seen(length: int) -> float:
    """Returns for how many keys `Decoder` computes scores, on average over a row's tokens: no part sees a later one."""
    starts = range(0, length, part_of(length))
    stops = [min(start + part_of(length), length) for start in starts]
    return sum((stop - start) * stop for start, stop in zip(starts, stops, strict=True)) / length


def bytes_a_chip(plan: Plan, method: str) -> dict[str, float]:
    """Returns GiB per chip of weights, of what is trained, and of activations."""
    config = config_of(*MODELS[plan.model])
    count = sizes(config)
    shards = plan.tensor * (plan.data if plan.fsdp else 1)
    weight_bits = 16 if method == "full" else plan.bits
    weights = (count["kernels"] * weight_bits / 8 + count["others"] * 2) / shards
    # θ and α follow the outputs over `model` and are whole along `data`; full training splits as the weights do.
    state = count[method] * 4 * 4 / (shards if method == "full" else plan.tensor)
    tokens = plan.rows * plan.length
    return {
        "weights": weights / GIB,
        "trained": state / GIB,
        "activations": activations(config, tokens, plan.length, 2, plan.tensor, TARGETS, method) / GIB,
    }


def flops_a_token(config: DecoderConfig, length: int) -> dict[str, float]:
    """Returns GFLOPs per token of one step by method: forward plus the backward that it needs.

    Nothing is recomputed but the scores of attention in parts.
    """
    count = sizes(config)
    products = 2 * (count["kernels"] + count["head"])
    # Scores and their products with values.
    scores = 2 * keys_seen(length) * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    attention = 2 * scores
    forward = products + attention
    # The backward pass of attention in parts begins with the scores.
    attention_backward = 2 * attention + (scores if part_of(length) < length else 0)
    rotated = outputs(config) * config.num_hidden_layers
    return {
        # Per output 4 FLOPs forward, and backward 4 for y and 6 for θ and α.
        "RoAd 1": (forward + products + attention_backward + 14 * rotated) / 1e9,
        "LoRA r8": (forward + products + attention_backward + 6 * count["LoRA r8"]) / 1e9,
        "full": (forward + 2 * products + attention_backward) / 1e9,
    }


def compiled(
    config: DecoderConfig,
    axes: Mapping[str, int],
    rows: int,
    length: int,
    quantize: str | None = None,
    remat: Remat = "linears",
) -> Any:
    """Compiles the gradient of RoAd 1 in float32 as `road_jax.train` computes it, from shapes alone.

    Args:
        config: the decoder's config.
        axes: sizes of the axes data, fsdp and tensor; axes not named have size 1.
        rows: rows of a chip's batch.
        length: tokens per row.
        quantize: kind of `road_jax.quantize` for the layers' kernels; None for none.
        remat: the decoder's rematerialisation policy.
    """
    sizes = [axes.get(name, 1) for name in AXES]
    mesh = Mesh(np.asarray(jax.devices()[: math.prod(sizes)]).reshape(sizes), AXES)
    model = Decoder(config, remat=remat)
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), jnp.int32))
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear"))
    adapter = jax.eval_shape(lambda v: road.init(jax.random.key(0), v, jnp.zeros((1, 8), jnp.int32)), variables)
    if quantize is not None:
        leaves = flatten(variables["params"])
        for path, leaf in leaves.items():
            if path[-1] == "kernel" and "layers" in path:
                leaves[path] = quantized_shapes(quantize, leaf.shape[:-2], leaf.shape[-2:], leaf.dtype)
        variables = {"params": unflatten(leaves)}

    def lying(tree: Any, where: Any) -> Any:
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, where)

    at_work = models.shardings(variables, mesh, stored=False)
    adapter = lying(adapter, road_jax.shardings(adapter, at_work, config=road.config))
    variables = lying(variables, models.shardings(variables, mesh))
    everything = rows * mesh.shape["data"] * mesh.shape["fsdp"]

    def dealt(width: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((everything, width), dtype, sharding=rows_sharding(mesh))

    batch = {
        "input_ids": dealt(length),
        "segments": dealt(length),
        "logits_at": dealt(length),
        "targets": dealt(length),
        "weights": dealt(length, jnp.float32),
    }
    road = _step.on_mesh(road, mesh)
    gradient = jax.grad(lambda adapter, *rest: _step.summed_loss(road, adapter, *rest)[0])
    return jax.jit(gradient).lower(adapter, variables, batch).compile()


def check() -> list[tuple[str, float, float]]:
    """Returns ``(case, planned MiB, compiled MiB)`` of activations.

    Cases that need more devices than there are are skipped.
    """
    found = []

    def add(name: str, planned: float, memory: float) -> None:
        found.append((f"{name} tokens, float32", planned / 2**20, memory))

    for hidden, mlp, layers, heads, rows, length in (
        (256, 1024, 4, 4, 4, 256),
        (512, 2048, 6, 8, 4, 256),
        (512, 2048, 12, 8, 4, 256),
        (512, 1536, 6, 8, 2, 1024),
        (1024, 2816, 4, 16, 4, 512),
    ):
        config = config_of(hidden, mlp, layers, heads, heads, 1024)
        program = compiled(config, {}, rows, length)
        planned = activations(config, rows * length, length, 4, 1, TARGETS)
        add(f"width {hidden}, MLP {mlp}, {layers} layers, {rows} × {length}", planned, temp_mib(program))
    for plan in CHECKED:
        if plan.data * plan.tensor > jax.device_count():
            continue
        config, kind = config_of(*MODELS[plan.model]), "nf4" if plan.bits < 16 else None
        axes = {"fsdp" if plan.fsdp else "data": plan.data, "tensor": plan.tensor}
        program = compiled(config, axes, plan.rows, plan.length, kind)
        planned = activations(config, plan.rows * plan.length, plan.length, 4, plan.tensor, TARGETS)
        said = f"{plan.model}{f' in {kind}' if kind else ''} on {said_mesh(plan)}, {plan.rows} × {plan.length}"
        add(said, planned, temp_mib(program))
    options = jax_cost.Options()
    tokens = options.rows * options.length
    for name, program in jax_cost.arms(options, scan=True, remat="linears", only=tuple(ARMS)).items():
        planned = activations(jax_cost.config(), tokens, options.length, 4, 1, tokens, ARMS[name])
        add(f"{name} of `benchmarks.jax_cost`, {options.rows} × {options.length}", planned, program.temp_mib())
    return found


def check_flops() -> list[tuple[str, float, float]]:
    """Returns ``(arm, planned GFLOPs per token, compiled GFLOPs per token)`` for the model of `benchmarks.jax_cost`."""
    options = jax_cost.Options()
    planned = flops_a_token(jax_cost.config(), options.length)
    found = jax_cost.arms(options, scan=False, remat="none", only=tuple(ARMS))
    tokens = options.rows * options.length
    return [(name, planned[ARMS[name]], program.flops() / tokens / 1e9) for name, program in found.items()]


def temp_mib(program: Any) -> float:
    """Returns a compiled program's temporary memory on a device, besides arguments and results, in MiB."""
    return program.memory_analysis().temp_size_in_bytes / 2**20


def said_mesh(plan: Plan) -> str:
    """Returns the sizes of a plan's mesh as text."""
    return f"{plan.data} × {plan.tensor}{', fsdp' if plan.fsdp else ''}"


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    # Pretend devices must be set up before anything asks for a device.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(plan.data * plan.tensor for plan in CHECKED))
    lines = [
        "# Capacity",
        "",
        "What training takes on meshes that this project doesn't have, computed by `python -m benchmarks.capacity`",
        "from shapes alone. Nothing on this page was measured on those chips. The last tables check the plan's",
        "activations and FLOPs against the compiler's own figures.",
        "",
        "## Bytes a chip",
        "",
        "Figures are GiB per chip: weights + trained (params, gradients, Adam, float32) + activations = all. Rows",
        "have 2048 tokens. `fsdp` splits weights over `data` too. Weights of 4 bits are nf4's (4.5 bits with",
        "scales); full training has no entry for them.",
        "",
        "Kept for the backward pass are a layer's input and the outputs of its linear layers; the inputs of the",
        'others are recomputed from these (`remat="linears"`). The same policy also keeps the outputs of LoRA\'s',
        "factors, the second in full width. A policy that distinguished these from other outputs would bring LoRA",
        "near to RoAd.",
        "",
        "With `road-train --mesh`, a mesh of 8 × 4 here is `data=8,tensor=4`, and with `fsdp` it is",
        "`fsdp=8,tensor=4`.",
        "",
        "| model | mesh (data × model) | weights | rows a chip | RoAd 1 | LoRA r8 | full |",
        "|---|---|---|---|---|---|---|",
    ]
    for plan in PLANS:
        cells = []
        for method in ("RoAd 1", "LoRA r8", "full"):
            if method == "full" and plan.bits < 16:
                cells.append("")
                continue
            parts = bytes_a_chip(plan, method)
            whole = " + ".join(f"{part:.2f}" if part < 1 else f"{part:.1f}" for part in parts.values())
            cells.append(f"{whole} = **{sum(parts.values()):.1f}**")
        bits = "4 bits" if plan.bits < 16 else "bfloat16"
        lines.append(f"| {plan.model} | {said_mesh(plan)} | {bits} | {plan.rows} | {' | '.join(cells)} |")
    lines += [
        "",
        "## FLOPs a token",
        "",
        "GFLOPs per token of one step, forward and backward, with rows of 2048 tokens and nothing recomputed but",
        "scores of attention. A frozen kernel needs no gradient of its own, so RoAd and LoRA save a third against full",
        "training.",
        "",
        "| model | trained: RoAd 1 / LoRA r8 / full | RoAd 1 | LoRA r8 | full |",
        "|---|---|---|---|---|",
    ]
    for model in MODELS:
        config = config_of(*MODELS[model])
        count, flops = sizes(config), flops_a_token(config, 2048)
        trained = " / ".join(f"{count[method]:,}" for method in ("RoAd 1", "LoRA r8", "full"))
        lines.append(f"| {model} | {trained} | " + " | ".join(f"{value:,.1f}" for value in flops.values()) + " |")
    lines += [
        "",
        "## The check",
        "",
        "Temporary memory of a device in the compiled gradient, of RoAd 1 unless stated otherwise",
        '(`memory_analysis`, `remat="linears"`). The cases on meshes are programs of `road-train --mesh`, compiled',
        "for as many pretend CPU devices and not run. They are in float32, since XLA on CPU computes bfloat16 in",
        "float32 too.",
        "",
        "| case | planned MiB | compiled MiB | compiled / planned |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {planned:.0f} | {compiled:.0f} | {compiled / planned:.2f} |" for name, planned, compiled in check()
    ]
    lines += [
        "",
        "FLOPs of the gradient of `benchmarks.jax_cost`'s model, with nothing recomputed but scores of attention",
        "(XLA's count, which also includes norms, activations and softmax, and that model's biases).",
        "",
        "| method | planned GFLOPs a token | compiled GFLOPs a token | compiled / planned |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {planned:.4f} | {compiled:.4f} | {compiled / planned:.3f} |"
        for name, planned, compiled in check_flops()
    ]
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(options.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
