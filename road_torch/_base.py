"""What adapters need from a base model: targeted modules, checks that they can be adapted, and accompanying weights."""

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from road_core import Adapter, AdapterError, RoadConfig, check_group_size, select_modules, subspace_blocks
from road_core._config import TARGETS
from road_core._errors import listed
from road_core._targets import is_all_linear
from road_torch._io import to_tensor
from road_torch._layer import RoadLayer, bare, features, is_conv1d, layers
from road_torch._saved import SavedModule, copy_of

# Names of a task's head in transformers.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}

# Linear layers, by their parent's class in transformers, whose weight the parent reads instead of calling the layer, or
# which it calls past their wrapper, from a list of its own.
_REL_POS = ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")
_READ_BY_PARENT = {
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "TDNNLayer": ("kernel",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "LongcatFlashTopkRouter": ("classifier",),
    "DetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "PredictionBlock": ("0",),
    "Mask2FormerPredictionBlock": ("0",),
    "LayoutLMv2Encoder": _REL_POS,
    "LayoutLMv3Encoder": _REL_POS,
    "PPDocLayoutV2ReadingOrderEncoder": _REL_POS,
}
# Those whose weight it reads only at times: in a fused training pass or in cached decoding.
_MAMBA = ("x_proj", "dt_proj", "out_proj")
_READ_AT_TIMES = {
    "MambaMixer": _MAMBA,
    "FalconMambaMixer": _MAMBA,
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
    "LSHSelfAttention": ("query_key", "value"),
}

# Linear layers of transformers that give more than their product, or compute another one than their sizes say.
_OTHER_RESULTS = ("Llama4Router", "PhimoeTopKRouter", "DeepseekV4GroupedLinear")


def modules_by_path(base: nn.Module) -> dict[str, nn.Module]:
    """Returns all modules by their path in the original base model; modules inside wrapped layers are left out.

    A wrapper of ``torch.compile`` takes the path of the module that it wraps.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> None:
        if id(bare(module)) in seen:
            return
        seen.add(id(bare(module)))
        found[path] = module
        if not isinstance(module, RoadLayer):
            inner = module.original_module if isinstance(module, SavedModule) else module
            for name, child in bare(inner)._modules.items():
                if child is not None:
                    walk(child, f"{path}.{name}" if path else name)

    walk(base, "")
    return found


def select(base: nn.Module, config: RoadConfig) -> dict[str, nn.Module]:
    """Returns the targeted modules by path, following PEFT's rules; what is saved whole isn't among them.

    ``"all-linear"`` leaves out layers that nobody can rotate, where PEFT fails or rotates without effect.
    """
    return _select(base, config, modules_by_path(base))


def spelt_out(base: nn.Module, config: RoadConfig) -> RoadConfig:
    """Names the layers one by one where ``"all-linear"`` takes fewer than PEFT, which would miss some in the file."""
    if not is_all_linear(config.target_modules):
        return config
    modules = modules_by_path(base)
    chosen, theirs = _select(base, config, modules), _select(base, config, modules, as_peft=True)
    return config if chosen.keys() == theirs.keys() else naming(base, config, list(chosen))


def naming(base: nn.Module, config: RoadConfig, paths: list[str]) -> RoadConfig:
    """Returns the config with layers named one by one, so that it selects no others."""
    named = dataclasses.replace(config, target_modules=paths)
    if _select(base, named, modules_by_path(base)).keys() <= set(paths):
        return named
    # In a list a path also matches the ends of longer ones.
    choice: dict[str, Any] = {**dict.fromkeys(TARGETS), "target_modules": "|".join(map(re.escape, paths))}
    return dataclasses.replace(config, **choice)


def _select(
    base: nn.Module, config: RoadConfig, modules: Mapping[str, nn.Module], *, as_peft: bool = False
) -> dict[str, nn.Module]:
    """Returns the targeted modules by path; ``as_peft`` takes what nobody can rotate, too."""
    config = with_whole(base, config)
    linear: set[str] = set()
    # Nothing else asks which layers are linear.
    if is_all_linear(config.target_modules):
        linear = {
            path
            for path, module in modules.items()
            if _is_linear(_unwrapped(module)) and (as_peft or not _is_left_out(modules, path))
        }
    chosen = select_modules(
        config,
        list(modules),
        linear=linear,
        output_head=_output_head(base, modules, config),
        model_type=getattr(getattr(base, "config", None), "model_type", None),
    )
    return {path: modules[path] for path in chosen}


def _is_left_out(modules: Mapping[str, nn.Module], path: str) -> bool:
    """True for a layer whose weight another module reads, that has no pairs of outputs, or other results."""
    module = _unwrapped(modules[path])
    return (
        _reader(modules[path.rpartition(".")[0]], path) is not None
        or features(module)[1] % 2 == 1
        or type(module).__name__ in _OTHER_RESULTS
    )


def inert(modules: Mapping[str, nn.Module], paths: Collection[str]) -> list[str]:
    """Returns those of the paths whose modules are never called: other parents call a layer in some of their passes."""
    parents = {path: modules.get(path.rpartition(".")[0]) for path in paths}
    return [path for path, parent in parents.items() if parent is not None and _reader(parent, path, always=True)]


def _reader(parent: nn.Module, path: str, *, always: bool = False) -> str | None:
    """Returns the type of a layer's parent that reads its weight instead of calling it; None if it calls it."""
    parent, name = _unwrapped(parent), path.rpartition(".")[2]
    tables = [_READ_BY_PARENT] if always else [_READ_BY_PARENT, _READ_AT_TIMES]
    kinds = nn.MultiheadAttention if always else nn.MultiheadAttention | nn.TransformerEncoderLayer
    read = any(name in table.get(kind.__name__, ()) for table in tables for kind in type(parent).__mro__)
    return type(parent).__name__ if read or isinstance(parent, kinds) else None


def check_layer(base: nn.Module, path: str, module: nn.Module, config: RoadConfig) -> int:
    """Checks that a layer can have an adapter of this config, and returns its number of outputs.

    Raises:
        AdapterError: it can't.
    """
    if not path:
        raise AdapterError("target_modules: expected modules within the model, found the model itself")
    inner = base
    for name in path.split("."):
        inner = inner.get_submodule(name)
        if isinstance(inner, SavedModule):
            owner = next(iter(inner.modules_to_save))
            raise AdapterError(f"{path}: expected a module to rotate, found one that {owner!r} brings whole")
    module = _unwrapped(module)
    try:
        _, out = features(module)
    except TypeError:
        raise AdapterError(
            f"{path}: expected a linear layer, found {type(module).__name__}, which has no in_features and out_features"
        ) from None
    if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters()):
        raise AdapterError(
            f"{path}: expected a layer whose sizes are known, found a {type(module).__name__} that wasn't called yet"
        )
    if (kind := _reader(base.get_submodule(path.rpartition(".")[0]), path)) is not None:
        raise AdapterError(
            f"{path}: expected a layer that is called, found one in {kind}, which reads its weight and would leave the "
            "adapter without effect"
        )
    check_group_size(out, config.group_size, path)
    subspace_blocks(out, config.subspace, path)
    return out


def with_head(base: nn.Module, config: RoadConfig) -> RoadConfig:
    """Adds the task's head to ``modules_to_save``, as PEFT does, because the base's checkpoint doesn't contain it."""
    named = config.modules_to_save or []
    heads = [
        head
        for head in _HEADS.get(config.task_type or "", ())
        if head not in named and any(path.endswith(head) for path in modules_by_path(base))
    ]
    return with_whole(base, dataclasses.replace(config, modules_to_save=[*named, *heads]) if heads else config)


def with_whole(base: nn.Module, config: RoadConfig) -> RoadConfig:
    """Adds to ``modules_to_save`` the paths of layers that are saved whole because their own name ends with one there.

    A name there saves each module whose path ends with it, but keeps only modules of that very name from being rotated,
    in PEFT too, which then fails: ``"classifier"`` also saves DistilBERT's ``pre_classifier``.
    """
    if not (named := config.modules_to_save):
        return config
    added = [
        path
        for path, module in modules_by_path(base).items()
        if path.endswith(tuple(named))
        and not any(f".{path}".endswith(f".{name}") for name in named)
        and any(map(_is_linear, _unwrapped(module).modules()))
    ]
    return dataclasses.replace(config, modules_to_save=[*named, *added]) if added else config


def copies(
    base: nn.Module,
    config: RoadConfig,
    tensors: Mapping[str, Tensor] | None = None,
    source: object = "",
    *,
    strict: bool = True,
) -> dict[str, nn.Module]:
    """Copies each module that a config's ``modules_to_save`` selects; returns the copies by path.

    Args:
        base: the base model.
        config: a name in its ``modules_to_save`` selects every module whose path ends with it, as in PEFT.
        tensors: values by tensor path; if None, the copies equal the originals.
        source: where the tensors come from, for errors.
        strict: see `RoadModel.load_adapter`.

    Raises:
        AdapterError: no module matches, a module can't be saved whole, or the tensors don't fit the modules.
    """
    if not config.modules_to_save:
        return {}
    found: dict[str, nn.Module] = {}
    for path, module in modules_by_path(base).items():
        within = any(path.startswith(f"{other}.") for other in found)
        if path and not within and path.endswith(tuple(config.modules_to_save)):
            found[path] = module
    if not found:
        raise AdapterError(
            f"RoadConfig.modules_to_save: expected a match for {config.modules_to_save}, found no such module"
        )
    groups: dict[str, dict[str, Tensor]] = {path: {} for path in found}
    for key, value in (tensors or {}).items():
        owner = next((path for path in found if key.startswith(f"{path}.")), None)
        if owner is None:
            raise AdapterError(f"{source}: expected tensors of {listed(list(found), 3)}, found {key}")
        groups[owner][key.removeprefix(f"{owner}.")] = value
    made = {}
    for path, module in found.items():
        original = module.original_module if isinstance(module, SavedModule) else module
        if isinstance(module, RoadLayer) or next(layers(original), None) is not None:
            raise AdapterError(f"{path}: expected a module to save whole, found one that adapters rotate")
        if tensors is None and (called := _called_for(base, path)):
            raise AdapterError(
                f"{path}: expected a module for modules_to_save that is called, found one in place of which "
                f"{listed(called, 3)} are"
            )
        made[path] = copy_of(path, bare(original), None if tensors is None else groups[path], strict=strict)
    return made


def _called_for(base: Any, path: str) -> list[str]:
    """Returns the embeddings called in place of an encoder-decoder's ``shared`` one, which only serves loading."""
    if path.rpartition(".")[2] != "shared":
        return []
    modules = modules_by_path(base)
    others = [key.rpartition(".")[0] for key, source in _tied(base).items() if source == f"{path}.weight"]
    return [other for other in others if isinstance(_unwrapped(modules[other]), nn.Embedding)]


def base_weight(base: nn.Module, path: str) -> Tensor:
    """Returns a tensor of the base's embedding or head.

    Raises:
        AttributeError: there is no such tensor.
    """
    module, _, leaf = path.rpartition(".")
    return getattr(_unwrapped(modules_by_path(base)[module]), leaf)


def check_base_weights(
    base: nn.Module, source: object, adapter: Adapter, *, in_use: bool
) -> list[tuple[Tensor, Tensor]]:
    """Checks base weights that were saved with an adapter.

    Args:
        base: the base model.
        source: where the adapter comes from, for errors.
        adapter: the adapter as it was read.
        in_use: whether the base already has adapters, which rely on its current weights.

    Returns:
        The base's tensors to replace, each with its new value; empty for a base in use.

    Raises:
        AdapterError: a weight doesn't belong to the base's embedding or head, doesn't fit, or differs from the weight
            of a base in use.
    """
    if not adapter.base_weights:
        return []
    modules = modules_by_path(base)
    getters = (getattr(base, f"get_{side}_embeddings", None) for side in ("input", "output"))
    ends = [_unwrapped(module) for get in getters if get is not None and (module := get()) is not None]
    new: dict[Tensor, tuple[str, Tensor]] = {}
    for path, array in adapter.base_weights.items():
        above, _, leaf = path.rpartition(".")
        module = _unwrapped(modules[above]) if above in modules else None
        own = getattr(module, leaf, None)
        if not any(module is end for end in ends) or own is None:
            raise AdapterError(
                f"{source}: expected beside the adapter weights of the embedding and the head of "
                f"{type(base).__name__}, found {path}"
            )
        if own.shape != array.shape or not own.is_floating_point():
            raise AdapterError(
                f"{source}: expected {path} of shape {list(own.shape)} in {own.dtype} as the base has it, found "
                f"shape {list(array.shape)}; resize_token_embeddings and a plain head make the base fit"
            )
        value = to_tensor(array).to(own.device, own.dtype)
        other, held = new.setdefault(own, (path, value))
        if not torch.equal(value, held):
            raise AdapterError(f"{source}: expected one value for {other} and {path}, which are tied, found two")
        if in_use and not torch.equal(value, own):
            raise AdapterError(
                f"{source}: expected {path} as the base has it, which other adapters use, found other values; "
                "load this adapter first"
            )
    return [] if in_use else [(own, value) for own, (_, value) in new.items()]


def wrapped_ends(base: Any) -> list[str]:
    """Returns the paths of wrapped modules that are or contain the embedding, the head, or weights that are tied."""
    getters = (getattr(base, f"get_{side}_embeddings", None) for side in ("input", "output"))
    ends = {id(_unwrapped(module)) for get in getters if get is not None and (module := get()) is not None}
    weights = [weight for pair in _tied(base).items() for weight in pair]
    return [
        path
        for path, module in modules_by_path(base).items()
        if isinstance(module, RoadLayer | SavedModule)
        and (
            any(id(inner) in ends for inner in module.modules())
            or any(weight.startswith(f"{path}.") for weight in weights)
        )
    ]


def are_tied(base: Any) -> bool:
    """True if all weights that a model ties are tied already, looking through wrappers."""
    return all(_are_one(base, *pair) for pair in _tied(base).items())


def untie(base: Any) -> None:
    """Removes weights that merging has separated from the model's lists of tied weights.

    If they stayed listed, transformers would tie them again on loading. The lists keep the other weights, of which
    transformers saves only one. While some remain, ``tie_word_embeddings`` stays set in the config, because models
    scale the head's input by it.
    """
    config: Any = getattr(base, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(base, "all_tied_weights_keys"):
        return
    before = base.all_tied_weights_keys
    for module in base.modules():
        tied = module.__dict__.get("all_tied_weights_keys") or {}
        left = {path: other for path, other in tied.items() if _are_one(module, path, other)}
        if len(left) < len(tied):
            own = module.get_expanded_tied_weights_keys()
            module.all_tied_weights_keys = left
            # Used when weights are tied again, as after resizing the embeddings.
            module._tied_weights_keys = {path: other for path, other in own.items() if path in left}
    apart: list[Tensor] = []
    for path in [path for path in before if path not in base.all_tied_weights_keys]:
        owner, leaf, tensor = _held(base, path)
        if any(tensor is other for other in apart):
            # They are separate from their source but still share one tensor; saved like that, all would be tied again.
            setattr(owner, leaf, nn.Parameter(tensor.detach().clone(), tensor.requires_grad))
        apart.append(tensor)
    if before and not base.all_tied_weights_keys:
        config.tie_word_embeddings = False


def _tied(model: Any) -> Mapping[str, str]:
    """Returns, for the path of each weight that transformers ties, the path of the weight that it stores."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def _are_one(model: nn.Module, path: str, other: str) -> bool:
    first, second = _held(model, path)[2], _held(model, other)[2]
    # Unknown if accelerate has offloaded them.
    return first is second or first.is_meta or second.is_meta


def _held(model: nn.Module, path: str) -> tuple[nn.Module, str, Tensor]:
    *names, leaf = path.split(".")
    owner = functools.reduce(lambda module, name: _unwrapped(getattr(module, name)), names, bare(model))
    return owner, leaf, getattr(owner, leaf)


def _unwrapped(module: nn.Module) -> nn.Module:
    if isinstance(module, SavedModule):
        return bare(module.original_module)
    return bare(module.base_layer if isinstance(module, RoadLayer) else module)


def _is_linear(module: nn.Module) -> bool:
    """True for ``"all-linear"``: ``nn.Linear`` and ``Conv1D`` as in PEFT, here also layers of GPTQ, AWQ, HQQ, …."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return True
    inner = (child for child in module.modules() if child is not module)
    return _has_features(module) and not any(map(_has_features, inner))


def _has_features(module: nn.Module) -> bool:
    try:
        features(module)
    except TypeError:
        return False
    return True


def _output_head(model: Any, modules: Mapping[str, nn.Module], config: RoadConfig) -> list[str]:
    """Returns the paths that ``"all-linear"`` leaves out: the head of a language model or a classifier."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None and get is not None and config.task_type == "SEQ_CLS":
        head = next(
            (found for name in ("score", "classifier") if (found := getattr(model, name, None)) is not None), None
        )
    return [path for path, module in modules.items() if head is not None and module is head]
