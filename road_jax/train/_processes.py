"""Several processes as one run: who they are, what they agree on, and arrays that span them."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from road_core import AdapterError
from road_jax.models._mesh import placed


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the other processes of a run; call it before anything else asks JAX for a device.

    Args:
        coordinator: ``HOST:PORT`` of process 0, or ``"auto"`` where the cluster tells (TPU pods, SLURM, …); None for a
            run of one process.
        processes: how many there are.
        process: this one's number, from 0.

    Raises:
        AdapterError: numbers that contradict each other, or the others can't be reached.
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
    """True for the one process that writes."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Returns when every process has come to this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_of(flag: bool) -> bool:
    """True in every process if it is in one."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def put(tree: Any, shardings: Any) -> Any:
    """Places what every process holds alike on the devices, without asking the others.

    Args:
        tree: of arrays.
        shardings: one for all of them, or a tree of them laid out like ``tree``.
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
