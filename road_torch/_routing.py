"""What all layers of a model look at, and which adapter each row of a call gets."""

import contextlib
import math
import threading
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from road_core import AdapterError, RoadConfig
from road_torch._kernels import Kernel, default

if TYPE_CHECKING:
    from road_torch._bank import Bank

# What a row of a batch that wants no adapter calls itself, as in PEFT.
BASE = "__base__"

# What accelerate leaves on a module that it hooks.
HOOKED = ("_hf_hook", "_old_forward")

# Several adapters as one, in the order in which they are applied: (name, weight) of each.
Mix = tuple[tuple[str, float], ...]

# How many mixes keep their coefficients where the number of adapters has no limit.
MIXES = 64

# What a row of a batch may ask for: an adapter, or a mix of them.
Name = str | Mix


def parts(name: Name) -> Mix:
    """Returns the adapters that a name stands for, with their weights."""
    return ((name, 1.0),) if isinstance(name, str) else name


def read_name(name: object, known: Container[str]) -> Name:
    """Reads ``"a+b"``, ``"a:0.7+b:0.3"`` or a list of such parts; what is an adapter's name as it stands is that.

    Raises:
        AdapterError: no text and no list of it, or a weight that isn't finite. Names aren't checked.
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


# Held while adapters come, go or are merged, and while rows of the banks are written, read or handed out; never while a
# model computes or a file is read.
LOCK = threading.RLock()


class Pass(NamedTuple):
    """One rotation of a layer's output. Adapters of several group sizes need one each.

    Attributes:
        first: coefficients, broadcasting against the output; with ``rows`` a table ``[adapters, out]``.
        cross: as ``first``.
        group_size: of the rotation.
        rows: of the tables, one for each row of the output, int64 ``[batch]``.
    """

    first: Tensor
    cross: Tensor
    group_size: int
    rows: Tensor | None = None


class Plan:
    """The rotations that a layer applies, ready for one dtype; if the routing lives for one call, for one shape.

    A plan is made for the device that its first output was on: who moves a layer moves it through ``_apply``, which
    drops the plan of lasting routings.
    """

    __slots__ = ("changes", "dtype", "passes", "shape", "sources", "steps", "trained", "versions")

    def __init__(self, dtype: torch.dtype, passes: list[Pass], sources: Sequence[Tensor], changes: int) -> None:
        self.dtype = dtype
        self.passes = passes
        self.sources = sources
        self.versions = [source._version for source in sources]
        self.trained = any(source.requires_grad for source in sources)
        self.changes = changes
        # None where the routing lasts: outputs of any shape, and each time a look whether θ and α were written to.
        self.shape: torch.Size | None = None
        # The passes, each as a function that overwrites an output.
        self.steps: list[Callable[[Tensor], Tensor]] = []

    def outdated(self, changes: int) -> bool:
        """True where θ or α were replaced or written to, or may have been, for they are trained."""
        return self.trained or changes != self.changes or [source._version for source in self.sources] != self.versions


class Shared:
    """What all layers of a model look at.

    Attributes:
        active: the adapters that a plain call applies, one after the other.
        off: True while adapters are disabled.
        merged: the adapters that stand in the base's weights, in the order in which they were applied.
        paused: those that are merged again once adapters are enabled.
        merge_options: ``safe_merge`` and ``keep_weights`` that they were merged with.
        configs: of every adapter, in the order in which they came.
        rows: the row of the banks for each adapter and mix that has one, the least recently used first; 0 is the
            identity.
        limit: how many adapters may have a row at once; None for all.
        plain: what a plain call follows. It is replaced, never changed, so that a call in flight keeps its own.
        calls: those in flight. Their rows are left alone.
        devices: where there are layers.
        kernel: the name of the rotation's implementation; "auto" is each device's own.
        traced: whether a compiled model reads the banks, which must then be right before it runs.
        unrecorded: whether a mixed call that began with gradients passed a layer without.
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
        self.devices: set[torch.device] = set()
        self.kernel = kernel
        self.traced = False
        self.unrecorded = False
        self.plain = Routing(self, None, lasting=True)

    def __getstate__(self) -> dict[str, Any]:
        """The calls in flight are not a copy's."""
        return {**self.__dict__, "calls": []}

    def group_size(self, name: Name) -> int:
        """The group size of an adapter, or of the adapters of a mix."""
        return self.configs[parts(name)[0][0]].group_size

    def arrive(self, device: torch.device) -> None:
        """Notes where there are layers now; those of a compiled model find there what a plain call follows."""
        if device not in self.devices:
            self.devices.add(device)
            self.plain.steps[device] = self.plain.indices(1, device)

    def stores(self, config: RoadConfig) -> bool:
        """True for an adapter whose θ and α stay on the CPU, wherever the layers are."""
        return self.limit is not None and config.inference_mode

    def mixes_with(self, adapter: str) -> list[Mix]:
        """Returns the mixes that have a row and this adapter in them."""
        return [name for name in self.rows if not isinstance(name, str) and adapter in dict(name)]

    def new_row(self) -> int:
        """Returns the lowest row that no adapter and no call in flight has."""
        used = {*self.rows.values(), *(row for call in self.calls for row in call.rows.values())}
        return next(row for row in range(1, len(used) + 2) if row not in used)

    def make_room(self, wanted: Sequence[Name], active: Sequence[str]) -> list[Name]:
        """Takes their rows from the least recently used adapters until those that are wanted fit.

        Without a limit only mixes beyond `MIXES` lose theirs: a server may be asked for any weights.

        Args:
            wanted: names that shall have a row.
            active: names that keep theirs.

        Returns:
            The wanted adapters that have no row yet.

        Raises:
            AdapterError: so many can't have a row at once; nothing has changed.
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

    Layers keep here what they gathered. The routing of a mixed batch or of a generation lives for its call, that of
    other plain calls until another adapter becomes active.

    Attributes:
        shared: of the model that was called; layers of another one take no notice.
        names: one a row, or a mix; None for a plain call, in which all rows get the active adapters.
        lasting: whether it serves many calls, of several threads perhaps.
        batch: how many names there are; 0 for a plain call.
        alike: whether they all are one: then it doesn't matter which rows a layer gets, nor how many.
        mixed: whether there are any. Compiled models look at this, for of names each other one would be a reason to
            compile again, and of ``batch`` each other number.
        used: the adapters and mixes among them.
        rows: their rows in the banks. An adapter that is swapped meanwhile gets another one.
        sizes: their group sizes.
        trainable: whether one of them may be in training.
        with_grad: whether the call that this is for began with gradients.
        steps: by device, ``(group size, rows of the banks)`` for a compiled model, int64 ``[batch]`` or ``[1]``.
        plans: what each layer gathered.
        scratch: memory that layers use one after the other, by its shape, dtype and device.
    """

    def __init__(
        self, shared: Shared, names: Sequence[Name] | None, *, lasting: bool = False, with_grad: bool = False
    ) -> None:
        self.shared = shared
        self.lasting = lasting
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
        self.plans: dict[nn.Module, Plan] = {}
        self.scratch: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}
        self._indices: dict[tuple[int, torch.device], list[tuple[int, Tensor]]] = {}
        self.steps: dict[torch.device, list[tuple[int, Tensor]]] = {}
        for device in shared.devices:
            self.steps[device] = self.indices(1, device)

    def __getstate__(self) -> dict[str, Any]:
        """What layers gathered fits their own θ and α, not those of a copy."""
        return {**self.__dict__, "plans": {}, "scratch": {}}

    def indices(self, repeats: int, device: torch.device) -> list[tuple[int, Tensor]]:
        """Returns ``(group size, rows of the banks)``: for each size in a mixed batch, for each active adapter else.

        A mixed batch has those of all the model's adapters, also of ones that no row names.
        """
        key = (repeats, device)
        if key not in self._indices:
            if self.names is None:
                found = [(size, [self.rows[name]]) for name, size in self.sizes.items()]
            else:
                # All that the model's adapters have, in one order: for a compiled model others would be another graph.
                sizes = sorted({self.shared.group_size(name) for name in self.shared.configs})
                found = [
                    (size, [self.rows[name] if self.sizes.get(name) == size else 0 for name in self.names])
                    for size in sizes
                ]
            with torch.inference_mode(False):
                self._indices[key] = [
                    (size, torch.tensor(rows, device=device).repeat_interleave(repeats)) for size, rows in found
                ]
        return self._indices[key]

    def repeats(self, y: Tensor, path: str, batch: int | None = None) -> int:
        """How many rows of ``y`` in a row belong to one name: beams, returned sequences, flattened tokens.

        Args:
            y: a layer's output.
            path: the layer's, for errors.
            batch: how many names there are, where a compiled graph knows it as the size of a tensor.

        Raises:
            AdapterError: the number of rows is no multiple of that of the names.
        """
        rows, batch = len(y) if y.ndim > 1 else 0, self.batch if batch is None else batch
        # Not by divmod, which torch.compile can't trace where the number of rows is symbolic.
        repeats, rest = rows // batch, rows % batch
        if rest != 0 or repeats < 1:
            raise AdapterError(
                f"{path}: expected a multiple of the {batch} rows that adapter_names has, "
                f"found a tensor of shape {list(y.shape)}"
            )
        return repeats

    def gather(self, bank: "Bank", names: Sequence[Name], y: Tensor, path: str, kernel: Kernel) -> list[Pass]:
        """Returns the rotations of ``y`` for these adapters, those of them that a layer has, from its bank."""
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
        """Neighbours of one group size become one rotation."""
        passes: list[Pass] = []
        for name in names:
            size = self.sizes[name]
            then = bank.first[self.rows[name]], bank.cross[self.rows[name]]
            if passes and passes[-1].group_size == size:
                before = passes.pop()
                then = default.compose(before[:2], then, size)
            passes.append(Pass(*then, size))
        # A copy, for the row may be written anew.
        return [Pass(first.to(dtype, copy=True), cross.to(dtype, copy=True), size) for first, cross, size, _ in passes]


class _Local(threading.local):
    """A compiled model reads this too; of a context variable torch.compile makes a break in the graph."""

    def __init__(self) -> None:
        self.routing: Routing | None = None
        # Whether gradients were recorded as the call began; outside of calls it isn't known that none were.
        self.with_grad = True
        # Makes the rows right that the call reads.
        self.place: Callable[[], None] | None = None
        # Opens the call anew for what its backward pass computes a second time; None where nothing is.
        self.again: Callable[[], routed] | None = None
        # Within what is computed a second time: what saved tensors as it began, and whether that was without gradients.
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
    """Makes the banks right while ``torch.compile`` traces: the call began when nobody knew that they would be read."""
    if LOCAL.place is not None:
        LOCAL.place()


class routed:  # noqa: N801 - a context manager, and so lean because it stands around every call
    """While it is open, the calls of this thread on this model follow a routing."""

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
        with LOCK:
            self._routing.shared.calls.remove(self._routing)
