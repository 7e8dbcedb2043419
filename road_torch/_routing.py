"""State that all layers of a model share, and which adapter each row of a call gets."""

import contextlib
import math
import threading
from collections.abc import Callable, Collection, Container, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from road_core import AdapterError, RoadConfig
from road_torch._kernels import Kernel, default

if TYPE_CHECKING:
    from road_torch._bank import Bank
    from road_torch._layer import RoadLayer

# The adapter name of rows that get no adapter, as in PEFT.
BASE = "__base__"

# Attributes that accelerate sets on a module that it hooks.
HOOKED = ("_hf_hook", "_old_forward")

# Several adapters in the order in which they are applied: (name, weight) of each.
Mix = tuple[tuple[str, float], ...]

# How many mixes keep their coefficients if the number of adapters has no limit.
MIXES = 64

# How many calls' routings are kept for others with the same names.
SPARE = 4

# What a row of a batch may ask for: an adapter or a mix.
Name = str | Mix


def parts(name: Name) -> Mix:
    """Returns the adapters of a name, with their weights."""
    return ((name, 1.0),) if isinstance(name, str) else name


def read_name(name: object, known: Container[str]) -> Name:
    """Parses ``"a+b"``, ``"a:0.7+b:0.3"`` or a list of such parts; the name of a known adapter is taken whole.

    Whether the parts are known adapters isn't checked.

    Raises:
        AdapterError: the name is neither a string nor a list of strings, or a weight isn't finite.
    """
    if isinstance(name, str):
        pieces = [name] if name == BASE or name in known else name.split("+")
    elif isinstance(name, list | tuple) and name and all(isinstance(piece, str) for piece in name):
        pieces = list(name)
    else:
        raise AdapterError(f"adapter_names: expected a name or a list of names for each row, found {name!r}")
    found = []
    for piece in pieces:
        stem, _, number = piece.rpartition(":")
        weight = 1.0
        if stem and piece not in known:
            with contextlib.suppress(ValueError):
                weight, piece = float(number), stem
        if not math.isfinite(weight):
            raise AdapterError(f"adapter_names: expected finite weights, found {number} for {stem!r}")
        found.append((piece, weight))
    return found[0][0] if len(found) == 1 and found[0][1] == 1 else tuple(found)


def check_name(name: object, known: Container[str]) -> None:
    """Refuses what can't be the name of a new adapter or intervention.

    Raises:
        AdapterError: it isn't a name, or one of those that are known.
    """
    if not isinstance(name, str) or not name or name == BASE:
        raise AdapterError(f"adapter_name: expected a name other than {BASE!r}, found {name!r}")
    if name in known:
        raise AdapterError(f"adapter_name: expected a new name, found {name!r}, which is there already")


def check_known(names: Sequence[object], known: Collection[str]) -> None:
    """Refuses names of adapters or interventions that aren't there.

    Raises:
        AdapterError: something isn't a name, or names are unknown.
    """
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise AdapterError(f"adapter: expected a name, found {wrong[0]!r}")
    if unknown := [name for name in dict.fromkeys(names) if name not in known]:
        there = ", ".join(map(repr, known)) or "none"
        raise AdapterError(f"adapter: expected one of {there}, found {', '.join(map(repr, unknown))}")


# Held while adapters are added, removed or merged, and while rows of the banks are written, read or assigned; never
# while a model computes or a file is read.
LOCK = threading.RLock()


class Pass(NamedTuple):
    """One rotation of a layer's output. Each group size needs a pass of its own.

    Attributes:
        first: coefficients that broadcast against the output; with ``rows`` a table ``[adapters, out]``.
        cross: as ``first``.
        group_size: the rotation's group size.
        rows: the table row for each row of the output, int64 ``[batch]``.
    """

    first: Tensor
    cross: Tensor
    group_size: int
    rows: Tensor | None = None


class Plan:
    """The rotations that a layer applies, prepared for one dtype and, unless the routing is lasting, for one shape.

    A plan is also tied to the device of the layer's output. Layers are moved through ``_apply``, which drops the plans
    of lasting routings.
    """

    __slots__ = ("changes", "dtype", "passes", "shape", "sources", "steps", "trained", "versions")

    def __init__(self, dtype: torch.dtype, passes: list[Pass], sources: Sequence[Tensor], changes: int) -> None:
        self.dtype = dtype
        self.passes = passes
        self.sources = sources
        self.versions = [source._version for source in sources]
        self.trained = any(source.requires_grad for source in sources)
        self.changes = changes
        # None for a lasting routing: any shape is served, and each use checks whether θ and α were written to.
        self.shape: torch.Size | None = None
        # The passes as functions that overwrite an output.
        self.steps: list[Callable[[Tensor], Tensor]] = []

    def outdated(self, changes: int) -> bool:
        """True if θ or α were replaced or written to, or may have been because they are trained."""
        return self.trained or changes != self.changes or [source._version for source in self.sources] != self.versions


class Shared:
    """State that all layers of a model share. A plain call is one without ``adapter_names``.

    Attributes:
        active: the adapters that a plain call applies, in order.
        off: True while adapters are disabled.
        merged: the adapters that are merged into the base's weights, in the order of application.
        paused: the adapters that are merged again once adapters are enabled.
        merge_options: ``safe_merge`` and ``keep_weights`` of the last merge.
        configs: the config of each adapter, in the order of addition.
        rows: the banks' row of each adapter and mix that has one, least recently used first. Row 0 is the identity.
        limit: how many adapters may have a row at once; None for no limit.
        plain: the routing of plain calls with gradients and of calls of the base itself. It is replaced, never changed,
            so that a running call keeps its own.
        calls: the routings of running calls; their rows are not reassigned.
        spare: by names, the routings of the last calls without gradients, for the next ones with the same names. Each
            call has its own, because its layers share memory.
        devices: the devices that have layers.
        kernel: name of the rotation's implementation; ``"auto"`` chooses by device.
        traced: whether a compiled model reads the banks, which must then be up to date before it runs.
        unrecorded: whether, in a mixed call that began with gradients, a layer ran without recording them.
    """

    def __init__(self, limit: int | None = None, kernel: str = "auto") -> None:
        self.active: tuple[str, ...] = ()
        self.off = False
        self.merged: tuple[str, ...] = ()
        self.paused: tuple[str, ...] = ()
        self.merge_options = True, True
        self.configs: dict[str, RoadConfig] = {}
        self.rows: dict[Name, int] = {}
        self.limit = limit
        self.calls: list[Routing] = []
        self.spare: dict[tuple[Name, ...] | None, Routing] = {}
        self.devices: set[torch.device] = set()
        self.kernel = kernel
        self.traced = False
        self.unrecorded = False
        self.plain = Routing(self, None, lasting=True)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out running calls, which a copy doesn't take part in."""
        return {**self.__dict__, "calls": [], "spare": {}}

    def group_size(self, name: Name) -> int:
        """Returns the group size of an adapter, or of a mix's adapters."""
        return self.configs[parts(name)[0][0]].group_size

    def arrive(self, device: torch.device) -> None:
        """Registers a device that has layers, and puts the plain routing's indices there for compiled models."""
        if device not in self.devices:
            self.devices.add(device)
            self.plain.steps[device] = self.plain.indices(1, device)

    def stores(self, config: RoadConfig) -> bool:
        """True for an adapter whose θ and α stay on the CPU, whatever the layers' device."""
        return self.limit is not None and config.inference_mode

    def renew(self) -> None:
        """Makes later calls gather anew; what was gathered before is let go."""
        self.plain = Routing(self, None, lasting=True)
        self.spare.clear()

    def route(self, names: Sequence[Name] | None, *, with_grad: bool) -> "Routing":
        """Returns the routing of a call, whose names have rows: a spare one, if it still fits, or a new one.

        A loop that calls a model once per token then gathers once, as a generation does.
        """
        # Transforms and modes, such as one of fake tensors, have tensors of their own.
        reusable = not (with_grad or default.transformed() or torch._C._len_torch_dispatch_stack())
        spare = self.spare.pop(None if names is None else tuple(names), None) if reusable else None
        if spare is not None and spare.resume():
            return spare
        routing = Routing(self, names, with_grad=with_grad)
        routing.reusable = reusable
        return routing

    def keep(self, routing: "Routing") -> None:
        """Keeps the routing of a call that has ended, for another one."""
        self.spare[routing.names] = routing
        if len(self.spare) > SPARE:
            del self.spare[next(iter(self.spare))]

    def mixes_with(self, adapter: str) -> list[Mix]:
        """Returns the mixes that have a row and contain this adapter."""
        return [name for name in self.rows if not isinstance(name, str) and adapter in dict(name)]

    def new_row(self) -> int:
        """Returns the lowest row that no adapter, mix or running call uses."""
        used = {*self.rows.values(), *(row for call in self.calls for row in call.rows.values())}
        return next(row for row in range(1, len(used) + 2) if row not in used)

    def make_room(self, wanted: Sequence[Name], active: Sequence[str]) -> list[Name]:
        """Frees the rows of the least recently used adapters and mixes until the wanted ones fit.

        Without a limit only mixes beyond `MIXES` lose their rows, because a server may be asked for ever new weights.

        Args:
            wanted: names that need a row.
            active: names that keep their row.

        Returns:
            The wanted names that have no row yet.

        Raises:
            AdapterError: more adapters than the limit are in use at once; nothing is changed.
        """
        missing = [name for name in wanted if name not in self.rows]
        if not missing:
            return missing
        kept = {*wanted, *active, *(name for call in self.calls for name in call.rows)}
        idle = [name for name in self.rows if name not in kept]
        if self.limit is None:
            idle = [name for name in idle if not isinstance(name, str)]
            surplus = sum(not isinstance(name, str) for name in (*self.rows, *missing)) - MIXES
        elif (surplus := len(self.rows) + len(missing) - self.limit) > len(idle):
            raise AdapterError(
                f"max_loaded: expected at most {self.limit} adapters at once, those that are active or in another call "
                f"among them, found {len(kept)}"
            )
        for name in idle[: max(surplus, 0)]:
            del self.rows[name]
        return missing


class Routing:
    """Which adapter each row of a call gets.

    Layers also cache here what they gathered. A routing serves one call at a time and, if no gradients were recorded,
    later calls with the same names. Plain calls with gradients, and calls of the base itself, share one routing until
    another adapter becomes active.

    Attributes:
        shared: state of the model that was called; layers of another model ignore the routing.
        names: an adapter or mix for each row; None for a plain call, in which all rows get the active adapters.
        lasting: whether it serves many calls, possibly from several threads.
        reusable: whether it may serve another call with the same names, after its own.
        batch: the number of names; 0 for a plain call.
        alike: whether all names are the same. Then it doesn't matter which rows a layer gets, or how many.
        mixed: whether there are names. Compiled models read this instead of ``names`` or ``batch``, because every other
            value of these would cause a recompilation.
        used: the distinct adapters and mixes of the call.
        rows: their rows in the banks. An adapter that is swapped during the call moves to another row.
        sizes: their group sizes.
        trainable: whether one of them may be in training.
        with_grad: whether the call began with gradients enabled.
        steps: by device, ``(group size, rows of the banks)`` for a compiled model, int64 ``[batch]`` or ``[1]``.
        plans: by layer, what it gathered.
        scratch: memory that layers use one after another, by shape, dtype and device.
    """

    def __init__(
        self, shared: Shared, names: Sequence[Name] | None, *, lasting: bool = False, with_grad: bool = False
    ) -> None:
        self.shared = shared
        self.lasting = lasting
        self.reusable = False
        self.with_grad = with_grad
        self.names = None if names is None else tuple(names)
        self.batch = len(names or ())
        self.alike = names is not None and len(set(names)) == 1
        self.mixed = self.batch > 0
        wanted: Sequence[Name] = shared.active if names is None else names
        self.used = tuple(name for name in dict.fromkeys(wanted) if name != BASE)
        self.rows = {name: shared.rows[name] for name in self.used}
        self.sizes = {name: shared.group_size(name) for name in self.used}
        self.trainable = any(
            name in shared.active and not shared.configs[name].inference_mode
            for used in self.used
            for name, _ in parts(used)
        )
        self._state = self._state_now()
        self.plans: dict[RoadLayer, Plan] = {}
        self.scratch: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}
        self._indices: dict[tuple[int, torch.device], list[tuple[int, Tensor]]] = {}
        self._tensors: dict[tuple[tuple[int, ...], int, torch.device], Tensor] = {}
        self.steps: dict[torch.device, list[tuple[int, Tensor]]] = {}
        for device in shared.devices:
            self.steps[device] = self.indices(1, device)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what layers gathered, which doesn't belong to a copy's θ and α."""
        return {**self.__dict__, "plans": {}, "scratch": {}}

    def _state_now(self) -> tuple[Any, ...]:
        """What a routing is made of besides names and rows; each change replaces one of these objects."""
        return (self.shared.active, *self.shared.configs.values(), *self.shared.devices)

    def resume(self) -> bool:
        """Prepares for another call with the same names; returns whether the adapters are as they were.

        Layers whose θ or α were written to since must gather anew.
        """
        now = self._state_now()
        if (
            any(self.shared.rows.get(name) != row for name, row in self.rows.items())
            or len(now) != len(self._state)
            or any(one is not other for one, other in zip(now, self._state, strict=True))
        ):
            return False
        self.plans = {layer: plan for layer, plan in self.plans.items() if not plan.outdated(layer.changes)}
        # A plan holds the memory that it was made with. That of other shapes, such as the prompt's, is let go.
        self.scratch = {}
        return True

    def indices(self, repeats: int, device: torch.device) -> list[tuple[int, Tensor]]:
        """Returns pairs ``(group size, rows of the banks)``.

        A mixed batch has a pair for each group size of the model's adapters, including those that no row names; a plain
        call has one for each active adapter.
        """
        key = (repeats, device)
        if key not in self._indices:
            if self.names is None:
                found = [(size, [self.rows[name]]) for name, size in self.sizes.items()]
            else:
                # All sizes of the model's adapters, sorted: other sizes or another order would need another graph.
                sizes = sorted({self.shared.group_size(name) for name in self.shared.configs})
                found = [
                    (size, [self.rows[name] if self.sizes.get(name) == size else 0 for name in self.names])
                    for size in sizes
                ]
            self._indices[key] = [(size, self.index(rows, repeats, device)) for size, rows in found]
        return self._indices[key]

    def index(self, rows: Sequence[int], repeats: int, device: torch.device) -> Tensor:
        """Returns each of the rows so many times, int64; made once for all layers, as a GPU waits for each copy."""
        if torch.compiler.is_compiling():
            # What was made before would be a guard of the graph.
            return torch.tensor(rows, device=device).repeat_interleave(repeats)
        key = (tuple(rows), repeats, device)
        if key not in self._tensors:
            with torch.inference_mode(False):
                self._tensors[key] = torch.tensor(rows, device=device).repeat_interleave(repeats)
        return self._tensors[key]

    def repeats(
        self, y: Tensor, path: str, batch: int | None = None, remedy: str = "; exclude_modules leaves it out"
    ) -> int:
        """Returns how many successive rows of ``y`` belong to one name (beams, returned sequences, flattened tokens).

        Args:
            y: a layer's output.
            path: the layer's path, for errors.
            batch: the number of names, where a compiled graph knows it as a tensor's size; ``self.batch`` if None.
            remedy: the end of the error, whose cause is the layer, as the names of all rows were counted before.

        Raises:
            AdapterError: the number of rows is not a multiple of the number of names.
        """
        rows, batch = len(y) if y.ndim > 1 else 0, self.batch if batch is None else batch
        # Not divmod, which torch.compile can't trace for a symbolic number of rows.
        repeats, rest = rows // batch, rows % batch
        if rest != 0 or repeats < 1:
            raise AdapterError(
                f"{path}: expected a multiple of the {batch} rows that adapter_names has, "
                f"found a tensor of shape {list(y.shape)}{remedy}"
            )
        return repeats

    def gather(self, bank: "Bank", names: Sequence[Name], y: Tensor, path: str, kernel: Kernel) -> list[Pass]:
        """Returns the rotations of ``y``, from a layer's bank, for those adapters of the call that the layer has."""
        if self.names is None or self.alike:
            return self._compose(bank, names, y.dtype)
        repeats = self.repeats(y, path)
        sizes = {self.sizes[name] for name in names}
        passes = []
        for size, index in self.indices(repeats, y.device):
            if size in sizes:
                if kernel.gathers:
                    passes.append(Pass(bank.first, bank.cross, size, index))
                else:
                    shape = (len(y), *[1] * (y.ndim - 2), y.shape[-1])
                    first, cross = (t.index_select(0, index).to(y.dtype).view(shape) for t in (bank.first, bank.cross))
                    passes.append(Pass(first, cross, size))
        return passes

    def _compose(self, bank: "Bank", names: Sequence[Name], dtype: torch.dtype) -> list[Pass]:
        """Returns the rotations of all rows; successive ones with the same group size are composed into one."""
        passes: list[Pass] = []
        for name in names:
            size = self.sizes[name]
            then = bank.first[self.rows[name]], bank.cross[self.rows[name]]
            if passes and passes[-1].group_size == size:
                before = passes.pop()
                then = default.compose(before[:2], then, size)
            passes.append(Pass(*then, size))
        # A copy, because the row may be overwritten.
        return [Pass(first.to(dtype, copy=True), cross.to(dtype, copy=True), size) for first, cross, size, _ in passes]


class _Local(threading.local):
    """The current call of a thread. Compiled models read it too; a context variable would break their graph."""

    def __init__(self) -> None:
        self.routing: Routing | None = None
        # Whether gradients were enabled as the call began. True outside of calls, where it isn't known.
        self.with_grad = True
        # Brings the rows that the call reads up to date.
        self.place: Callable[[], None] | None = None
        # Reopens the call for what its backward pass recomputes; None if it recomputes nothing.
        self.again: Callable[[], routed] | None = None
        # Within a checkpointed block: the hooks for saved tensors, and whether gradients were off, as it began.
        self.saving: tuple[Any, ...] | None = None
        self.unrecorded = False


LOCAL = _Local()


def exporting() -> bool:
    """True while ``torch.export`` traces.

    ``torch.compiler.is_exporting`` isn't asked: in torch 2.11 it is True for ``torch.compile`` too, and 2.6 lacks it.
    """
    return getattr(torch.compiler, "_is_exporting_flag", False)


@torch.compiler.assume_constant_result
def about_to_trace() -> None:
    """Updates the banks while ``torch.compile`` traces: before the call it wasn't known that they would be read."""
    if LOCAL.place is not None:
        LOCAL.place()


class routed:  # noqa: N801 - a context manager, and so lean because it stands around every call
    """Context within which this thread's calls of a model follow a routing."""

    def __init__(
        self,
        routing: Routing,
        with_grad: bool,
        place: Callable[[], None],
        again: "Callable[[], routed] | None" = None,
    ) -> None:
        self._routing = routing
        self._with_grad = with_grad
        self._place = place
        self._again = again
        routing.shared.calls.append(routing)

    @torch.compiler.disable
    def __enter__(self) -> None:
        self._before = LOCAL.routing, LOCAL.with_grad, LOCAL.place, LOCAL.again
        LOCAL.routing, LOCAL.with_grad, LOCAL.place = self._routing, self._with_grad, self._place
        LOCAL.again = self._again

    @torch.compiler.disable
    def __exit__(self, *error: object) -> None:
        LOCAL.routing, LOCAL.with_grad, LOCAL.place, LOCAL.again = self._before
        routing = self._routing
        with LOCK:
            routing.shared.calls.remove(routing)
            if routing.reusable and error[0] is None:
                routing.shared.keep(routing)
