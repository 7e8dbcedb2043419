"""Several processes as one run: joining them, agreeing, and arrays that span them."""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from road_core import AdapterError
from road_core._files import dump_json
from road_jax.models._mesh import placed

T = TypeVar("T")

# How many elements are gathered at a time.
_PIECE = 1 << 22


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the other processes of a run; must be called before anything else asks JAX for a device.

    Args:
        coordinator: ``HOST:PORT`` of process 0, or ``"auto"`` if the cluster provides it (TPU pods, SLURM, …); None for
            a run of one process.
        processes: the number of processes.
        process: this process's number, from 0.

    Raises:
        AdapterError: the numbers contradict each other, or the other processes can't be reached.
    """
    if coordinator is None:
        if processes is not None or process is not None:
            raise AdapterError("processes and process: expected a coordinator beside them, found none")
        return
    address = None if coordinator == "auto" else coordinator
    if address is not None and (processes is None or process is None or not 0 <= process < processes):
        raise AdapterError(
            f"coordinator: expected processes, and process as a number below it, found {processes} and {process}"
        )
    try:
        jax.distributed.initialize(address, num_processes=processes, process_id=process)
    except Exception as error:  # gRPC, the cluster's detection and JAX raise what they like
        reason = " ".join(str(error).split())[:160]
        raise AdapterError(f"coordinator: expected to join {coordinator}, found {reason}") from None


def is_first() -> bool:
    """True for the process that writes the files."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Returns once every process has reached this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_of(flag: bool) -> bool:
    """Returns True in every process if the flag is True in any of them."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def agreed(work: Callable[[], T]) -> T:
    """Returns the result of this process's work; if it fails in one process, all of them raise an error."""
    found, failure = None, None
    try:
        found = work()
    except Exception as error:  # otherwise the other processes would wait forever
        failure = error
    said = "" if failure is None else str(failure) or type(failure).__name__
    # File names in the message may not be valid text.
    messages = gather(np.frombuffer(said.encode(errors="surrogateescape"), np.uint8))
    if failure is not None:
        raise failure
    for message in messages:
        if message.size:
            raise AdapterError(message.tobytes().decode(errors="surrogateescape"))
    return cast("T", found)


def check_same(fields: Mapping[str, Any], what: str) -> None:
    """Refuses, in all processes, a run whose processes were given different values.

    Raises:
        AdapterError: some values differ.
    """
    every = [json.loads(each.tobytes()) for each in gather(np.frombuffer(dump_json(fields), np.uint8))]
    for process, other in enumerate(every):
        for name, value in every[0].items():
            if other[name] != value:
                raise AdapterError(
                    f"{what}: expected the same in all processes, found {name} {value!r} in process 0 and "
                    f"{other[name]!r} in process {process}"
                )


def gather(array: np.ndarray) -> list[np.ndarray]:
    """Returns the arrays of all processes, in order; they have one axis, any lengths and a dtype that JAX has."""
    if jax.process_count() == 1:
        return [array]
    sizes = multihost_utils.process_allgather(np.int32(len(array)))
    longest = int(sizes.max())
    # In pieces, because each device holds all that is gathered.
    piece = min(longest, _PIECE)
    pieces = []
    for start in range(0, longest, _PIECE):
        own = array[start : start + piece]
        pieces.append(multihost_utils.process_allgather(np.pad(own, (0, piece - len(own)))))
    rows = np.concatenate(pieces, axis=1) if pieces else np.zeros((len(sizes), 0), array.dtype)
    return [row[:size] for row, size in zip(rows, sizes, strict=True)]


def put(tree: Any, shardings: Any) -> Any:
    """Places values that every process has alike on the devices, without communication.

    Args:
        tree: a tree of arrays.
        shardings: one sharding for all arrays, or a tree of shardings laid out like ``tree``.
    """
    if isinstance(shardings, NamedSharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        return placed(leaf, sharding)

    return jax.tree.map(place, tree, shardings)
