"""The two file formats: PEFT's and the Flax side's. They differ in names and in a prefix.

The specification is in README.md beside this file.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from road_core._adapter import Adapter, Array
from road_core._config import NOT_IN_PEFT, TARGETS, RoadConfig
from road_core._errors import AdapterError, listed
from road_core._files import dump_json, inside, read_json, write_files
from road_core._safetensors import dump_tensors, read_tensors


@dataclasses.dataclass(frozen=True)
class _Format:
    config: str
    tensors: str
    # Comes before every key.
    prefix: str
    # The value of "format" in the safetensors metadata, which tells other tools whose layout this is.
    metadata: str


# Models' names for their embeddings and heads, whose weights PEFT may save too.
_EMBEDDINGS = (
    *("embed_tokens", "embed_in", "tok_embeddings", "word_embedding", "word_embeddings", "wte", "shared"),
    *("lm_head", "embed_out", "output_projection", "proj_out", "decoder"),
)

# Keys of such tensors inside of PEFT's wrappers: the base weight of a rotated or a saved module, and a second copy of
# the saved one, which PEFT ignores when it reads.
_INNER = re.compile(
    rf"(?P<module>(.+\.)?({'|'.join(_EMBEDDINGS)}))\.(?P<holder>base_layer|original_module|modules_to_save)"
    r"\.(?P<leaf>weight|bias)"
)

# Keys that `_write` adds to an adapter's metadata.
_OWN_METADATA = ("format", "road_variant", "road_group_size", "road_digest", "road_subspace", "road_targets")

_PEFT = _Format("adapter_config.json", "adapter_model.safetensors", "base_model.model.", "pt")
_FLAX = _Format("road_config.json", "road_adapter.safetensors", "", "flax")


def read_peft(directory: str | os.PathLike) -> Adapter:
    """Reads a PEFT adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The adapter, with PyTorch module paths (``"model.layers.0.self_attn.q_proj"``) and arrays in the file's dtype.

    Raises:
        AdapterError: a file is missing or broken, a key has no partner or doesn't belong to the config, a shape or
            value is wrong, or the file's metadata contradicts the config.
    """
    return _read(directory, _PEFT)


def write_peft(directory: str | os.PathLike, adapter: Adapter, *, overwrite: bool = False) -> None:
    """Writes an adapter so that PEFT can load it. Outside of a subspace the file contains θ = 0 and α = 1.

    Args:
        directory: a new or empty folder; with ``overwrite``, one whose two adapter files are replaced.
        adapter: with PyTorch module paths and 1-D θ and α.
        overwrite: see ``directory``.

    Raises:
        AdapterError: the folder already contains something, or θ isn't 1-D.
    """
    for path, (theta, _) in adapter.modules.items():
        if theta.ndim != 1:
            raise AdapterError(f"{path}.road_theta: expected one axis in PEFT's format, found {list(theta.shape)}")
    _write(directory, adapter.cleared(), _PEFT, overwrite)


def read_flax(directory: str | os.PathLike) -> Adapter:
    """Reads a Flax adapter folder: ``road_config.json`` and ``road_adapter.safetensors``.

    Returns:
        The adapter, with Flax module paths joined by dots; a stacked layer's θ has its stack axes.

    Raises:
        AdapterError: as for `read_peft`.
    """
    return _read(directory, _FLAX)


def write_flax(directory: str | os.PathLike, adapter: Adapter, *, overwrite: bool = False) -> None:
    """Writes a Flax adapter folder; like `write_peft`, but θ may have any axes, and base weights are refused."""
    adapter.check_no_base_weights("Flax's format")
    _write(directory, adapter, _FLAX, overwrite)


def _write(directory: str | os.PathLike, adapter: Adapter, form: _Format, overwrite: bool) -> None:
    tensors = {form.prefix + key: array for key, array in adapter.tensors().items()}
    metadata = {
        **adapter.metadata,
        "format": form.metadata,
        "road_variant": adapter.config.variant,
        "road_group_size": str(adapter.config.group_size),
        "road_digest": adapter.digest(),
    }
    fields = adapter.config.to_dict()
    if form is _PEFT and any(name in fields for name in NOT_IN_PEFT) and adapter.modules:
        # PEFT would warn about fields that it doesn't know, and take more modules, so its config names each module.
        metadata["road_targets"] = json.dumps({name: fields.pop(name) for name in TARGETS if name in fields})
        fields["target_modules"] = [*adapter.modules]
    if "subspace" in fields:
        metadata["road_subspace"] = json.dumps(fields["subspace"])
        if form is _PEFT:
            # PEFT would warn about an unknown field and doesn't need it, since the tensors are the identity outside.
            del fields["subspace"]
    files = {form.tensors: dump_tensors(tensors, metadata), form.config: dump_json(fields)}
    write_files(directory, files, overwrite=overwrite)


def _read(directory: str | os.PathLike, form: _Format) -> Adapter:
    config_path, tensors_path = inside(directory, form.config), inside(directory, form.tensors)
    try:
        config = RoadConfig.from_dict(read_json(config_path))
    except AdapterError as error:
        raise AdapterError(_with_place(error, config_path)) from None
    tensors, metadata = read_tensors(tensors_path)
    if form is _PEFT and config.subspace is None and "road_subspace" in metadata:
        config = dataclasses.replace(config, subspace=_subspace(metadata["road_subspace"], tensors_path))
    subspace = "none" if config.subspace is None else json.dumps(config.subspace)
    for name, value in (
        ("variant", config.variant),
        ("group_size", str(config.group_size)),
        ("subspace", subspace),
    ):
        written = metadata.get(f"road_{name}", value)
        if written != value:
            raise AdapterError(f"{config_path}: expected {name} {written}, as the tensors were written, found {value}")
    try:
        modules, saved, base = _sort_out(tensors, config, form)
        carried = {k: v for k, v in metadata.items() if k not in _OWN_METADATA}
        adapter = Adapter(config, modules, saved, carried, base)
    except AdapterError as error:
        raise AdapterError(_with_place(error, tensors_path)) from None
    if form is _PEFT and "road_targets" in metadata:
        adapter = dataclasses.replace(adapter, config=_chosen(metadata["road_targets"], adapter, tensors_path))
    if metadata.get("road_digest", digest := adapter.digest()) != digest:
        raise AdapterError(
            f"{tensors_path}: expected the digest {metadata['road_digest'][:12]}… that was written with the tensors, "
            f"found {digest[:12]}…"
        )
    return adapter


def _chosen(text: str, adapter: Adapter, path: os.PathLike) -> RoadConfig:
    """Returns the config with the targets that it was written for, unless the file has come to name other modules."""
    config = adapter.config
    plain = all(getattr(config, name) is None for name in NOT_IN_PEFT)
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict) or not fields.keys() <= set(TARGETS):
            raise ValueError
        before: dict[str, Any] = {name: fields.get(name) for name in TARGETS}
        chosen = dataclasses.replace(config, **before)
    except (AdapterError, ValueError, RecursionError):
        raise AdapterError(
            f"{path}: expected target_modules and the like as road_targets, found {text!r:.60}"
        ) from None
    named = isinstance(config.target_modules, list) and set(config.target_modules) == adapter.modules.keys()
    return chosen if plain and named else config


def _subspace(text: str, path: os.PathLike) -> tuple[float, float] | None:
    try:
        return RoadConfig(subspace=json.loads(text)).subspace
    except (AdapterError, ValueError, RecursionError):
        raise AdapterError(f"{path}: expected two fractions as road_subspace, found {text!r:.60}") from None


def _sort_out(
    tensors: Mapping[str, Array], config: RoadConfig, form: _Format
) -> tuple[dict[str, tuple[Array, Array]], dict[str, Array], dict[str, Array]]:
    """Pairs θ with α, finds saved modules and, in PEFT's format, the base's weights; refuses any other key."""
    modules: dict[str, tuple[Array, Array]] = {}
    saved: dict[str, Array] = {}
    base: dict[str, Array] = {}
    prefix = form.prefix
    wrong = []

    def saved_whole(path: str) -> bool:
        # As in PEFT: a name stands for every module whose path ends with it, so "norm" also for "input_layernorm".
        return any(re.search(rf"{re.escape(module)}(\.|$)", path) for module in config.modules_to_save or ())

    for key in sorted(tensors):
        name = key.removeprefix(prefix)
        path, _, leaf = name.rpartition(".")
        if not key.startswith(prefix):
            wrong.append(key)
        elif path and leaf in ("road_theta", "road_alpha"):
            both = [f"{prefix}{path}.{part}" for part in ("road_theta", "road_alpha")]
            if all(part in tensors for part in both):
                modules[path] = (tensors[both[0]], tensors[both[1]])
            else:
                wrong.append(key)
        elif form is _PEFT and (inner := _INNER.fullmatch(name)):
            module, own = inner["module"], f"{inner['module']}.{inner['leaf']}"
            rotated, copy = f"{prefix}{module}.road_theta" in tensors, tensors.get(prefix + own)
            if inner["holder"] == "base_layer" and rotated:
                base[own] = tensors[key]
            elif rotated or copy is None or not saved_whole(module):
                wrong.append(key)
            elif inner["holder"] == "original_module":
                base[own] = tensors[key]
            elif inner["holder"] == "base_layer" or copy.tobytes() != tensors[key].tobytes():
                wrong.append(key)
        elif saved_whole(path):
            saved[name] = tensors[key]
        elif (
            form is _PEFT
            and leaf in ("weight", "bias")
            and path.rpartition(".")[2] in _EMBEDDINGS
            and f"{prefix}{path}.road_theta" not in tensors
        ):
            base[name] = tensors[key]
        else:
            wrong.append(key)
    if wrong:
        raise AdapterError(
            f"expected pairs of {prefix}<module>.road_theta and .road_alpha, and tensors of modules_to_save "
            f"{config.modules_to_save}, found besides {listed(wrong)}"
        )
    return modules, saved, base


def _with_place(error: AdapterError, path: os.PathLike) -> str:
    return f"{path}: {error}"
