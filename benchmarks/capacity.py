"""What training takes on meshes that don't stand here: bytes a chip and FLOPs a token, for RoAd, LoRA r8 and full.

Sizes come from ``jax.eval_shape`` of `road_jax.models.Decoder`: nothing is allocated. The plan is

- weights: every kernel and the embedding, split over ``model`` and, with ``fsdp``, over ``data`` as well;
- trained: params, gradients and Adam's two moments in float32 (full: bfloat16 params besides);
- kept: with ``remat="linears"`` a layer's input and what its linear layers gave, for each token of a chip's rows;
- passing: one layer computed anew in the backward pass, and the logits of one row with their gradient.

Its activations are checked against the compiler's own memory analysis of models that compile here, at several widths,
and the table of that check is written beside the plan. Writes ``docs/capacity.md``.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

import road_jax
from road_jax import RoadConfig
from road_jax._tree import flatten
from road_jax.models import Decoder, DecoderConfig

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
        bits: of a weight: 16, or 4 for nf4 (with its scales 4.5).
        rows: of a chip's batch.
        length: tokens in a row.
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


@dataclasses.dataclass(frozen=True)
class Options:
    """Writes the capacity plan."""

    # Where it goes.
    out: Path = Path("docs/capacity.md")


def config_of(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> DecoderConfig:
    """Returns a Llama of these sizes."""
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
    """Returns the number of parameters: of kernels, of all others, and of what each method trains."""
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
    """Returns how many numbers the linear layers of one layer give for a token."""
    c = config
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    return heads + 2 * c.hidden_size + 2 * c.intermediate_size


def activations(config: DecoderConfig, tokens: int, length: int, itemsize: int, tensor: int, logits: int) -> float:
    """Returns the bytes that a chip keeps and passes through, for so many tokens in rows of ``length``."""
    c = config
    # A layer's output projections are whole on every chip; the others are split over `model`.
    split, whole = outputs(c) - 2 * c.hidden_size, 2 * c.hidden_size
    kept = tokens * itemsize * (c.hidden_size + whole + split / tensor) * c.num_hidden_layers
    # Anew in the backward pass: each linear's output before and after its rotation, their gradients, and attention.
    scores = 3 * 4 * tokens * length * c.num_attention_heads / tensor
    passing = tokens * itemsize * 3 * (whole + split / tensor) + scores
    return kept + passing + 3 * 4 * logits * c.vocab_size / tensor


def bytes_a_chip(plan: Plan, method: str) -> dict[str, float]:
    """Returns GiB of weights, of what is trained, and of activations."""
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
        "activations": activations(config, tokens, plan.length, 2, plan.tensor, plan.length) / GIB,
    }


def flops_a_token(model: str, length: int) -> dict[str, float]:
    """Returns GFLOPs a token of a step, recomputation aside: forward, and backward for what each method needs."""
    config = config_of(*MODELS[model])
    count = sizes(config)
    products = 2 * (count["kernels"] + count["head"])
    # Scores and their use, causal: half of the square.
    attention = 2 * length * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    forward = products + attention
    rotated = outputs(config) * config.num_hidden_layers
    return {
        # Forward 4 flops an output, backward 4 for y and 6 for θ and α.
        "RoAd 1": (forward + products + 2 * attention + 14 * rotated) / 1e9,
        "LoRA r8": (forward + products + 2 * attention + 6 * count["LoRA r8"]) / 1e9,
        "full": (forward + 2 * products + 2 * attention) / 1e9,
    }


def check() -> list[tuple[str, float, float]]:
    """Returns ``(case, planned MiB, compiled MiB)`` of activations for models that compile here."""
    found = []
    for hidden, mlp, layers, heads, rows, length in (
        (256, 1024, 4, 4, 4, 256),
        (512, 2048, 6, 8, 4, 256),
        (512, 2048, 12, 8, 4, 256),
        (512, 1536, 6, 8, 2, 1024),
        (1024, 2816, 4, 16, 4, 512),
    ):
        config = config_of(hidden, mlp, layers, heads, heads, 1024)
        model = Decoder(config)
        ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        variables = jax.eval_shape(model.init, jax.random.key(0), ids)
        road = road_jax.transform(model, RoadConfig(target_modules="all-linear"))
        adapter = jax.eval_shape(
            lambda v, r=road: r.init(jax.random.key(0), v, jnp.zeros((1, 8), jnp.int32)), variables
        )

        def loss(adapter: Any, variables: Any, ids: jax.Array, apply: Callable = road.apply) -> jax.Array:
            logits = apply(variables, adapter, ids)
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()

        memory = jax.jit(jax.grad(loss)).lower(adapter, variables, ids).compile().memory_analysis()
        planned = activations(config, rows * length, length, 4, 1, rows * length)
        name = f"width {hidden}, MLP {mlp}, {layers} layers, {rows} × {length} tokens, float32"
        found.append((name, planned / 2**20, memory.temp_size_in_bytes / 2**20))
    return found


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    lines = [
        "# Capacity",
        "",
        "What training takes on meshes that don't stand here, computed by `python -m benchmarks.capacity` from shapes",
        "alone. Nothing on this page was measured on those chips; the last table checks the plan's activations against",
        "the compiler's memory analysis where models compile here.",
        "",
        "## Bytes a chip",
        "",
        "GiB: weights + trained (params, gradients, Adam, float32) + activations = all. Rows of 2048 tokens; `fsdp`",
        "splits weights over `data` too. Weights of 4 bits are nf4's (4.5 with scales), for which full training has no",
        "entry.",
        "Activations are RoAd's in every column: LoRA also keeps the inputs of its factors, full training those of all",
        "layers, which is left out here (`benchmarks/jax_cost.py` measures it in small).",
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
        mesh = f"{plan.data} × {plan.tensor}{', fsdp' if plan.fsdp else ''}"
        bits = "4 bits" if plan.bits < 16 else "bfloat16"
        lines.append(f"| {plan.model} | {mesh} | {bits} | {plan.rows} | {' | '.join(cells)} |")
    lines += [
        "",
        "## FLOPs a token",
        "",
        "GFLOPs of one step, forward and backward, rows of 2048 tokens; recomputation aside. A frozen kernel needs no",
        "gradient of its own, so RoAd and LoRA save a third against full training.",
        "",
        "| model | trained: RoAd 1 / LoRA r8 / full | RoAd 1 | LoRA r8 | full |",
        "|---|---|---|---|---|",
    ]
    for model in MODELS:
        count, flops = sizes(config_of(*MODELS[model])), flops_a_token(model, 2048)
        trained = " / ".join(f"{count[method]:,}" for method in ("RoAd 1", "LoRA r8", "full"))
        lines.append(f"| {model} | {trained} | " + " | ".join(f"{value:,.1f}" for value in flops.values()) + " |")
    lines += [
        "",
        "## The check",
        "",
        'Temporary memory of the compiled gradient of RoAd 1 (`memory_analysis` on CPU, `remat="linears"`).',
        "",
        "| case | planned MiB | compiled MiB | compiled / planned |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {planned:.0f} | {compiled:.0f} | {compiled / planned:.2f} |" for name, planned, compiled in check()
    ]
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(options.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
