"""What adapters find in a base model: the modules that they are for, whether these can carry them, what comes along."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from road_core import Adapter, AdapterError, RoadConfig, check_group_size, select_modules, subspace_blocks
from road_core._errors import listed
from road_torch._io import to_tensor
from road_torch._layer import RoadLayer, bare, features, is_conv1d, layers
from road_torch._saved import SavedModule, copy_of

# What a task's head is called in transformers.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}

# Linear layers whose parent, of such a class in transformers, takes their weight instead of calling them: always, or in
# its fused training pass or its cached decoding.
_MAMBA = ("x_proj", "dt_proj", "out_proj")
_READ_BY_PARENT = {
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "TDNNLayer": ("kernel",),
    "MambaMixer": _MAMBA,
    "FalconMambaMixer": _MAMBA,
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "LSHSelfAttention": ("query_key", "value"),
    "LongcatFlashTopkRouter": ("classifier",),
    "DetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
}


def modules_by_path(base: nn.Module) -> dict[str, nn.Module]:
    """All modules by their path in the base model as it came: what is inside a wrapped layer isn't there.

    What ``torch.compile`` returned stands where the module stands that it was made of.
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
    """Returns the targeted modules by path, by PEFT's rules."""
    modules = modules_by_path(base)
    linear = {path for path, module in modules.items() if _is_linear(_unwrapped(module))}
    chosen = select_modules(
        config,
        list(modules),
        linear=linear,
        output_head=_output_head(base, modules, config),
        model_type=getattr(getattr(base, "config", None), "model_type", None),
    )
    return {path: modules[path] for path in chosen}


def check_layer(base: nn.Module, path: str, module: nn.Module, config: RoadConfig) -> int:
    """Returns a layer's number of outputs.

    Raises:
        AdapterError: it can't carry an adapter of this config.
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
    above, _, name = path.rpartition(".")
    parent = bare(base.get_submodule(above))
    read = any(name in _READ_BY_PARENT.get(kind.__name__, ()) for kind in type(parent).__mro__)
    if read or isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        raise AdapterError(
            f"{path}: expected a layer that is called, found one in {type(parent).__name__}, which reads its "
            "weight and would leave the adapter without effect"
        )
    check_group_size(out, config.group_size, path)
    subspace_blocks(out, config.subspace, path)
    return out


def with_head(base: nn.Module, config: RoadConfig) -> RoadConfig:
    """As PEFT: a task's head, which the checkpoint doesn't have, is trained and saved with the adapter."""
    named = config.modules_to_save or []
    heads = [
        head
        for head in _HEADS.get(config.task_type or "", ())
        if head not in named and any(path.endswith(head) for path in modules_by_path(base))
    ]
    return dataclasses.replace(config, modules_to_save=[*named, *heads]) if heads else config


def copies(
    base: nn.Module,
    config: RoadConfig,
    tensors: Mapping[str, Tensor] | None = None,
    source: object = "",
    *,
    strict: bool = True,
) -> dict[str, nn.Module]:
    """Returns a copy of each module that a config wants to be saved whole, by path.

    Args:
        base: the base model.
        config: a name in its ``modules_to_save`` stands for every module whose path ends with it, as in PEFT.
        tensors: values by tensor path; without them the copies are like the originals.
        source: where they are from, for errors.
        strict: see `RoadModel.load_adapter`.

    Raises:
        AdapterError: there is no such module, it can't be saved whole, or the tensors aren't its own.
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
    """Returns the embeddings that hold the weight of one which an encoder-decoder has for loading alone."""
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
    """Checks the base's weights that came with an adapter.

    Args:
        base: the base model.
        source: where the adapter is from, for errors.
        adapter: as it was read.
        in_use: whether the base has adapters already, which use these weights as they are.

    Returns:
        Those of the base that are to be replaced, each with its new value: none of a base in use.

    Raises:
        AdapterError: they aren't of the base's embedding or head, don't fit, or differ from those of a base in use.
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
    """Returns the paths of wrapped modules that are or hold the embedding, the head, or what is tied to them."""
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
    """True if all that a model ties is one already, below what is wrapped."""
    return all(_are_one(base, *pair) for pair in _tied(base).items())


def untie(base: Any) -> None:
    """Takes weights that merging gave a value of their own off the model's lists of tied ones.

    On loading transformers would tie them again, and with no list at all it wouldn't find the others, of which it saves
    one. Where some are left the config says as before that there are: models scale the head's input by it.
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
            # For whoever ties weights once more, as resizing the embeddings does.
            module._tied_weights_keys = {path: other for path, other in own.items() if path in left}
    apart: list[Tensor] = []
    for path in [path for path in before if path not in base.all_tied_weights_keys]:
        owner, leaf, tensor = _held(base, path)
        if any(tensor is other for other in apart):
            # What these were tied to has gone: saved as one they would be tied to it again.
            setattr(owner, leaf, nn.Parameter(tensor.detach().clone(), tensor.requires_grad))
        apart.append(tensor)
    if before and not base.all_tied_weights_keys:
        config.tie_word_embeddings = False


def _tied(model: Any) -> Mapping[str, str]:
    """By the path of each weight that transformers ties, that of the one that it stores."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def _are_one(model: nn.Module, path: str, other: str) -> bool:
    first, second = _held(model, path)[2], _held(model, other)[2]
    # Where accelerate took them away nobody can tell.
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
    """What ``"all-linear"`` means: to PEFT ``nn.Linear`` and ``Conv1D``, here also the layers of GPTQ, AWQ, HQQ, …."""
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
    """What ``"all-linear"`` leaves out: a language model's head, or a classifier's."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None and get is not None and config.task_type == "SEQ_CLS":
        head = next(
            (found for name in ("score", "classifier") if (found := getattr(model, name, None)) is not None), None
        )
    return [path for path, module in modules.items() if head is not None and module is head]
