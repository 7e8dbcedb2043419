"""Coverage-guided fuzzing of everything that reads a file: `make fuzz`, which ends after FUZZ seconds or at a finding.

An input of the fuzzer is taken as a list of decisions: which reader, and how files that are right are spoilt. So it
gets behind the first check of a header. Whatever comes out of a reader but `AdapterError` is a finding; so is an input
that takes more than 5 seconds of the processor or 1 GiB (libFuzzer's ``-rss_limit_mb``), one that takes a minute in all
(its ``-timeout``: a busy machine must not end a run), and a file that was left behind.
"""

import copy
import json
import math
import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import numpy as np

with atheris.instrument_imports(include=["road_core", "convert"]):
    import convert
    from convert._rules import read_rules
    from road_core import AdapterError, _targets, read_flax, read_peft
    from road_core._files import read_json
    from road_core._intervention import Intervention, InterventionConfig, read_intervention
    from road_core._safetensors import read_header, read_tensors

Json = Any

_Q = "model.layers.0.self_attn.q_proj"
_ROAD = {"peft_type": "ROAD", "variant": "road_1", "group_size": 8, "target_modules": ["q_proj"]}
_CHECKPOINT = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
_INTERVENTION = Intervention(
    InterventionConfig(layers=(0, 1), group_size=8),
    {i: (np.ones(8, np.float32), np.ones(8, np.float32)) for i in (0, 1)},
)
_TOML = b'family = "mine"\n[[rows]]\nflax = "h_{layer}.wq"\ntorch = "h.{layer}.q"\n'
_RULES = {"family": "mine", "head": "lm_head", "axis": 0, "rows": [{"flax": "h_{layer}.wq", "torch": "h.{layer}.q"}]}

# Atoms that readers have tripped over elsewhere.
_ATOMS: list[Json] = [
    *(None, True, 0, -1, 1, 2, 8, 2**31, 2**63, 2**64, 10**30, 0.5, 1e308, float("nan"), float("inf")),
    *("", "q_proj", ".*", "(", "all-linear", "road_1", "road_2", "road_4", "../x", "/etc", "a\x00b", "\ud800", _Q),
    *("(a|aa)+b", "(?:.{60000}){60000}", "(?:(?R)|.)*", "(?:q){e}", "{9}", "layers_to_transform", "layers_pattern"),
    *([], {}, [1] * 70, [0, 4], [8], [16], ["q_proj"], {"a": 1}, [[[[]]]]),
    *("F32", "BF16", "F16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "X"),
    *("model.safetensors", "a.safetensors", "linear", "heads", "llama", "gpt2", "{layer}", "weight_map"),
]


def _spoil(value: Json, take: atheris.FuzzedDataProvider) -> Json:
    """Replaces, adds or removes something somewhere in a value of JSON."""
    kind = take.ConsumeIntInRange(0, 9)
    if isinstance(value, dict | list) and value and kind < 7:
        key = take.PickValueInList([*value] if isinstance(value, dict) else [*range(len(value))])
        if kind == 0:
            del value[key]
        else:
            value[key] = _spoil(value[key], take)
        return value
    if isinstance(value, dict) and kind < 9:
        value[take.PickValueInList([str(atom) for atom in _ATOMS])] = _atom(take)
        return value
    return _atom(take)


def _atom(take: atheris.FuzzedDataProvider) -> Json:
    kind = take.ConsumeIntInRange(0, 5)
    if kind == 0:
        return take.ConsumeInt(9)
    if kind == 1:
        return take.ConsumeUnicode(12)
    return copy.deepcopy(take.PickValueInList(_ATOMS))


def _text(value: Json, take: atheris.FuzzedDataProvider, *, edits: int = 4) -> bytes:
    """A document, spoilt as JSON and then, now and then, as bytes."""
    value = copy.deepcopy(value)
    for _ in range(take.ConsumeIntInRange(0, edits)):
        value = _spoil(value, take)
    return _bytes(json.dumps(value).encode("utf-8", "replace"), take)


def _bytes(data: bytes, take: atheris.FuzzedDataProvider) -> bytes:
    for _ in range(max(0, take.ConsumeIntInRange(-9, 3))):
        at, gone = take.ConsumeIntInRange(0, len(data)), take.ConsumeIntInRange(0, 8)
        data = data[:at] + take.ConsumeBytes(take.ConsumeIntInRange(0, 8)) + data[at + gone :]
    return data


def _tensors(names: list[str], shape: list[int], take: atheris.FuzzedDataProvider, metadata: Json) -> bytes:
    """A safetensors file of float32 tensors of one shape, spoilt."""
    header: dict[str, Json] = {"__metadata__": metadata}
    size = math.prod(shape)
    for i, name in enumerate(names):
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [4 * size * i, 4 * size * (i + 1)]}
    text = _text(header, take)
    length = take.PickValueInList([len(text)] * 9 + [0, 7, len(text) + 1, 2**31, 2**63, 2**64 - 1])
    body = struct.pack(f"<{size * len(names)}f", *([1.0] * size * len(names)))
    return struct.pack("<Q", length) + text + _bytes(body, take)


_PT = {"format": "pt"}


def _pair(stem: str) -> list[str]:
    return [f"{stem}.road_alpha", f"{stem}.road_theta"]


Files = dict[str, bytes]


def _peft(take: atheris.FuzzedDataProvider) -> Files:
    tensors = _tensors(_pair(f"base_model.model.{_Q}"), [8], take, _PT)
    return {"adapter_config.json": _text(_ROAD, take), "adapter_model.safetensors": tensors}


def _flax(take: atheris.FuzzedDataProvider) -> Files:
    tensors = _tensors(_pair(_Q), [8], take, _PT)
    return {"road_config.json": _text(_ROAD, take), "road_adapter.safetensors": tensors}


def _intervention(take: atheris.FuzzedDataProvider) -> Files:
    names = [name for i in (0, 1) for name in _pair(f"layers.{i}")]
    tensors = _tensors(names, [8], take, {"road_digest": _INTERVENTION.digest()})
    return {
        "intervention_config.json": _text(_INTERVENTION.config.to_dict(), take),
        "intervention.safetensors": tensors,
    }


def _rules(take: atheris.FuzzedDataProvider) -> Files:
    return {"rules.json": _text(_RULES, take), "rules.toml": _bytes(_TOML, take)}


def _checkpoint(take: atheris.FuzzedDataProvider) -> Files:
    weights = [f"{_Q}.weight", "model.embed_tokens.weight"]
    index = {"metadata": {"total_size": 128}, "weight_map": dict.fromkeys(weights, "a.safetensors")}
    files = {"config.json": _text(_CHECKPOINT, take)}
    if take.ConsumeBool():
        return files | {"model.safetensors": _tensors(weights, [16, 2], take, _PT)}
    shard = _tensors(weights, [16, 2], take, _PT)
    return files | {"model.safetensors.index.json": _text(index, take), "a.safetensors": shard}


# What files are made, and who reads them.
CASES: list[tuple[Callable[[atheris.FuzzedDataProvider], Files], list[Callable[[Path], Any]]]] = [
    (
        _peft,
        [
            read_peft,
            convert.inspect,
            lambda case: convert.to_flax(case, case.parent / "new", dry_run=True),
            lambda case: convert.diff(case, SOUND),
            lambda case: read_tensors(case / "adapter_model.safetensors"),
            lambda case: read_header(case / "adapter_model.safetensors"),
        ],
    ),
    (_flax, [read_flax, lambda case: convert.to_torch(case, case.parent / "new", dry_run=True)]),
    (_intervention, [read_intervention]),
    (
        _rules,
        [lambda case, name=name: read_rules(case / name) for name in ("rules.json", "rules.toml")]
        + [lambda case: read_json(case / "rules.json")],
    ),
    (_checkpoint, [lambda case: convert.merge(case, SOUND, case.parent / "new")]),
]

# What a config's patterns may take is a limit of its own.
_targets.PATIENCE = 1.0

PLACE = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
SOUND = PLACE / "sound"
CASE = PLACE / "case"


def one_input(data: bytes) -> None:
    """Lets the readers of one kind have the files that the input decides."""
    take = atheris.FuzzedDataProvider(data)
    make, readers = CASES[take.ConsumeIntInRange(0, len(CASES) - 1)]
    shutil.rmtree(CASE, ignore_errors=True)
    shutil.rmtree(PLACE / "new", ignore_errors=True)
    CASE.mkdir()
    for name, content in make(take).items():
        (CASE / name).write_bytes(content)
    listing = sorted(os.listdir(CASE))
    start = time.process_time()
    for reader in readers:
        try:
            reader(CASE)
        except AdapterError:
            if (PLACE / "new").exists():
                raise RuntimeError("a folder stands there after an error") from None
    if (taken := time.process_time() - start) > 5:
        raise RuntimeError(f"the readers took {taken:.1f} s")
    if sorted(os.listdir(CASE)) != listing:
        raise RuntimeError("a reader left something in the folder that it read")
    if left := {path.name for path in PLACE.iterdir()} - {"sound", "case", "new", ".new.merging"}:
        raise RuntimeError(f"a reader left {sorted(left)}")


def main() -> None:
    SOUND.mkdir()
    whole = atheris.FuzzedDataProvider(b"")
    for name, content in _peft(whole).items():
        (SOUND / name).write_bytes(content)
    read_peft(SOUND)
    try:
        atheris.Setup(
            [sys.argv[0], "-timeout=60", "-rss_limit_mb=1024", "-max_len=1000", "-len_control=0", *sys.argv[1:]],
            one_input,
        )
        atheris.Fuzz()
    finally:
        shutil.rmtree(PLACE, ignore_errors=True)


if __name__ == "__main__":
    main()
