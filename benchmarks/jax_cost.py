"""Measures what a gradient costs in JAX, by what is trained: FLOPs, memory and time of the compiled program.

The model is a decoder of 6 layers (width 512, MLP 2048, 8 heads, vocabulary 512) in float32, with 4 × 256 tokens and a
loss at every token. The arms are

- the forward pass;
- biases alone, the floor: whatever is trained behind frozen kernels costs at least as much;
- RoAd 1, 2 and 4, and RoAd 1 on bases of 8 and 4 bits;
- LoRA r8, built by qwix, a LoRA library for JAX;
- all kernels;
- RoAd 1 by rotating the kernels, which are merged again in each step;
- RoAd 1 the naive way, by multiplying the outputs with a rotation matrix.

FLOPs are XLA's count for the unrolled program. Time and memory are those of the scanned program, as it is trained, with
the outputs of linear layers kept (``remat="linears"``). Memory is also given with everything kept (``"none"``) and with
only the blocks' inputs kept (``"full"``, block-wise). A base's memory is that of its arrays; a program's peak is the
sum of its arguments, results and temporary memory. Arms take turns within a round. Writes
``benchmarks/results/jax_cost.json`` and ``.png``.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import road_jax
from benchmarks._common import RESULTS, bars, device, median_ratios, settings, write
from road_jax import RoadConfig
from road_jax._tree import flatten, unflatten
from road_jax.models import Decoder, DecoderConfig

FLOOR = "biases (the floor)"
FORWARD = "forward"

# A function of trained and frozen variables that returns logits, and those variables.
Parts = tuple[Callable[[Any, Any], jax.Array], Any, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """Counts and times gradients of RoAd, LoRA, biases and all kernels in JAX."""

    # Rows, and tokens per row.
    rows: int = 4
    length: int = 256
    # Number of rounds; every arm runs once per round. 0 counts FLOPs and memory without timing.
    rounds: int = 15
    # Folder for the figures.
    out: Path = RESULTS


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console()
    results: dict[str, Any] = {"device": device("jax"), "options": settings(options), "arms": {}}
    flops = {name: program.flops() for name, program in arms(options, scan=False, remat="none").items()}
    scanned = arms(options, scan=True, remat="linears")
    plain = arms(options, scan=True, remat="none")
    blockwise = arms(options, scan=True, remat="full")
    kept = {"": scanned, "_nothing_recomputed": plain, "_blocks_recomputed": blockwise}
    for name, program in scanned.items():
        results["arms"][name] = {
            "flops": flops[name],
            "flops_over_floor": flops[name] / flops[FLOOR],
            **{
                f"{kind}_mib{of}": getattr(by_name[name], f"{kind}_mib")()
                for kind in ("temp", "peak")
                for of, by_name in kept.items()
            },
            "trained": program.trained,
            "base_mib": program.base_mib(),
        }
    if options.rounds:
        times: dict[str, list[float]] = {name: [] for name in scanned}
        with Progress(console=console) as bar:
            task = bar.add_task(f"{options.rounds} rounds", total=options.rounds * len(scanned))
            for number in range(-1, options.rounds):
                order = [*scanned][number % len(scanned) :] + [*scanned][: number % len(scanned)]
                for name in order:
                    start = time.perf_counter()
                    scanned[name].run()
                    # The first round warms up.
                    if number >= 0:
                        times[name].append(time.perf_counter() - start)
                        bar.advance(task)
        for name, (ratio, ratios) in median_ratios(times, FLOOR).items():
            results["arms"][name] |= {
                "time_over_floor": ratio,
                "ratios": ratios,
                "seconds": statistics.median(times[name]),
            }
        shown = {"time": {name: row["time_over_floor"] for name, row in results["arms"].items()}}
        bars(shown, options.out / "jax_cost.png", title=f"A gradient in JAX\n{results['device']}", of=FLOOR)
    write(options.out / "jax_cost.json", results)
    console.print(table(results))


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled gradient and its arguments."""

    compiled: Any
    # Pytrees: the trained parameters and the frozen ones.
    arguments: tuple[Any, Any]

    @property
    def trained(self) -> int:
        """The number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.arguments[0]))

    def run(self) -> None:
        """Runs the program and waits for its results."""
        jax.block_until_ready(self.compiled(*self.arguments))

    def flops(self) -> float:
        """Returns XLA's FLOP count; a loop's body counts once."""
        return float(self.compiled.cost_analysis()["flops"])

    def temp_mib(self) -> float:
        """Returns the program's temporary memory, besides arguments and results."""
        return self.compiled.memory_analysis().temp_size_in_bytes / 2**20

    def peak_mib(self) -> float:
        """Returns all memory of the program, including its arguments and so the base."""
        sizes = self.compiled.memory_analysis()
        return self.temp_mib() + (sizes.argument_size_in_bytes + sizes.output_size_in_bytes) / 2**20

    def base_mib(self) -> float:
        """Returns the memory of the frozen params."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.arguments[1])) / 2**20


def arms(options: Options, *, scan: bool, remat: Any, only: tuple[str, ...] = ()) -> dict[str, Program]:
    """Compiles every arm, or only those named."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 512, (options.rows, options.length)), jnp.int32)
    model = Decoder(config(), scan=scan, remat=remat)
    variables = jax.jit(model.init)(jax.random.key(0), ids[:, :8])

    def adapted(variant: str) -> tuple[road_jax.Road, Any]:
        road = road_jax.transform(model, RoadConfig(variant=variant, target_modules="all-linear"))
        return road, road.init(jax.random.key(1), variables, ids)

    def rotated(variant: str, kind: Any = None) -> Parts:
        road, adapter = adapted(variant)
        frozen = variables if kind is None else road_jax.quantize(variables, kind)
        return lambda a, v: road.apply(v, a, ids), adapter, frozen

    def with_rotated_kernels() -> Parts:
        road, adapter = adapted("road_1")
        return lambda a, v: model.apply(road.merge(v, a), ids), adapter, variables

    def with_dense_rotations() -> Parts:
        _, adapter = adapted("road_1")
        return lambda a, v: _turned(model, v, a, ids), adapter, variables

    def of(module: nn.Module, variables: Any, is_trained: Callable[[tuple[str, ...]], bool]) -> Parts:
        return lambda trained, frozen: module.apply(_join(trained, frozen), ids), *_split(variables, is_trained)

    makers: dict[str, Callable[[], Parts]] = {
        FORWARD: lambda: (lambda _, frozen: model.apply(frozen, ids), {}, variables),
        FLOOR: lambda: of(model, variables, lambda path: path[-1] == "bias"),
        **{f"RoAd {number}": functools.partial(rotated, f"road_{number}") for number in (1, 2, 4)},
        **{f"RoAd 1 on {kind}": functools.partial(rotated, "road_1", kind) for kind in ("int8", "nf4")},
        "LoRA r8 (qwix)": lambda: of(*_lora(model, ids), lambda path: "lora" in path[-1]),
        "all kernels": lambda: of(model, variables, lambda path: path[-1] == "kernel" and "lm_head" not in path),
        "RoAd 1, kernels rotated": with_rotated_kernels,
        "RoAd 1, dense rotations": with_dense_rotations,
    }

    def compiled(name: str) -> Program:
        logits, trained, frozen = makers[name]()

        def loss(trained: Any, frozen: Any) -> jax.Array:
            scores = logits(trained, frozen)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(scores, ids[:, 1:]).mean()

        program = jax.jit(loss if name == FORWARD else jax.value_and_grad(loss))
        return Program(program.lower(trained, frozen).compile(), (trained, frozen))

    return {name: compiled(name) for name in makers if not only or name in only}


def config() -> DecoderConfig:
    """Returns the decoder's config."""
    fields = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "attention_bias": True,
        "mlp_bias": True,
    }
    return DecoderConfig.from_hugging_face(fields, "benchmark")


def _lora(model: Decoder, ids: jax.Array) -> tuple[nn.Module, Any]:
    import qwix

    rule = qwix.LoraRule(module_path=r"model/layers/.*_proj", rank=8, alpha=16.0)
    lora = qwix.apply_lora_to_model(model, qwix.LoraProvider([rule]))
    variables = jax.jit(lora.init)(jax.random.key(0), ids[:, :8])
    return lora, variables


def _turned(model: Decoder, variables: Any, adapter: Any, ids: jax.Array) -> jax.Array:
    """Applies a model, multiplying the outputs of its linear layers by rotation matrices formed from θ and α."""

    def turn(next_fn: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y, module = next_fn(*args, **kwargs), context.module
        if context.method_name != "__call__" or not module.has_variable("params", "road_theta"):
            return y
        return y @ rotation_matrix(*(module.get_variable("params", f"road_{name}") for name in ("theta", "alpha")))

    with nn.intercept_methods(turn):
        return model.apply(_join(adapter, variables), ids)


def rotation_matrix(theta: jax.Array, alpha: jax.Array, group_size: int = 64) -> jax.Array:
    """Returns the matrix ``[out, out]`` of road_1, by which outputs ``[..., out]`` are multiplied from the right."""
    out, (cosines, sines) = 2 * theta.size, (alpha * jnp.cos(theta), alpha * jnp.sin(theta))
    pairs = np.arange(out).reshape(-1, 2, group_size // 2)
    first, second = pairs[:, 0].ravel(), pairs[:, 1].ravel()
    matrix = jnp.zeros((out, out), theta.dtype).at[first, first].set(cosines).at[second, second].set(cosines)
    return matrix.at[second, first].set(-sines).at[first, second].set(sines)


def _split(variables: Any, wanted: Callable[[tuple[str, ...]], bool]) -> tuple[Any, Any]:
    """Returns the params to train, and the variables with the remaining params."""
    leaves = flatten(variables["params"])
    trained = {path: leaf for path, leaf in leaves.items() if wanted(path)}
    if not trained:
        raise SystemExit("expected params to train, found none")
    frozen = {path: leaf for path, leaf in leaves.items() if path not in trained}
    return unflatten(trained), {**variables, "params": unflatten(frozen)}


def _join(trained: Any, frozen: Any) -> Any:
    return {**frozen, "params": unflatten({**flatten(frozen["params"]), **flatten(trained)})}


def table(results: dict[str, Any]) -> Table:
    """Returns a table of the figures of all arms."""
    shown = Table(title="a gradient in JAX, float32", caption=results["device"])
    sizes = {
        "base MiB": "base_mib",
        "temp MiB": "temp_mib",
        "all kept": "temp_mib_nothing_recomputed",
        "block-wise": "temp_mib_blocks_recomputed",
        "block-wise, all": "peak_mib_blocks_recomputed",
    }
    for column in ("arm", "trained", "FLOPs / floor", "time / floor", *sizes):
        shown.add_column(column, justify="left" if column == "arm" else "right")
    for name, row in results["arms"].items():
        timed = f"{row['time_over_floor']:.2f}" if "time_over_floor" in row else ""
        numbers = (f"{row['trained']:,}", f"{row['flops_over_floor']:.3f}", timed)
        memory = (f"{row[size]:.0f}" for size in sizes.values())
        shown.add_row(name, *numbers, *memory)
    return shown


if __name__ == "__main__":
    main()
