"""What a training run is told, and the checks of it: `TrainOptions`."""

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
    """JSONL of held-out lines. Without it, --eval-lines are taken from the data."""
    eval_lines: int = 64
    """How many lines of the data are held out when there is no --eval-data; 0 for none."""
    eval_every: int | None = None
    """Evaluate every so many steps, besides before the first and after the last."""
    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    """Parameters for a pair of outputs: one θ and α, two, or four."""
    group_size: int = 64
    """Outputs are paired within groups of this many."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Names of layers, or all-linear."""
    subspace: tuple[float, float] | None = None
    """START STOP: train only this part of each layer's 2x2 blocks, as fractions. Adapters on parts that don't overlap
    compose exactly."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole beside θ and α, and kept in the adapter; lm_head for one."""
    steps: int | None = None
    """Optimiser steps. Without it, --epochs decide."""
    epochs: int = 3
    """How often the data is gone through, when there are no --steps."""
    batch_size: int = 8
    """Rows in a batch. Lines are packed into rows."""
    accumulate: int = 1
    """Parts that a device's rows of a batch are taken in, one after the other, for one step: less memory."""
    max_length: int = 512
    """Tokens in a row; no line may be longer."""
    skip_long: bool = False
    """Leave lines out that are longer than --max-length, instead of refusing them."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    warmup: float = 0.1
    """Fraction of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's weight decay on θ and α."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the base and its activations. θ, α and the optimiser are float32."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How the devices share a batch."""
    mesh: str | None = None
    """How the devices are laid out, as data=2,fsdp=2,tensor=2: data deals a batch's rows, fsdp does too and stores the
    base in shares, tensor computes heads, MLP and vocabulary in shares. Without it all devices are data."""
    scan: bool = True
    """Compile one layer and scan it; --no-scan unrolls (slower to compile, another adapter layout)."""
    remat: Literal["none", "linears", "full"] = "linears"
    """What of a layer's activations is kept for the backward pass: all, what its linear layers gave, or nothing but its
    input; the rest is computed anew."""
    seed: int = 0
    """Of the order of the data."""
    quantize: Literal["nf4", "int8", "none"] = "none"
    """The base's weights while training: 4 bits, 8 bits, or as they are. θ and α stay float32."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for a run of several processes (hosts); auto where the cluster tells."""
    processes: int | None = None
    """How many processes the run has."""
    process: int | None = None
    """This process's number, from 0. Process 0 writes."""
    compile_cache: Path | None = None
    """Folder where compiled programs are kept for the next run."""
    profile_steps: int = 0
    """Trace so many steps, after the first, with jax.profiler; the trace goes to --out/profile."""
    resume: bool = False
    """Go on from the last checkpoint in --out, as if the run had not been stopped."""


# What may differ between a run and its resumption.
_FREE = (
    *("out", "resume", "checkpoint_every", "compile_cache", "profile_steps"),
    *("coordinator", "processes", "process"),
)

# In options.json: of the base, and of the tokens that the data came to.
BASE, TOKENS = "base_sha256", "tokens_sha256"

# Bytes of each of the base's tensors that its digest sees.
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
    """Refuses to resume a run that was begun with other options or data; other tokens too, where they are known."""
    begun = read_json(options.out / "options.json")
    # Tokens aren't known at first; that of the base wasn't written by earlier versions.
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
    """Reads ``data=2,fsdp=4``."""
    sizes = {}
    for part in mesh.split(","):
        name, _, size = part.strip().partition("=")
        if not size.isdecimal() or name in sizes:
            raise AdapterError(f"mesh: expected axes and sizes as data=2,fsdp=2,tensor=2, found {mesh!r}")
        sizes[name] = int(size)
    return sizes


def fingerprint(options: TrainOptions) -> dict[str, Any]:
    """The options that decide a run's result, and the data's digests; that of its tokens is added once it is known."""
    fields = {name: value for name, value in dataclasses.asdict(options).items() if name not in _FREE}
    fields = json.loads(json.dumps(fields, default=str))
    for name in ("data", "eval_data"):
        path = getattr(options, name)
        if path is not None and Path(path).is_file():
            fields[f"{name}_sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return fields


def shared_fields(options: TrainOptions, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """What the processes of a run must be given alike; each may have its files elsewhere."""
    fields = fingerprint | {name: getattr(options, name) for name in ("resume", "checkpoint_every")}
    return {name: value for name, value in fields.items() if name not in ("base", "data", "eval_data")}


def digest_base(base: Path) -> str:
    """Of the config, and of what every tensor is and how it begins: a whole base takes long to read."""
    digest = hashlib.sha256(inside(base, "config.json").read_bytes())
    for header, _ in read_shards(base)[0].values():
        for name, entry in sorted(header.items()):
            digest.update(f"\n{name} {entry.dtype} {entry.shape}\n".encode() + entry.bytes()[:_SAMPLE].tobytes())
    return digest.hexdigest()
