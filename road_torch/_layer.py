"""`RoadLayer`: wraps any linear layer and rotates its output."""

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from road_core import AdapterError
from road_core._compose import Part, check_scales, compose_module
from road_core._config import VARIANTS
from road_torch import _kernels, _ops
from road_torch._bank import Bank
from road_torch._checkpoint import in_another
from road_torch._kernels import default
from road_torch._routing import LOCAL, LOCK, Mix, Name, Pass, Plan, Routing, Shared, about_to_trace, exporting, parts

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_linear, _linear_forward = nn.functional.linear, nn.Linear.forward


class _Parameters(nn.ParameterDict):
    """θ or α by adapter name. They keep their dtype when the model is cast; ``changes[0]`` counts replacements."""

    def __init__(self, changes: list[int]) -> None:
        super().__init__()
        self.changes = changes

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self.changes[0] += 1
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_hf_hook" and hasattr(value, "detach_hook"):
            # Accelerate offloads a module's tensors until the module is called, but this one is never called.
            self.changes[0] += 1
            value.detach_hook(self)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self.changes[0] += 1
        super().__delattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Parameters":
        return super()._apply(lambda tensor: moved(tensor, fn), recurse)


class RoadLayer(nn.Module):
    """A linear layer whose output is rotated: ``y * first + rotate_half(y) * second``, in the dtype of ``y``.

    The base may be any layer whose output has the features on its last axis: ``nn.Linear``, ``Conv1D``, layers of
    bitsandbytes and others. Only its output is touched.

    Args:
        base_layer: the layer to wrap.
        module_path: its path, for error messages.
        shared: state shared by all layers of the model.
        stray: why the layer doesn't see the batch's rows in order and so can't take part in a mixed batch; None if it
            does.

    Attributes:
        road_theta: θ of each adapter, float32.
        road_alpha: α of each adapter, float32.
        merged_adapters: the adapters that are currently merged into the base's weight.
    """

    base_layer: Any
    road_theta: "_Parameters"
    road_alpha: "_Parameters"

    def __init__(self, base_layer: nn.Module, module_path: str, shared: Shared, stray: str | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = features(bare(base_layer))
        self.module_path = module_path
        self.base_layer = base_layer
        self._changes = [0]
        self.road_theta = _Parameters(self._changes)
        self.road_alpha = _Parameters(self._changes)
        self.merged_adapters: list[str] = []
        # A Kept or an Inverse: how to restore the old weights.
        self.unmerged: Any = None
        if type(bare(base_layer)).__module__.startswith("bitsandbytes."):
            from road_torch import _bnb

            _bnb.unpack_before_saving(bare(base_layer))
        self._shared = shared
        self._bank: Bank | None = None
        self._kernel = _kernels.DEFAULT
        # These layers return a new tensor, which may be overwritten.
        kind = type(base_layer)
        self._gives_new = kind is nn.Linear or is_conv1d(base_layer) or kind.__module__.startswith("bitsandbytes.")
        self._stray = stray
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base's weight; models read its dtype and device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base_layer.bias

    @property
    def changes(self) -> int:
        """How often θ or α of an adapter was replaced."""
        return self._changes[0]

    @property
    def adapters(self) -> list[str]:
        """The adapters of this layer."""
        return list(self.road_theta)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Calls the base layer and rotates its output."""
        # Decoding calls this hundreds of times per token, so every attribute access counts: self.base_layer would go
        # through nn.Module.__getattr__, and calling an nn.Linear without hooks would go through four functions.
        base: Any = self._modules["base_layer"]
        compiling, with_grad = _is_compiling(), _is_grad_enabled()
        weights = base._parameters
        if (
            compiling
            or with_grad
            or type(base) is not nn.Linear
            or args
            or kwargs
            or len(weights) != 2
            or "forward" in base.__dict__
            or base._forward_hooks
            or base._forward_pre_hooks
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or _is_replaced()
        ):
            y: Tensor = base(x, *args, **kwargs)
            unseen = False
        else:
            y = _linear(x, weights["weight"], weights["bias"])
            unseen = True
        shared = self._shared
        if shared.off or shared.merged:
            return y
        routing = LOCAL.routing
        if routing is None or routing.shared is not shared:
            routing = shared.plain
            if with_grad and shared.unrecorded:
                self._check_recomputed()
        if compiling:
            return self._traced(y, routing)
        if with_grad and routing.trainable:
            return self._differentiable(y, routing)
        plan = routing.plans.get(self)
        if (
            plan is None
            or plan.dtype is not y.dtype
            or (plan.outdated(self._changes[0]) if plan.shape is None else plan.shape != y.shape)
        ):
            plan = self._plan(y, routing, plan)
        if not plan.steps:
            return y
        if with_grad:
            if any(source.requires_grad for source in plan.sources):
                return self._differentiable(y, routing)
            if y.requires_grad:
                for first, cross, group_size, index in plan.passes:
                    # Gathered: autograd saves the coefficients, and the tables' rows may be overwritten.
                    y = self._recorded(y, *default.gather(y, first, cross, index), group_size)
                return y
        if not unseen and self._gives_new:
            # A hook, or whatever replaces the base's forward, may hold on to its output.
            unseen = not (base._forward_hooks or _global_forward_hooks or "forward" in base.__dict__ or _is_replaced())
        if unseen and y.is_contiguous():
            for step in plan.steps:
                y = step(y)
            return y
        for first, cross, group_size, index in plan.passes:
            y = self._kernel.rotate(y, first, cross, group_size, index)
        return y

    def add(self, name: str, theta: Tensor, alpha: Tensor, device: torch.device | None = None) -> None:
        """Adds an adapter's θ and α, already checked, on a device (the layer's if None)."""
        with torch.inference_mode(False):
            for parameters, values in ((self.road_theta, theta), (self.road_alpha, alpha)):
                copy = values.detach().to(device or self._device(), torch.float32, copy=True)
                parameters[name] = nn.Parameter(copy, requires_grad=False)

    def remove(self, name: str) -> None:
        """Removes an adapter, or what there is of one."""
        for parameters in (self.road_theta, self.road_alpha):
            if name in parameters:
                del parameters[name]
        self.forget(name)

    def forget(self, name: Name) -> None:
        """Releases the θ and α of an adapter's or mix's row."""
        if self._bank is not None and name in self._shared.rows:
            self._bank.forget(self._shared.rows[name])

    @property
    def bank(self) -> Bank:
        """The table of coefficients, on the layer's device."""
        device = self._device()
        if self._bank is None or self._bank.first.device != device:
            self._bank = Bank(self.out_features, device)
            self._shared.arrive(device)
            for name in self._shared.rows:
                self.place(name, self._bank)
        return self._bank

    def place(self, name: Name, bank: Bank | None = None) -> Sequence[Tensor]:
        """Writes the bank's row for an adapter or mix, unless it is up to date.

        Args:
            name: an adapter or mix that has a row.
            bank: the layer's bank, if the caller has it at hand.

        Returns:
            The θ and α from which the row is formed; empty if this layer has none of the adapters, and the row is the
            identity.

        Raises:
            AdapterError: a rotation of this layer can't be raised to its weight in the mix.
        """
        row, bank = self._shared.rows[name], self.bank if bank is None else bank
        # A mixed batch asks for each name in each layer, so sources are looked up only after a θ or α was replaced.
        key = name, self._changes[0]
        known = bank.sources(row, key)
        if known is not None:
            return known
        bank.reserve(row, self._shared.limit)
        sources = self._sources(name)
        if sources:
            bank.update(row, sources, lambda: self._form(name), key)
        else:
            bank.clear(row, key)
        return sources

    def _here(self, name: Name) -> Mix:
        """Returns those adapters of a name that this layer has, with their weights."""
        return tuple(part for part in parts(name) if part[0] in self.road_theta)

    def _sources(self, name: Name) -> list[Tensor]:
        return [v for part, _ in self._here(name) for v in (self.road_theta[part], self.road_alpha[part])]

    def _form(self, name: Name) -> tuple[Tensor, Tensor]:
        """Forms coefficients, each ``[out]``: for an adapter in float32, for a mix in float64 and rounded once."""
        if isinstance(name, str):
            config, theta, alpha = self._shared.configs[name], self.road_theta[name], self.road_alpha[name]
            return default.coefficients(whole(theta), whole(alpha), config.variant, config.group_size, config.subspace)
        composed = [
            Part(
                on_cpu(self.road_theta[part]).numpy(),
                on_cpu(self.road_alpha[part]).numpy(),
                self._shared.configs[part],
                weight,
            )
            for part, weight in self._here(name)
        ]
        variant = max((part.config.variant for part in composed), key=VARIANTS.index)
        theta, alpha = (torch.from_numpy(v) for v in compose_module(composed, variant, self.module_path))
        first, cross = (v.float() for v in default.coefficients(theta, alpha, variant, composed[0].config.group_size))
        if not (first.isfinite().all() and cross.isfinite().all()):
            raise AdapterError(
                f"{self.module_path}: expected finite coefficients of the mix {name}, found infinite ones"
            )
        return first, cross

    def passes(self, names: Sequence[str]) -> list[Pass]:
        """Returns float32 rotations, each ``[out]``, equivalent to applying these adapters in order.

        Successive adapters with the same group size are composed into one rotation.
        """
        return self._passes([(name, 1.0) for name in names], self._device())

    def _passes(self, mix: Sequence[tuple[str, float]], device: torch.device) -> list[Pass]:
        found: list[Pass] = []
        for name, weight in mix:
            if name not in self.road_theta:
                continue
            config = self._shared.configs[name]
            theta, alpha = self.road_theta[name].to(device), self.road_alpha[name].to(device)
            if weight == 1 or config.variant == "road_1":
                if weight != 1:
                    # Before the power, whose gradient may be NaN for what an optimizer left outside of the subspace.
                    theta, alpha = default.cleared(theta, alpha, config.variant, config.group_size, config.subspace)
                    self._check_scales(alpha, weight)
                    theta, alpha = theta * weight, alpha**weight
                then = default.coefficients(theta, alpha, config.variant, config.group_size, config.subspace)
            elif theta.requires_grad or alpha.requires_grad:
                raise AdapterError(
                    f"adapter_names: expected weight 1 for {name!r} in training, as for every {config.variant}, "
                    f"found {weight:g}"
                )
            else:
                first, cross = self._form(((name, weight),))
                then = first.to(device), cross.to(device)
            if found and found[-1].group_size == config.group_size:
                before = found.pop()
                then = default.compose((before.first, before.cross), then, config.group_size)
            found.append(Pass(*then, config.group_size))
        return found

    def _check_scales(self, alpha: Tensor, weight: float) -> None:
        # Training may have moved α to where the power doesn't exist any more. Graphs can't depend on values.
        if not (_is_compiling() or default.transformed() or alpha.is_meta):
            check_scales(on_cpu(alpha).numpy(), weight, self.module_path)

    # If torch.compile falls back to eager for a layer, it compiles what the layer calls, and would fail on scratch
    # memory that calls share.
    @torch.compiler.disable
    def _plan(self, y: Tensor, routing: Routing, old: Plan | None) -> Plan:
        """Gathers a call's coefficients once; for another shape with as many rows only the memory is replaced."""
        before = old.shape if old is not None and old.dtype is y.dtype else None
        if old is not None and before and before[0] == len(y) and len(before) == y.ndim:
            plan = old
        else:
            plan = self._gather(y, routing)
        plan.shape = None if routing.lasting else y.shape
        if (
            plan.shape is None
            or y.numel() > default.LARGE
            or self._kernel is not _kernels.DEFAULT
            or type(y) is not Tensor
            or default.transformed()
        ):
            plan.steps = [self._kernel.prepare_(*one) for one in plan.passes]
        else:
            # Layers run one after another, so layers with outputs of one shape can share scratch memory.
            key = (y.shape, y.dtype, y.device)
            if key not in routing.scratch:
                with torch.inference_mode(False):
                    routing.scratch[key] = torch.empty_like(y, memory_format=torch.contiguous_format)
            plan.steps = [default.prepare_(*one[:3], routing.scratch[key]) for one in plan.passes]
        # What a transform gathers is wrapped for it, and not for later calls. A replica of nn.DataParallel has none.
        if not (default.transformed() or "_is_replica" in self.__dict__):
            # Last, because another thread may pick the plan up from here.
            routing.plans[self] = plan
        return plan

    def _gather(self, y: Tensor, routing: Routing) -> Plan:
        self._check_output(y)
        if y.is_meta:
            # Only the shape counts, and a rotation doesn't change it.
            return Plan(y.dtype, [], [], self._changes[0])
        plain = self._shared.plain
        follows_plain = routing.names is None and routing is not plain
        if follows_plain and (routing.used, routing.rows) == (plain.used, plain.rows):
            # A generation with the active adapters reuses what a plain call gathered.
            known = plain.plans.get(self)
            if known is None or known.dtype is not y.dtype or known.outdated(self._changes[0]):
                known = self._plan(y, plain, None)
            return Plan(y.dtype, known.passes, known.sources, known.changes)
        self._check_order(routing)
        self._check_checkpointed(routing)
        self._shared.unrecorded |= routing.with_grad and not (_is_grad_enabled() or LOCAL.unrecorded)
        self._kernel = _kernels.choose(self._shared.kernel, y.device)
        names: list[Name] = []
        sources: list[Tensor] = []
        with LOCK, torch.inference_mode(False), torch.no_grad():
            changes, bank = self._changes[0], self.bank
            for name in routing.used:
                # The adapter was swapped after this call began: the call keeps its old row, which isn't written to.
                if routing.rows[name] != self._shared.rows.get(name):
                    names += [name] if self._here(name) else []
                elif found := self.place(name, bank):
                    names.append(name)
                    sources += found
            passes = routing.gather(bank, names, y, self.module_path, self._kernel)
        return Plan(y.dtype, passes, sources, changes)

    def _check_output(self, y: Any) -> None:
        if isinstance(y, Tensor) and y.shape[-1:] == (self.out_features,) and not y.is_complex():
            return
        found = f"one of {y.dtype} and shape {list(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise AdapterError(
            f"{self.module_path}: expected a layer that gives a real tensor [..., {self.out_features}], found {found} "
            f"from {type(bare(self.base_layer)).__name__}; exclude_modules leaves it out"
        )

    def _check_order(self, routing: Routing) -> None:
        if self._stray is not None and routing.batch:
            raise AdapterError(
                f"{self.module_path}: expected a layer that sees the batch's rows in order for adapter_names, "
                f"found {self._stray}"
            )

    def _check_checkpointed(self, routing: Routing) -> None:
        # Non-reentrant checkpointing can be detected while it records; its recomputation wouldn't match.
        if routing.batch and _is_grad_enabled() and not _is_compiling() and in_another():
            raise AdapterError(
                f"{self.module_path}: expected a mixed batch without checkpointing, found a call in "
                "torch.utils.checkpoint, which computes this layer a second time after the call"
            )

    def _check_recomputed(self) -> None:
        # A forward outside of a call, during backward, is a recomputation; its rows' adapters are no longer known.
        if torch._C._current_graph_task_id() != -1:
            # Reset: a later plain training step must not be refused.
            self._shared.unrecorded = False
            raise AdapterError(
                f"{self.module_path}: expected a mixed batch without reentrant checkpointing, found a backward pass "
                "that computes this layer a second time after the call"
            )

    def expire(self) -> None:
        """Marks all coefficients as out of date: an optimizer that writes through ``.data`` leaves no trace."""
        self._changes[0] += 1
        if self._bank is not None:
            self._bank.expire()

    def _differentiable(self, y: Tensor, routing: Routing) -> Tensor:
        """Rotates with gradients for ``y``, θ and α, without prepared coefficients."""
        # Compiled, this would add guards on state that changes here; RoadModel does it before the call instead.
        if not _is_compiling():
            self.expire()
        self._check_output(y)
        self._check_order(routing)
        self._check_checkpointed(routing)
        if routing.names is None or (routing.alike and not _is_compiling()):
            for first, cross, size, _ in self._passes(
                [part for name in routing.used for part in parts(name)], y.device
            ):
                y = self._recorded(y, first, cross, size)
            return y
        repeats = routing.repeats(y, self.module_path)
        names = [name for name in routing.used if self._here(name)]
        for size in dict.fromkeys(self._shared.group_size(name) for name in names):
            here = [name for name in names if self._shared.group_size(name) == size]
            pairs = [self._passes(parts(name), y.device)[0][:2] for name in here]
            first, cross = (torch.stack(v) for v in zip(*pairs, strict=True))
            first = torch.cat((torch.ones_like(first[:1]), first))
            cross = torch.cat((torch.zeros_like(cross[:1]), cross))
            rows = [here.index(name) + 1 if name in here else 0 for name in routing.names]
            index = routing.index(rows, repeats, y.device)
            y = self._recorded(y, first, cross, size, index)
        return y

    def _recorded(self, y: Tensor, first: Tensor, cross: Tensor, size: int, index: Tensor | None = None) -> Tensor:
        """Rotates with gradients for ``y`` and the coefficients."""
        if default.transformed() or (_is_compiling() and self._shared.kernel != "triton"):
            # Expanded before they are rounded, so that the coefficients' gradients are summed in float32.
            first, cross = (table.expand(y.shape) for table in default.gather(y, first, cross, index))
            return default.rotate(y, first, cross, size)
        return _ops.rotate(y, first, cross, size, index, self._shared.kernel)

    def _traced(self, y: Tensor, routing: Routing) -> Tensor:
        """Rotates under ``torch.compile``: gathers by tensors alone, so other adapters need no new graph."""
        if exporting():
            # The exported graph is separate, and its θ and α may still be trained or replaced.
            return self._differentiable(y, routing)
        if LOCAL.routing is not None:
            about_to_trace()
        # Reading this adds a guard, so that a copy of the model that wasn't traced yet is traced again.
        if not self._shared.traced:
            self._shared.traced = True
        # If the call began with gradients, no coefficients were formed for parts of it that run without.
        if (LOCAL.with_grad or _is_grad_enabled()) and routing.trainable:
            return self._differentiable(y, routing)
        self._check_order(routing)
        bank: Any = self._bank
        for size, index in routing.steps[bank.first.device]:
            # Every layer takes part, because the graph doesn't know which layers have an adapter.
            if self.out_features % size == 0:
                if routing.mixed and (repeats := routing.repeats(y, self.module_path, len(index))) > 1:
                    index = index.repeat_interleave(repeats)
                if self._shared.kernel == "triton" and _is_grad_enabled():
                    first, cross = default.gather(y, bank.first, bank.cross, index)
                    y = _ops.rotate(y, first, cross, size, None, "triton")
                elif self._shared.kernel == "triton":
                    y = _ops.rotate(y, bank.first, bank.cross, size, index, "triton")
                else:
                    y = default.rotate(y, bank.first, bank.cross, size, index)
        return y

    def _device(self) -> torch.device:
        return _device(self.base_layer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RoadLayer":
        # Tables and plans are on the device that the parameters are about to leave.
        self._shared.plain.plans.pop(self, None)
        self._shared.spare.clear()
        self._bank = None
        if self.unmerged is not None:
            self.unmerged.move(fn)
        stored = {
            id(values[name])
            for values in (self.road_theta, self.road_alpha)
            for name in values
            if self._shared.stores(self._shared.configs[name])
        }
        super()._apply(lambda tensor: tensor if id(tensor) in stored else fn(tensor), recurse)
        _ = self.bank
        return self

    def extra_repr(self) -> str:
        """Returns the adapters' names for ``repr``."""
        return f"adapters={self.adapters}"


def moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies a function of ``nn.Module._apply`` to a tensor, but keeps the tensor's dtype."""
    new = fn(tensor)
    return new if new.dtype == tensor.dtype else tensor.to(new.device)


def whole(tensor: Tensor) -> Tensor:
    """Gathers a tensor that is sharded across processes, as by FSDP; returns other tensors unchanged."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def on_cpu(tensor: Tensor) -> Tensor:
    """Returns the whole tensor, copied: FSDP can't free memory that NumPy refers to."""
    return whole(tensor.detach()).to("cpu", copy=True).contiguous()


def like(own: Tensor, value: Tensor) -> Tensor:
    """Shards a value across processes in the way ``own`` is sharded."""
    mesh: Any = getattr(own, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), mesh, own.placements)  # type: ignore[attr-defined]


def bare(module: nn.Module) -> nn.Module:
    """Returns the module within ``torch.compile``'s wrapper; other modules are returned unchanged."""
    while (inner := module._modules.get("_orig_mod")) is not None:
        module = inner
    return module


def features(module: Any) -> tuple[int, int]:
    """Returns ``(in_features, out_features)`` of a linear layer.

    Raises:
        TypeError: the module isn't known to be linear.
    """
    if is_conv1d(module):
        rows, columns = module.weight.shape
        return rows, columns
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if any(isinstance(size, bool) for size in sizes):
        raise TypeError(type(module).__name__)
    # Sizes may be tensors, as in Inkling.
    return operator.index(sizes[0]), operator.index(sizes[1])  # type: ignore[arg-type]


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' ``Conv1D``, a linear layer with weight ``[in, out]``; doesn't import transformers."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def layers(model: nn.Module) -> Iterator[RoadLayer]:
    """Yields the model's adapted layers, each once."""
    return (module for module in model.modules() if isinstance(module, RoadLayer))


def _is_replaced() -> bool:
    """True if ``nn.Linear.forward`` or ``nn.functional.linear`` has been patched."""
    return nn.Linear.forward is not _linear_forward or nn.functional.linear is not _linear


def _device(module: nn.Module) -> torch.device:
    # Where accelerate's hook brings offloaded weights for each call. The lookups here bypass nn.Module's own, because
    # a mixed batch asks every layer.
    device = getattr(module.__dict__.get("_hf_hook"), "execution_device", None)
    if device is not None:
        # The name that tensors on it report: "cuda" becomes "cuda:0".
        return torch.empty(0, device=device).device
    for tensor in itertools.chain(module._parameters.values(), module.parameters(), module.buffers()):
        if tensor is not None and tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")
