"""`TrainOptions`, the options of a training run, and their checks."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jax.sharding import Mesh

from road_core import AdapterError
from road_core._config import config_of_run
from road_core._files import check_free, inside, read_json
from road_core._safetensors import read_shards
from road_jax import models
from road_jax.train import _step


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Supervised fine-tuning of RoAd on a Hugging Face decoder, in Flax.

    Defaults follow the paper's recipe (arXiv 2409.00119, appendix): AdamW without weight decay, a linear schedule with
    10 % warm-up, a learning rate about ten times LoRA's.
    """

    base: Path
    """Folder of the Hugging Face checkpoint: config.json, safetensors, tokenizer."""
    data: Path
    """JSONL with {"prompt", "completion"} or {"messages"} lines."""
    out: Path
    """New folder for the adapter, metrics, pictures and checkpoints."""
    eval_data: Path | None = None
    """JSONL with held-out lines. Without it, --eval-lines lines are held out of the data."""
    eval_lines: int = 64
    """Number of lines that are held out of the data if there is no --eval-data; 0 for none."""
    eval_every: int | None = None
    """Number of steps between evaluations, which also take place before the first step and after the last."""
    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    """Parameters per pair of outputs: one θ and one α, two of each, or four of each."""
    group_size: int = 64
    """Outputs are paired within groups of this size."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Names of layers, or all-linear."""
    subspace: tuple[float, float] | None = None
    """START STOP: train only this part of each layer's 2x2 blocks, given as fractions. Adapters on parts that don't
    overlap compose exactly."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole beside θ and α and saved in the adapter, such as lm_head."""
    steps: int | None = None
    """Number of optimiser steps. Without it, --epochs decides."""
    epochs: int = 3
    """Number of passes over the data if --steps isn't given."""
    batch_size: int = 8
    """Rows in a batch. Lines are packed into rows."""
    accumulate: int = 1
    """Split each device's rows of a batch into this many parts, computed one after the other, to save memory."""
    max_length: int = 512
    """Tokens in a row; no line may be longer."""
    skip_long: bool = False
    """Leave out lines that are longer than --max-length instead of refusing them."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    warmup: float = 0.1
    """Fraction of the steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's weight decay on θ and α."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the base and its activations. θ, α and the optimiser's state are float32."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How the devices share a batch."""
    mesh: str | None = None
    """Device mesh, e.g. data=2,fsdp=2,tensor=2. data and fsdp split a batch's rows, fsdp also keeps the base in shares,
    tensor computes heads, MLP and vocabulary in shares. By default all devices are on the data axis."""
    scan: bool = True
    """Compile one layer and scan over the layers; --no-scan unrolls them (slow to compile, another adapter layout)."""
    remat: Literal["none", "linears", "full"] = "linears"
    """Which of a layer's activations are kept for the backward pass: with none all but scores of attention in rows of
    more than 128 tokens, with linears the outputs of its linear layers, with full only its input. The rest is
    recomputed."""
    seed: int = 0
    """Seed for the order of the data and the choice of held-out lines."""
    quantize: Literal["nf4", "int8", "none"] = "none"
    """Precision of the base's weights during training: 4 bits, 8 bits, or unchanged. θ and α stay float32."""
    checkpoint_every: int = 50
    """Number of steps between checkpoints."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for a run with several processes (hosts); auto if the cluster provides it."""
    processes: int | None = None
    """Number of processes in the run."""
    process: int | None = None
    """This process's number, from 0. Process 0 writes the files."""
    compile_cache: Path | None = None
    """Folder in which compiled programs are kept for the next run."""
    profile_steps: int = 0
    """Trace this many steps, after the first, with jax.profiler; the trace is written to --out/profile."""
    resume: bool = False
    """Continue from the last checkpoint in --out, as if the run hadn't been stopped."""


# Options that may differ between a run and its resumption.
_FREE = (
    *("out", "resume", "checkpoint_every", "compile_cache", "profile_steps"),
    *("coordinator", "processes", "process"),
)

# Keys in options.json for the digests of the base and of the data's tokens.
BASE, TOKENS = "base_sha256", "tokens_sha256"

# How many bytes of each of the base's tensors go into its digest.
_SAMPLE = 1 << 12


def check(options: TrainOptions) -> Mesh:
    """Refuses everything that can be known to be wrong before anything is loaded; returns the mesh."""
    for name, hint in get_type_hints(TrainOptions).items():
        if get_origin(hint) is Literal and getattr(options, name) not in get_args(hint):
            raise AdapterError(f"{name}: expected one of {', '.join(get_args(hint))}, found {getattr(options, name)!r}")
    for name, least in (
        ("batch_size", 1),
        ("max_length", 2),
        ("epochs", 1),
        ("checkpoint_every", 1),
        ("accumulate", 1),
        ("profile_steps", 0),
        ("eval_lines", 0),
    ):
        if getattr(options, name) < least:
            raise AdapterError(f"{name}: expected a number from {least} up, found {getattr(options, name)}")
    for name in ("steps", "eval_every"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise AdapterError(f"{name}: expected a number from 1 up, found {getattr(options, name)}")
    if not 0 <= options.warmup <= 1:
        raise AdapterError(f"warmup: expected a fraction of the steps, found {options.warmup}")
    if not 0 < options.learning_rate < math.inf:
        raise AdapterError(f"learning_rate: expected a positive number, found {options.learning_rate}")
    if not 0 <= options.weight_decay < math.inf:
        raise AdapterError(f"weight_decay: expected a number from 0 up, found {options.weight_decay}")
    if not 0 <= options.seed < 1 << 32:
        raise AdapterError(f"seed: expected a number from 0 to {(1 << 32) - 1}, found {options.seed}")
    mesh = models.make_mesh(None if options.mesh is None else _sizes(options.mesh))
    if options.parallel == "pmap" and mesh.shape["data"] != mesh.size:
        raise AdapterError(f"parallel: expected jit for a mesh of {options.mesh}, found pmap")
    _step.check_rows(options.batch_size, mesh, options.accumulate)
    config_of_run(dataclasses.asdict(options))
    if not options.resume:
        check_free(options.out)
        return mesh
    if not (options.out / "options.json").is_file():
        raise AdapterError(f"{options.out}: expected a run to resume, found no options.json")
    return mesh


def check_begun(options: TrainOptions, now: dict[str, Any]) -> None:
    """Refuses to resume a run that began with other options or data, or with other tokens if these are known yet."""
    begun = read_json(options.out / "options.json")
    # The tokens aren't known at first, and earlier versions didn't write the base's digest.
    for name in (TOKENS, BASE):
        if name not in now or name not in begun:
            begun.pop(name, None)
            now = {key: value for key, value in now.items() if key != name}
    changed = sorted(name for name in begun.keys() | now.keys() if begun.get(name) != now.get(name))
    if changed:
        name = changed[0]
        raise AdapterError(
            f"{options.out}: expected the options that the run began with, "
            f"found {name} {now.get(name)!r} instead of {begun.get(name)!r}"
        )


def _sizes(mesh: str) -> dict[str, int]:
    """Parses ``data=2,fsdp=4``."""
    sizes = {}
    for part in mesh.split(","):
        name, _, size = part.strip().partition("=")
        if not size.isdecimal() or name in sizes:
            raise AdapterError(f"mesh: expected axes and sizes as data=2,fsdp=2,tensor=2, found {mesh!r}")
        sizes[name] = int(size)
    return sizes


def fingerprint(options: TrainOptions) -> dict[str, Any]:
    """Returns the options that decide a run's result, and the data's digests; the tokens' digest is added later."""
    fields = {name: value for name, value in dataclasses.asdict(options).items() if name not in _FREE}
    fields = json.loads(json.dumps(fields, default=str))
    for name in ("data", "eval_data"):
        path = getattr(options, name)
        if path is not None and Path(path).is_file():
            fields[f"{name}_sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return fields


def shared_fields(options: TrainOptions, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Returns what must be the same in all processes of a run; each may have its files elsewhere."""
    fields = fingerprint | {name: getattr(options, name) for name in ("resume", "checkpoint_every")}
    return {name: value for name, value in fields.items() if name not in ("base", "data", "eval_data")}


def digest_base(base: Path) -> str:
    """Returns a digest of the config and of each tensor's type and beginning, because reading a whole base is slow."""
    digest = hashlib.sha256(inside(base, "config.json").read_bytes())
    for header, _ in read_shards(base)[0].values():
        for name, entry in sorted(header.items()):
            digest.update(f"\n{name} {entry.dtype} {entry.shape}\n".encode() + entry.bytes()[:_SAMPLE].tobytes())
    return digest.hexdigest()
