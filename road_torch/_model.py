"""`RoadModel`: a base model with RoAd adapters, in PEFT's vocabulary."""

import contextlib
import copy
import dataclasses
import functools
import operator
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from rich.progress import track
from torch import Tensor, nn

from road_core import (
    Adapter,
    AdapterError,
    RoadConfig,
    compose,
    parameter_size,
    read_peft,
    write_peft,
)
from road_core._compose import check_group_sizes, check_saved, check_weights
from road_core._errors import expect, listed
from road_core._files import as_path, check_free, new_directory
from road_torch import _base, _checkpoint, _kernels, _layer, _merge
from road_torch._call import Forward, batch_sizes, of_base
from road_torch._io import to_adapter, to_tensor
from road_torch._layer import RoadLayer, bare, layers, like
from road_torch._routing import (
    BASE,
    HOOKED,
    LOCK,
    Mix,
    Name,
    Routing,
    Shared,
    check_known,
    check_name,
    exporting,
    parts,
    read_name,
    routed,
)
from road_torch._rows import check_generation, check_media, stray
from road_torch._saved import SavedModule, saved_modules

_Parameters = Mapping[str, tuple[Tensor, Tensor]]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _locked(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes a method hold the lock, so that threads change models one at a time."""

    @functools.wraps(method)
    def locked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with LOCK:
            return method(*args, **kwargs)

    return locked


class RoadModel(nn.Module):
    """A base model whose linear layers carry RoAd adapters.

    A call applies one adapter, several in sequence, or a different one to each row of the batch. As in PEFT, the base
    model is changed in place: targeted layers are wrapped and its own parameters are frozen. ``merge_and_unload`` and
    ``unload`` return it without the wrappers.

    Args:
        base: any ``nn.Module``; ``generate`` needs a Hugging Face model.
        config: config of a first adapter, which is created, activated and made trainable. If None, the model starts
            without adapters.
        adapter_name: name of the first adapter.
        max_loaded: how many adapters may have their coefficients on the layers' devices at once; None for no limit.
            With a limit, θ and α of adapters that were loaded for inference stay on the CPU, and the least recently
            used adapters make room for those that a call names. Active adapters keep their place until
            ``set_adapter([])`` releases it.
        kernel: implementation of the rotation for inference: ``"default"`` (plain PyTorch), ``"triton"``, or
            ``"auto"``, which chooses by device.

    Raises:
        AdapterError: the base is no ``nn.Module``, no module is targeted, or a targeted module can't be adapted; the
            base is left unchanged.

    Example:
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> model = RoadModel(base, RoadConfig(target_modules=["0", "2"], group_size=4))
        >>> model.print_trainable_parameters()
        trainable params: 12 || all params: 88 || trainable%: 13.6364
    """

    base_model: Any

    # Hugging Face's Trainer trains a quantised model only if this flag says that it has adapters.
    _hf_peft_config_loaded = True

    def __init__(
        self,
        base: nn.Module,
        config: RoadConfig | None = None,
        adapter_name: str = "default",
        *,
        max_loaded: int | None = None,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        if max_loaded is not None and (not isinstance(max_loaded, int) or max_loaded < 1):
            raise AdapterError(f"max_loaded: expected a number from 1 up, found {max_loaded!r}")
        expect("RoadModel", base, nn.Module)
        if isinstance(base, RoadModel) or next(layers(base), None) is not None:
            raise AdapterError(
                f"RoadModel: expected a base model without RoAd layers, found {type(base).__name__} with some; "
                "add adapters to the RoadModel that wraps it"
            )
        self._shared = Shared(max_loaded, _kernels.check(kernel))
        # By adapter: the paths of base weights that were loaded with it and are saved with it again.
        self._base_weights: dict[str, tuple[str, ...]] = {}
        self.base_model = base
        self.training = base.training
        if config is not None:
            self.add_adapter(adapter_name, config)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        strict: bool = True,
        max_loaded: int | None = None,
        kernel: str = "auto",
    ) -> "RoadModel":
        """Wraps a model and loads an adapter from a PEFT folder as the active one.

        For the arguments see `load_adapter` and the class.

        Raises:
            AdapterError: the folder is broken, or its adapter is for another model; the base is left unchanged.
        """
        road = cls(model, max_loaded=max_loaded, kernel=kernel)
        road.load_adapter(model_id, adapter_name, is_trainable, strict=strict)
        return road

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that a call without ``adapter_names`` applies, in order."""
        return list(self._shared.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name; a list of names if there are several or none."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    @property
    def adapter_names(self) -> list[str]:
        """All adapters, in the order in which they were added."""
        return list(self._shared.configs)

    @property
    def peft_config(self) -> dict[str, RoadConfig]:
        """The config of each adapter."""
        return dict(self._shared.configs)

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters that are currently merged into the base's weights."""
        return list(self._shared.merged)

    def get_base_model(self) -> nn.Module:
        """Returns the base model, with its layers still wrapped."""
        return self.base_model

    # Layers learn from a tensor which adapter each row gets, so a compiled graph must not contain this function.
    @Forward
    @torch.compiler.disable(recursive=False)
    def forward(
        self,
        *args: Any,
        adapter_names: Sequence[str | Sequence[str]] | None = None,
        labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Calls the base model.

        Args:
            *args: passed to the base model.
            adapter_names: an adapter name for each row of the batch, ``"__base__"`` for no adapter. If None, all rows
                get the active adapters. A row may name several adapters, applied in order: ``"a+b"`` or
                ``["a", "b"]``, with weights as in ``"a:0.7+b:0.3"`` (see `add_weighted_adapter`). Their composition is
                computed once and reused until one of them changes.
            labels: passed to the base model. Hugging Face's Trainer looks for this name in the signature.
            **kwargs: passed to the base model.

        Raises:
            AdapterError: a name is unknown, the number of names differs from that of the rows, or the adapters of a
                row can't be composed.
        """
        if labels is not None:
            kwargs["labels"] = labels
        with self._routed(adapter_names, args, kwargs):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str | Sequence[str]] | None = None, **kwargs: Any) -> Any:
        """Calls the base model's ``generate``; ``adapter_names`` and errors are those of `forward`."""
        with self._routed(adapter_names, args, kwargs, generates=True):
            return self.base_model.generate(*args, **kwargs)

    @_locked
    def add_adapter(self, adapter_name: str, peft_config: RoadConfig) -> None:
        """Adds a new adapter. The model's first adapter also becomes active, and thereby trainable.

        Raises:
            AdapterError: the name is taken or invalid, or the config doesn't fit the model; nothing is changed.
        """
        self._check_new(adapter_name)
        if not isinstance(peft_config, RoadConfig):
            kind = f"{type(peft_config).__module__}.{type(peft_config).__qualname__}"
            raise AdapterError(
                f"peft_config: expected a road_torch.RoadConfig (RoadConfig.from_dict takes the fields of PEFT's), "
                f"found a {kind}"
            )
        config = _base.spelt_out(self.base_model, _base.with_head(self.base_model, peft_config))
        chosen = _base.select(self.base_model, config)
        saved = _base.copies(self.base_model, config)
        parameters = {}
        for path, module in chosen.items():
            size = parameter_size(config.variant, _base.check_layer(self.base_model, path, module, config))
            # On the CPU even if the default device is another one.
            if config.init_weights:
                parameters[path] = (torch.zeros(size, device="cpu"), torch.ones(size, device="cpu"))
            else:
                theta, alpha = (torch.randn(size, device="cpu") * 0.5 for _ in range(2))
                parameters[path] = (theta, 1 + alpha)
        self._install(adapter_name, config, parameters, saved)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Adds an adapter that composes others: each one's rotation raised to the power of its weight.

        The result is ``R_n^w_n ⋯ R_1^w_1``, where the first adapter is applied first. It is computed in closed form in
        float64 and rounded once to float32. For the weights allowed and the variant of the result see
        `road_core.compose`. One of the adapters may have whole modules (``modules_to_save``); the new one gets copies
        of them.

        Args:
            adapters: names of adapters, all of the same group size.
            weights: one weight for each adapter.
            adapter_name: name of the new adapter. It is for inference if all the others are.

        Raises:
            AdapterError: a name is unknown, the number of weights differs from that of the adapters, group sizes
                differ, a power doesn't exist, several adapters have whole modules, or one of another weight than 1
                does; nothing is changed.
        """
        if isinstance(adapters, str):
            raise AdapterError(f"adapters: expected a list of names, found {adapters!r}")
        names = _as_list(adapters)
        with LOCK:
            self._check_new(adapter_name)
            self._check_known(names)
            weights = check_weights(weights, len(names))
            saved = self._copies(names, weights)
            records = [to_adapter(layers(self), (), name, self._shared.configs[name]) for name in names]
            paths = [path for name in names for path in self._base_weights.get(name, ())]
        # Outside the lock, so that calls of other threads don't wait for it.
        composed = compose(records, weights, names=[repr(name) for name in names])
        tensors = {path: (to_tensor(theta), to_tensor(alpha)) for path, (theta, alpha) in composed.modules.items()}
        with LOCK:
            self._check_new(adapter_name)
            self._install(adapter_name, composed.config, tensors, saved)
            self._base_weights[adapter_name] = tuple(dict.fromkeys(paths))

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        strict: bool = True,
    ) -> None:
        """Loads an adapter from a PEFT folder; the model's first adapter becomes active.

        PEFT may have saved weights of the base's embedding and head beside the adapter, for example after the
        vocabulary was resized. If this is the model's first adapter, they permanently replace the base's; with a later
        adapter they must equal the base's.

        Args:
            model_id: the folder.
            adapter_name: a new name.
            is_trainable: whether the adapter can be trained further when it is active. If False, the model is put into
                evaluation mode.
            strict: whether the file must have tensors for every module that the config selects. If False, modules
                without θ and α start at the identity, and modules to save without tensors as copies of the base's.
                θ and α of layers that are never called, which PEFT adapts without effect, are then left out, if there
                are others.

        Raises:
            AdapterError: the name is taken or invalid, the folder is broken, or its adapter is for another model
                (judged by modules, sizes and accompanying base weights); nothing is changed.
        """
        self._check_new(adapter_name)
        adapter = _read(model_id)
        # Only now, so that calls of other threads don't wait for the file.
        with LOCK:
            self._check_new(adapter_name)
            self._take(adapter, model_id, adapter_name, is_trainable, strict)

    def _take(
        self, adapter: Adapter, model_id: str | os.PathLike, adapter_name: str, is_trainable: bool, strict: bool
    ) -> None:
        base_weights = _base.check_base_weights(self.base_model, model_id, adapter, in_use=bool(self._shared.configs))
        config = dataclasses.replace(adapter.config, inference_mode=not is_trainable)
        modules = _base.modules_by_path(self.base_model)
        if inert := _base.inert(modules, adapter.modules):
            some = len(inert) < len(adapter.modules)
            if strict or not some:
                raise AdapterError(
                    f"{model_id}: expected θ and α only for layers that are called, found some for {listed(inert, 3)}, "
                    "whose weight their parent reads, so that they have no effect"
                    f"{' (strict=False leaves them out)' if some else ''}"
                )
            called = {path: pair for path, pair in adapter.modules.items() if path not in inert}
            adapter = dataclasses.replace(adapter, modules=called)
        for path, (theta, _) in adapter.modules.items():
            if path not in modules:
                raise AdapterError(
                    f"{model_id}: expected modules of {type(self.base_model).__name__}, found {path}, which it lacks"
                )
            out = _base.check_layer(self.base_model, path, modules[path], config)
            size = parameter_size(config.variant, out)
            if theta.shape != (size,):
                raise AdapterError(
                    f"{model_id}: expected {size} θ for {path} with {out} outputs ({config.variant}), "
                    f"found shape {list(theta.shape)}"
                )
        if inert:
            config = _base.naming(self.base_model, config, list(adapter.modules))
        chosen = _base.select(self.base_model, config)
        missing = [path for path in chosen if path not in adapter.modules]
        if missing and strict:
            raise AdapterError(
                f"{model_id}: expected θ and α for every module that target_modules selects, found none for "
                f"{listed(missing, 3)}"
            )
        if extra := [path for path in adapter.modules if path not in chosen]:
            raise AdapterError(
                f"{model_id}: expected θ and α only for modules that target_modules selects, found {listed(extra, 3)}"
            )
        tensors = {path: (to_tensor(theta), to_tensor(alpha)) for path, (theta, alpha) in adapter.modules.items()}
        for path in missing:
            size = parameter_size(config.variant, _base.check_layer(self.base_model, path, chosen[path], config))
            tensors[path] = (torch.zeros(size, device="cpu"), torch.ones(size, device="cpu"))
        saved = {path: to_tensor(array) for path, array in adapter.modules_to_save.items()}
        copies = _base.copies(self.base_model, config, saved, model_id, strict=strict)
        self._install(adapter_name, config, tensors, copies, base_weights)
        self._base_weights[adapter_name] = tuple(adapter.base_weights)
        if not is_trainable:
            self.eval()

    @_locked
    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activates adapters: calls without ``adapter_names`` apply them, in the given order.

        Active adapters that were not loaded for inference become trainable; all others are frozen.

        Args:
            adapter_name: one name or a list of names.
            inference_mode: whether to freeze the active adapters, too.

        Raises:
            AdapterError: a name is unknown or repeated, several of the adapters bring the same module whole
                (``modules_to_save``), or adapters are merged; nothing is changed.
        """
        names = _as_list(adapter_name)
        self._check_known(names)
        _check_once("set_adapter", names)
        self._check_unmerged("set_adapter")
        self._check_own("set_adapter")
        self._check_one_copy("set_adapter", names)
        self._place(names, also_active=names)
        self._shared.active = tuple(names)
        self._shared.renew()
        trainable = () if inference_mode else [name for name in names if not self._shared.configs[name].inference_mode]
        for layer in layers(self):
            for name in layer.adapters:
                layer.road_theta[name].requires_grad_(name in trainable)
                layer.road_alpha[name].requires_grad_(name in trainable)
        for module in saved_modules(self):
            for name, own in module.modules_to_save.items():
                own.requires_grad_(name in trainable)

    def hotswap_adapter(self, model_name_or_path: str | os.PathLike, adapter_name: str) -> None:
        """Replaces an adapter's θ and α, and its copies of whole modules, with those of a PEFT folder, in place.

        A compiled model isn't recompiled. Calls of this model that are already running in other threads keep the old
        adapter to their end, and later calls use the new one; no call sees a mixture. An adapter with copies of whole
        modules can't be replaced while calls use it.

        Raises:
            AdapterError: the name is unknown or merged, the folder is broken, variant, group size, modules or
                ``modules_to_save`` differ, or a call uses copies of whole modules; nothing is changed.
        """
        self._check_swappable(adapter_name)
        adapter = _read(model_name_or_path)
        with LOCK:
            self._check_swappable(adapter_name)
            self._swap(adapter, model_name_or_path, adapter_name)

    def _check_swappable(self, adapter_name: str) -> None:
        self._check_known([adapter_name])
        if adapter_name in self.merged_adapters:
            raise AdapterError(f"hotswap_adapter: expected an adapter that is not merged, found {adapter_name!r}")

    def _swap(self, adapter: Adapter, model_name_or_path: str | os.PathLike, adapter_name: str) -> None:
        old = self._shared.configs[adapter_name]
        _base.check_base_weights(self.base_model, model_name_or_path, adapter, in_use=True)
        for field in ("variant", "group_size"):
            here, there = getattr(old, field), getattr(adapter.config, field)
            if here != there:
                raise AdapterError(
                    f"{model_name_or_path}: expected {field} {here} as {adapter_name!r} has, found {there}"
                )
        mine = {layer.module_path: layer for layer in layers(self) if adapter_name in layer.road_theta}
        if wrong := sorted(mine.keys() ^ adapter.modules.keys()):
            raise AdapterError(
                f"{model_name_or_path}: expected θ and α for the {len(mine)} modules of {adapter_name!r}, found "
                f"{len(adapter.modules)}, differing in {listed(wrong, 3)}"
            )
        if wrong := sorted(mine.keys() ^ _base.select(self.base_model, adapter.config).keys()):
            raise AdapterError(
                f"{model_name_or_path}: expected target_modules that select the modules of {adapter_name!r}, "
                f"found a choice that differs in {listed(wrong, 3)}"
            )
        for path, (theta, _) in adapter.modules.items():
            size = mine[path].road_theta[adapter_name].shape
            if theta.shape != tuple(size):
                raise AdapterError(
                    f"{model_name_or_path}: expected θ of shape {list(size)} for {path}, found {list(theta.shape)}"
                )
        values = {path: to_tensor(array) for path, array in adapter.modules_to_save.items()}
        copies = _base.copies(self.base_model, adapter.config, values, model_name_or_path)
        held = {m.module_path: state for m in saved_modules(self) if (state := m.state_of(adapter_name))}
        if held.keys() != copies.keys():
            here, there = (listed(list(paths), 3) or "none" for paths in (held, copies))
            raise AdapterError(
                f"{model_name_or_path}: expected modules_to_save with the whole modules of {adapter_name!r} ({here}), "
                f"found {there}"
            )
        if held and self._in_call(adapter_name):
            raise AdapterError(
                f"hotswap_adapter: expected an adapter with modules_to_save that no call uses, found {adapter_name!r}"
            )
        pairs = [
            (own[adapter_name], to_tensor(array))
            for path, arrays in adapter.modules.items()
            for own, array in zip((mine[path].road_theta, mine[path].road_alpha), arrays, strict=True)
        ]
        pairs += [(own, values[f"{path}.{key}"]) for path, state in held.items() for key, own in state.items()]
        row, mixes = self._shared.rows.get(adapter_name), self._shared.mixes_with(adapter_name)
        read: list[Name] = [*mixes, *([] if row is None else [adapter_name])]
        for layer in mine.values():
            # A call that is already running reads these rows, but may not have done so yet.
            for name in read:
                layer.place(name)
        try:
            with _overwritten(pairs):
                self._shared.configs[adapter_name] = dataclasses.replace(
                    adapter.config, inference_mode=old.inference_mode
                )
                self._forget(mixes)
                if row is not None:
                    self._shared.rows[adapter_name] = self._shared.new_row()
                    for layer in layers(self):
                        layer.place(adapter_name)
                self._shared.renew()
        except BaseException:
            self._shared.configs[adapter_name] = old
            if row is not None:
                self._shared.rows[adapter_name] = row
            raise
        self._base_weights[adapter_name] = tuple(adapter.base_weights)

    @_locked
    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter. Layers that have no adapter left are unwrapped.

        Raises:
            AdapterError: the adapter is unknown, active, merged, due to be merged again when adapters are enabled, or
                in use by a call; nothing is changed.
        """
        self._check_known([adapter_name])
        if adapter_name in self._shared.active:
            raise AdapterError(f"delete_adapter: expected an adapter that is not active, found {adapter_name!r}")
        if adapter_name in self._shared.paused:
            raise AdapterError(
                f"delete_adapter: expected an adapter that is not merged, found {adapter_name!r}, which is merged "
                "again when adapters are enabled"
            )
        if adapter_name in self.merged_adapters:
            raise AdapterError(f"delete_adapter: expected an adapter that is not merged, found {adapter_name!r}")
        if self._in_call(adapter_name):
            raise AdapterError(f"delete_adapter: expected an adapter that no call uses, found {adapter_name!r}")
        self._remove(adapter_name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Disables all adapters within the block; merged ones are unmerged and merged again after it."""
        before = self._shared.off
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if before:
                self.disable_adapter_layers()
            else:
                self.enable_adapter_layers()

    @_locked
    def disable_adapter_layers(self) -> None:
        """Disables all adapters until `enable_adapter_layers`; merged ones are unmerged."""
        self._check_own("disable_adapter")
        if merged := self._shared.merged:
            self.unmerge_adapter()
            self._shared.paused = merged
        self._shared.off = True

    @_locked
    def enable_adapter_layers(self) -> None:
        """Enables the adapters again, and merges those that `disable_adapter_layers` unmerged.

        Raises:
            AdapterError: as in `merge_adapter`; adapters stay disabled.
        """
        before, self._shared.off = self._shared.off, False
        if names := self._shared.paused:
            safe, keep = self._shared.merge_options
            try:
                self.merge_adapter(names, safe, keep_weights=keep)
            except BaseException:
                self._shared.off = before
                raise
        self._shared.paused = ()

    @_locked
    def merge_adapter(
        self,
        adapter_names: str | Sequence[str] | None = None,
        safe_merge: bool = True,
        *,
        keep_weights: bool = True,
    ) -> dict[str, float]:
        """Merges adapters into the base's weights and biases, computed in float32 and rounded once.

        While they are merged, the model uses their copies of whole modules (``modules_to_save``).

        Args:
            adapter_names: one name, or several that are applied in order; the active adapters if None.
            safe_merge: whether to refuse merged weights that aren't finite.
            keep_weights: whether to keep the old weights, so that `unmerge_adapter` restores them bit for bit. If
                False, no more than one layer's old weight is in memory at a time, and unmerging multiplies by the
                inverse of each 2x2 block. This restores float32 weights up to rounding, other dtypes to their own
                precision, and quantises quantised weights a second time. Weights that are shared with other modules
                are kept in any case.

        Returns:
            For each layer with a quantised base, by module path: the error from quantising its weight again, relative
            to the weight's norm.

        Raises:
            AdapterError: a name is unknown, adapters are already merged or are disabled, or a layer can't be merged.
                Without ``keep_weights`` also if a weight couldn't be restored, because a block has no inverse (as with
                α = 0) or nearly none, or because the dtype can't hold the result. Nothing is changed.
        """
        names = self._to_merge(adapter_names)
        if not keep_weights:
            # All layers are tried first, because undoing a merge isn't exact.
            for layer in layers(self):
                _merge.attempt(layer, names, check=safe_merge, keep=False)
        kept, check = (list(layers(self)), safe_merge) if keep_weights else (self._held_twice(), False)
        errors, done = {}, []
        try:
            for layer in layers(self):
                errors[layer.module_path] = _merge.merge(layer, names, check=check, keep=layer in kept)
                done.append(layer)
        except BaseException:
            for layer in done:
                _merge.unmerge(layer)
            raise
        self._shared.merged, self._shared.merge_options = tuple(names), (safe_merge, keep_weights)
        return {path: error for path, error in errors.items() if error is not None}

    @_locked
    def unmerge_adapter(self) -> dict[str, float]:
        """Restores the weights that `merge_adapter` kept, bit for bit, or rotates the merged ones back if none were.

        Returns:
            For each layer with a quantised base whose weight wasn't kept, by module path: the error from quantising the
            weight again, relative to its norm.

        Raises:
            AdapterError: nothing is merged, or accelerate has offloaded the merged weights; they stay merged.
        """
        if not self.merged_adapters:
            raise AdapterError("unmerge_adapter: expected merged adapters, found none")
        merged = [layer for layer in layers(self) if layer.merged_adapters]
        for layer in merged:
            if bare(layer.base_layer).weight.is_meta:
                raise AdapterError(
                    f"unmerge_adapter: expected merged weights where they were, found that accelerate took "
                    f"{layer.module_path}'s away; remove its hooks first"
                )
        errors, kept = {}, [layer for layer in merged if isinstance(layer.unmerged, _merge.Kept)]
        try:
            for layer in merged:
                errors[layer.module_path] = _merge.unmerge(layer)
        except BaseException:
            for layer in merged:
                if not layer.merged_adapters:
                    _merge.merge(layer, self.merged_adapters, check=False, keep=layer in kept)
            raise
        self._shared.merged = ()
        return {path: error for path, error in errors.items() if error is not None}

    @_locked
    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: str | Sequence[str] | None = None
    ) -> nn.Module:
        """Merges adapters permanently and returns the plain base model without wrapped layers, frozen as in PEFT.

        All layers are tried first. Then they are merged one by one, and each frees its old weight, so that no more than
        one layer's old weight is in memory at a time. After an interruption every layer is either merged and
        unwrapped or unchanged: the model still computes with these adapters, and merging the same ones again continues
        with the remaining layers.

        For quantised layers a warning states the error from quantising their weights again.

        Args:
            progressbar: whether to show a progress bar.
            safe_merge: as in `merge_adapter`.
            adapter_names: as in `merge_adapter`.

        Raises:
            AdapterError: as in `merge_adapter`, or other adapters than ``adapter_names`` are merged already.
        """
        if not self.merged_adapters:
            names = self._to_merge(adapter_names)
            _warn_of({layer.module_path: _merge.attempt(layer, names, check=safe_merge) for layer in layers(self)})
            for layer in track(list(layers(self)), "Merging", disable=not progressbar):
                _merge.merge(layer, names, check=False)
                layer.unmerged = None
                # At once: a merged layer must not be rotated again if a later one fails.
                self._unwrap(functools.partial(operator.is_, layer))
            self._shared.merged = tuple(names)
        elif adapter_names is not None and _as_list(adapter_names) != self.merged_adapters:
            raise AdapterError(
                f"merge_and_unload: expected the merged adapters {self.merged_adapters}, "
                f"found {_as_list(adapter_names)}"
            )
        self._put_back(lambda module: module.current())
        base = self._give_back()
        _base.untie(base)
        return base

    @_locked
    def unload(self) -> nn.Module:
        """Removes all adapters and returns the plain base model with its original weights.

        Base weights that `load_adapter` replaced stay replaced, and parameters stay frozen, as in PEFT.
        """
        if self.merged_adapters:
            self.unmerge_adapter()
        return self._give_back()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: str | Sequence[str] | None = None,
        *,
        is_main_process: bool = True,
        overwrite: bool = False,
    ) -> None:
        """Writes adapters in PEFT's format: ``"default"`` into the folder itself, others into subfolders by name.

        Args:
            save_directory: a new or empty folder; with ``overwrite`` any.
            safe_serialization: for PEFT's signature; must be True, as nothing is pickled.
            selected_adapters: names of the adapters to save; all if None.
            is_main_process: whether to write. Of several processes that share the folder, only one should.
            overwrite: whether to replace adapter files that the folder already holds.

        Raises:
            AdapterError: a name is unknown, there is no adapter, the folder isn't empty, or base weights are to be
                saved with an adapter while adapters are merged; nothing is written.
        """
        if safe_serialization is not True:
            raise AdapterError(f"safe_serialization: expected True, found {safe_serialization!r}")
        names = self.adapter_names if selected_adapters is None else _as_list(selected_adapters)
        self._check_known(names)
        if not names:
            raise AdapterError("save_pretrained: expected at least one adapter, found none")
        source = getattr(self.base_model, "name_or_path", None) or None
        adapters = {}
        with LOCK:
            self._check_own("save_pretrained")
            for name in names:
                config = self._shared.configs[name]
                config = dataclasses.replace(
                    config, inference_mode=True, base_model_name_or_path=config.base_model_name_or_path or source
                )
                base_weights = {
                    path: _base.base_weight(self.base_model, path) for path in self._base_weights.get(name, ())
                }
                if base_weights:
                    self._check_unmerged("save_pretrained with weights of the base")
                # In all processes, because each may hold only a shard of them.
                adapters[name] = to_adapter(layers(self), saved_modules(self), name, config, base_weights)
        if not is_main_process:
            return
        target = as_path(save_directory)
        if overwrite:
            for name, adapter in adapters.items():
                write_peft(target if name == "default" else target / name, adapter, overwrite=True)
            return
        check_free(target)
        with new_directory(target) as draft:
            for name, adapter in adapters.items():
                write_peft(draft if name == "default" else draft / name, adapter, overwrite=True)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Uploads to the Hugging Face Hub what `save_pretrained` writes, without the base.

        Args:
            repo_id: the repository; it is created if it isn't there.
            commit_message: message of the commit.
            private: whether a new repository is private; None for the account's default.
            token: as ``huggingface_hub.HfApi`` takes it.
            revision: the branch; it is created if it isn't there.
            create_pr: whether to open a pull request instead.

        Returns:
            The ``CommitInfo`` of ``huggingface_hub``.

        Raises:
            AdapterError: as in `save_pretrained`; nothing is uploaded.
        """
        import huggingface_hub

        api = huggingface_hub.HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, overwrite=True)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/pr"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload adapters",
                revision=revision,
                create_pr=create_pr,
            )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Calls the base's ``resize_token_embeddings``.

        Raises:
            AdapterError: an adapter wraps the embedding, the head, or a module tied to them; nothing is changed.
        """
        if (args or kwargs) and (wrapped := _base.wrapped_ends(self.base_model)):
            raise AdapterError(
                f"resize_token_embeddings: expected embeddings and a head that no adapter has, found {wrapped[0]} with "
                "one; resize the base before it is wrapped"
            )
        return self.base_model.resize_token_embeddings(*args, **kwargs)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Calls the base's ``tie_weights``; does nothing if adapters wrap modules with tied weights and all are tied.

        Raises:
            AdapterError: adapters wrap modules whose weights would have to be tied; nothing is changed.
        """
        if not hasattr(self.base_model, "tie_weights"):
            return
        wrapped = _base.wrapped_ends(self.base_model)
        if not wrapped:
            self.base_model.tie_weights(*args, **kwargs)
        elif not _base.are_tied(self.base_model):
            raise AdapterError(
                f"tie_weights: expected weights that are tied or that no adapter has, found {wrapped[0]} with one"
            )

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Returns the numbers of trainable and of all parameters; a 4-bit parameter counts as one."""
        trainable = total = 0
        for parameter in self.parameters():
            count = parameter.numel()
            if type(parameter).__name__ == "Params4bit":
                count *= 2 * parameter.element_size()
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """Prints the number and share of trainable parameters, as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def __getattr__(self, name: str) -> Any:
        """Looks up missing attributes in the base model: ``config``, ``device``, ``generation_config``, …."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # There is no base model before __init__ has run, and accelerate's hooks on the base are not this model's.
            if name in ("base_model", "_shared", *HOOKED) or "base_model" not in self._modules:
                raise
            return of_base(self._modules["base_model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets attributes that are read from the base model on the base model."""
        base = self.__dict__.get("_modules", {}).get("base_model")
        own = name.startswith("_") or name in self.__dict__ or name in self._modules or hasattr(type(self), name)
        if base is None or own or not hasattr(base, name):
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)

    @torch.compiler.disable
    def _routed(
        self,
        adapter_names: Sequence[str | Sequence[str]] | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        generates: bool = False,
    ) -> routed:
        """Returns the context within which the layers know which adapter each row gets."""
        # An empty list is no mixed batch.
        names = None if adapter_names is None else self._check_names(adapter_names, args, kwargs) or None
        # Generation records no gradients.
        with_grad = torch.is_grad_enabled() and not generates
        if generates and names is not None:
            check_generation(self.base_model, names, args, kwargs)
        checkpointed = names is not None and with_grad and _checkpoint.follow(self.base_model)
        with LOCK:
            if self._shared.off and names is not None:
                # Recorded in the names, because adapters may be enabled again before the backward pass.
                names = [BASE] * len(names)
            if exporting():
                return self._exported(names, with_grad)
            if names is None and (self._shared.off or with_grad):
                routing = self._shared.plain
            else:
                self._place([name for name in dict.fromkeys(names or ()) if name != BASE])
                routing = self._shared.route(names, with_grad=with_grad)
            trains = with_grad and routing.trainable
            if trains:
                # Compiled layers don't do this themselves.
                for layer in layers(self):
                    layer.expire()
            elif self._shared.traced:
                self._place_for_traced(routing)
            again = None
            if checkpointed:
                configs = {n: self._shared.configs[n] for name in routing.used for n, _ in parts(name)}
                again = functools.partial(self._again, routing.names, configs, self._shared.active)
            return routed(routing, with_grad, functools.partial(self._before_traced, routing, trains), again)

    def _exported(self, names: Sequence[Name] | None, with_grad: bool) -> routed:
        """`_routed` for torch.export, which replaces θ and α by tensors of its own: no bank row may be formed."""
        for name in names or ():
            if not isinstance(name, str):
                raise AdapterError(
                    f"adapter_names: expected one adapter a row for torch.export, found {name}; add_weighted_adapter "
                    "makes one of several"
                )
            if name != BASE and name not in self._shared.rows:
                raise AdapterError(
                    f"adapter_names: expected adapters on the layers' device for torch.export, found {name!r}, which "
                    "max_loaded keeps off it until a call names it"
                )
        routing = self._shared.plain if names is None else Routing(self._shared, names, with_grad=with_grad)
        return routed(routing, with_grad, lambda: None)

    @torch.compiler.disable
    def _again(self, names: Sequence[Name], configs: Mapping[str, RoadConfig], active: Sequence[str]) -> routed:
        """Returns the context of a mixed call again, for layers that its backward pass recomputes.

        Args:
            names: the call's names.
            configs: the configs of the call's adapters. Loading or swapping an adapter gives it a new config object, so
                identity tells whether it is still the same.
            active: the adapters that were active, the same object as in `Shared`.

        Raises:
            AdapterError: adapters have changed, so layers would compute something else.
        """
        shared = self._shared
        with LOCK:
            found = [
                f"{n!r} replaced or deleted" for n, config in configs.items() if shared.configs.get(n) is not config
            ]
            if configs and shared.active is not active:
                found.append("others active")
            if shared.merged or (configs and shared.off):
                found.append("some merged" if shared.merged else "all disabled")
            if found:
                raise AdapterError(
                    "adapter_names: expected the adapters of a call with gradient checkpointing as they were until its "
                    f"backward pass is over, found {found[0]}"
                )
            # Other adapters may have taken their rows.
            self._place([name for name in dict.fromkeys(names) if name != BASE])
            routing = Routing(shared, names, with_grad=True)
            if routing.trainable and shared.traced:
                for layer in layers(self):
                    layer.expire()
            return routed(routing, True, functools.partial(self._before_traced, routing, routing.trainable))

    def _before_traced(self, routing: Routing, trains: bool) -> None:
        with LOCK:
            # Adapters in training don't read the banks, and later writes to them may go unnoticed.
            if not (self._shared.traced or trains):
                self._place_for_traced(routing)
            self._shared.traced = True

    def _place_for_traced(self, routing: Routing) -> None:
        # Compiled layers don't check whether θ and α were written to.
        for layer in layers(self):
            for name in routing.used:
                layer.place(name)

    def _check_names(
        self, adapter_names: Sequence[str | Sequence[str]], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> list[Name]:
        if isinstance(adapter_names, str):
            raise AdapterError(f"adapter_names: expected a list with one name a row, found the text {adapter_names!r}")
        names = [read_name(name, self._shared.configs) for name in adapter_names]
        self._check_known([part for name in dict.fromkeys(names) if name != BASE for part, _ in parts(name)])
        rows = batch_sizes(args, kwargs)
        if len(names) not in rows if rows else not names:
            expected = f"each of {rows[0]} rows" if rows else "each row"
            raise AdapterError(f"adapter_names: expected one name for {expected}, found {len(names)}")
        self._check_unmerged("adapter_names")
        check_media(self.base_model, names, args, kwargs)
        return names

    def _place(self, names: Sequence[Name], also_active: Sequence[str] | None = None) -> None:
        """Gives these adapters and mixes a row in every layer's bank and marks them as most recently used."""
        # Another thread may have deleted one since the names were checked.
        self._check_known([part for name in names if name not in self._shared.rows for part, _ in parts(name)])
        for name in names:
            if not isinstance(name, str) and name not in self._shared.rows:
                self._check_mix(name)
        missing = self._shared.make_room(names, self._shared.active if also_active is None else also_active)
        for name in missing:
            self._shared.rows[name] = self._shared.new_row()
        try:
            for layer in layers(self) if missing else ():
                for name in missing:
                    # Another mix of the same adapters may have had this row.
                    layer.forget(name)
                    layer.place(name)
        except BaseException:
            self._forget(missing)
            raise
        for name in names:
            if self._shared.limit is not None or not isinstance(name, str):
                self._shared.rows[name] = self._shared.rows.pop(name)

    def _forget(self, names: Sequence[Name]) -> None:
        """Frees the rows of mixes whose adapters changed, and of names that couldn't be placed."""
        for name in names:
            for layer in layers(self):
                layer.forget(name)
            del self._shared.rows[name]

    def _check_mix(self, mix: Mix) -> None:
        names = [name for name, _ in mix]
        check_group_sizes([self._shared.configs[name] for name in names], [repr(name) for name in names])
        self._check_one_copy("adapter_names", names)
        self._check_no_copies("adapter_names", [name for name, weight in mix if weight != 1])

    def _install(
        self,
        name: str,
        config: RoadConfig,
        parameters: _Parameters,
        saved: Mapping[str, nn.Module],
        base_weights: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        """Adds an adapter whose parts are known to fit. If this is interrupted, nothing of it is left."""
        trained = [parameter for parameter in self.base_model.parameters() if parameter.requires_grad]
        active = self._shared.active
        try:
            with _overwritten(base_weights):
                self._wrap(name, config, parameters, saved)
        except BaseException:
            self._shared.active = active
            self._remove(name)
            for parameter in trained:
                parameter.requires_grad_(True)
            raise

    def _wrap(self, name: str, config: RoadConfig, parameters: _Parameters, saved: Mapping[str, nn.Module]) -> None:
        """Wraps layers that aren't wrapped yet and stores θ, α and copies in them."""
        modules = _base.modules_by_path(self.base_model)
        wrapped: dict[nn.Module, RoadLayer | SavedModule] = {}
        for path, own in saved.items():
            module = modules[path]
            holder = (
                module
                if isinstance(module, SavedModule)
                else SavedModule(module, path, self._shared, stray(self.base_model, path))
            )
            holder.modules_to_save[name] = own.requires_grad_(False)
            if holder is not module:
                wrapped[bare(module)] = holder
        stored = torch.device("cpu") if self._shared.stores(config) else None
        for path, (theta, alpha) in parameters.items():
            module = modules[path]
            layer = (
                module
                if isinstance(module, RoadLayer)
                else RoadLayer(module, path, self._shared, stray(self.base_model, path))
            )
            layer.add(name, theta, alpha, stored)
            if layer is not module:
                wrapped[bare(module)] = layer
        first = not self._shared.configs
        # A new object: by its identity a backward pass tells this adapter from an earlier one of the same name.
        self._shared.configs[name] = copy.copy(config)
        # A module may have several parents; the wrapper replaces it in each.
        for parent in list(self.base_model.modules()):
            for key, child in list(parent._modules.items()):
                inside = isinstance(parent, RoadLayer | SavedModule) or bare(parent) is not parent
                if child is not None and bare(child) in wrapped and not inside:
                    setattr(parent, key, wrapped[bare(child)])
        for wrapper in wrapped.values():
            if isinstance(wrapper, RoadLayer):
                _ = wrapper.bank
        if self._shared.limit is None:
            self._place([name])
        if first:
            for parameter_name, parameter in self.base_model.named_parameters():
                if ".road_" not in parameter_name:
                    parameter.requires_grad_(False)
            self.set_adapter(name)

    def _remove(self, name: str) -> None:
        """Removes an adapter that isn't active, or what there is of one."""
        for layer in list(layers(self)):
            layer.remove(name)
        for module in saved_modules(self):
            if name in module.modules_to_save:
                del module.modules_to_save[name]
        self._unwrap(lambda layer: not layer.adapters)
        self._put_back(lambda module: None if module.modules_to_save else module.original_module)
        self._shared.rows.pop(name, None)
        self._forget(self._shared.mixes_with(name))
        self._shared.configs.pop(name, None)
        self._base_weights.pop(name, None)
        # The old routing still holds plans of the unwrapped layers.
        self._shared.renew()

    def _in_call(self, name: str) -> bool:
        return any(name in dict(parts(used)) for call in self._shared.calls for used in call.rows)

    def _held_twice(self) -> list[RoadLayer]:
        """Returns layers that share their weight with another module, such as a tied head: keeping it costs nothing."""
        holders = Counter(id(p) for module in self.modules() for p in module._parameters.values() if p is not None)
        return [layer for layer in layers(self) if holders[id(bare(layer.base_layer)._parameters.get("weight"))] > 1]

    def _to_merge(self, adapter_names: str | Sequence[str] | None) -> list[str]:
        names = self.active_adapters if adapter_names is None else _as_list(adapter_names)
        self._check_known(names)
        self._check_own("merge_adapter")
        _check_once("merge_adapter", names)
        self._check_unmerged("merge_adapter")
        if self._shared.off:
            raise AdapterError("merge_adapter: expected adapters that are enabled, found them disabled")
        self._check_one_copy("merge_adapter", names)
        return names

    def _give_back(self) -> nn.Module:
        for layer in layers(self):
            layer.unmerged = None
        self._unwrap(lambda layer: True)
        self._put_back(lambda module: module.original_module)
        _checkpoint.leave(self.base_model)
        # Without wrapped layers the shared state must not report adapters.
        self._shared.active, self._shared.merged, self._shared.rows, self._shared.configs = (), (), {}, {}
        self._shared.paused = ()
        self._shared.renew()
        self._base_weights = {}
        return self.base_model

    def _unwrap(self, which: Callable[[RoadLayer], bool]) -> None:
        for parent in list(self.base_model.modules()):
            for key, child in list(parent._modules.items()):
                if isinstance(child, RoadLayer) and which(child):
                    setattr(parent, key, child.base_layer)

    def _put_back(self, choose: Callable[[SavedModule], nn.Module | None]) -> None:
        """Replaces wrappers of saved modules by the modules that ``choose`` returns; None leaves the wrapper."""
        for parent in list(self.base_model.modules()):
            for key, child in list(parent._modules.items()):
                if isinstance(child, SavedModule) and (chosen := choose(child)) is not None:
                    setattr(parent, key, chosen)

    def _check_new(self, name: str) -> None:
        check_name(name, self._shared.configs)
        # The name becomes an attribute of these containers, part of parameter paths and a folder's name.
        taken = hasattr(_layer._Parameters([0]), name) or hasattr(nn.ModuleDict(), name)
        if any(sign in name for sign in "./\\") or taken:
            raise AdapterError(
                f"adapter_name: expected a name without '.', '/' and '\\' that Python leaves free, found {name!r}"
            )
        encoded = name.encode(errors="replace")
        if "\0" in name or encoded.decode() != name or len(encoded) > 255:
            raise AdapterError(f"adapter_name: expected the name of a folder, of 255 bytes at most, found {name!r:.80}")
        self._check_unmerged(f"adapter {name!r}")
        self._check_own(f"adapter {name!r}")

    def _check_own(self, what: str) -> None:
        for layer in layers(self):
            if layer._shared is not self._shared:
                raise AdapterError(
                    f"{what}: expected layers that this model wrapped, found {layer.module_path} of another RoadModel "
                    "or copied by itself"
                )

    def _check_known(self, names: Sequence[str]) -> None:
        check_known(names, self._shared.configs)

    def _check_one_copy(self, what: str, names: Sequence[str]) -> None:
        for module in saved_modules(self):
            if len(owners := [name for name in names if name in module.modules_to_save]) > 1:
                raise AdapterError(
                    f"{what}: expected one adapter at most that brings {module.module_path} whole, "
                    f"found {', '.join(owners)}"
                )

    def _check_no_copies(self, what: str, names: Sequence[str]) -> None:
        for module in saved_modules(self):
            if owners := [name for name in names if name in module.modules_to_save]:
                raise AdapterError(
                    f"{what}: expected adapters without modules_to_save, found {owners[0]!r} with {module.module_path}"
                )

    def _copies(self, names: Sequence[str], weights: Sequence[float]) -> dict[str, nn.Module]:
        """Copies the whole modules that a composition of these adapters has, by path; one adapter may bring some."""
        held = {name: [module for module in saved_modules(self) if name in module.modules_to_save] for name in names}
        check_saved(
            [(repr(n), weight, held[n][0].module_path) for n, weight in zip(names, weights, strict=True) if held[n]]
        )
        return {module.module_path: module.copy_again(name) for name, own in held.items() for module in own}

    def _check_unmerged(self, what: str) -> None:
        if merged := self.merged_adapters:
            raise AdapterError(f"{what}: expected no merged adapters, found {', '.join(merged)}; unmerge them first")


def _as_list(names: str | Sequence[str]) -> list[str]:
    return list(names) if isinstance(names, Iterable) and not isinstance(names, str) else [names]


@contextlib.contextmanager
def _overwritten(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Overwrites tensors with values; if the block fails, the old ones come back."""
    pairs = [(own, like(own, value)) for own, value in pairs]
    before = [(own, own.detach().clone()) for own, _ in pairs]
    try:
        _overwrite(pairs)
        yield
    except BaseException:
        _overwrite(before)
        raise


@torch.no_grad()
def _overwrite(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for own, value in pairs:
        own.copy_(value)


def _check_once(what: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise AdapterError(f"{what}: expected each name once, found {', '.join(names)}")


def _warn_of(errors: Mapping[str, float | None]) -> None:
    moved = {path: error for path, error in errors.items() if error is not None}
    if moved:
        worst = max(moved, key=moved.__getitem__)
        warnings.warn(
            f"merging into {len(moved)} quantised layers moves their weights by being quantised anew, {worst} "
            f"farthest, by {moved[worst]:.1%} of its norm; merge_adapter returns each layer's",
            stacklevel=3,
        )


def _read(folder: str | os.PathLike) -> Adapter:
    """Reads a PEFT folder, leaving the ``_orig_mod`` of ``torch.compile``'s wrappers out of its paths."""
    adapter = read_peft(folder)
    paths = (*adapter.modules, *adapter.modules_to_save, *adapter.base_weights)
    if not any("_orig_mod" in path.split(".") for path in paths):
        return adapter

    def plain(table: Mapping[str, Any]) -> dict[str, Any]:
        return {".".join(n for n in path.split(".") if n != "_orig_mod"): value for path, value in table.items()}

    return dataclasses.replace(
        adapter,
        modules=plain(adapter.modules),
        modules_to_save=plain(adapter.modules_to_save),
        base_weights=plain(adapter.base_weights),
    )
