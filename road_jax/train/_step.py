"""One training step and one evaluation step: pure functions, compiled for one device or many."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import jax_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from road_core import AdapterError
from road_jax import models
from road_jax._sharding import shardings
from road_jax._transform import Road
from road_jax._tree import Tree
from road_jax.models._mesh import rows_sharding
from road_jax.train import _processes
from road_jax.train._data import Batch

AXIS = "data"


class State(NamedTuple):
    """What training changes: the adapter and the optimiser's state, but nothing of the base."""

    adapter: Tree
    opt_state: optax.OptState


class Metrics(NamedTuple):
    """A step's mean loss in nats per target token, and the Euclidean norm of its gradient."""

    loss: jax.Array
    gradient_norm: jax.Array


def optimizer(
    learning_rate: float, steps: int, *, warmup: float, weight_decay: float
) -> tuple[optax.GradientTransformation, np.ndarray]:
    """Returns AdamW with the paper's schedule, and each step's learning rate in float32.

    The rate rises linearly over ``warmup`` of the steps, then falls linearly to 0.
    """
    up = max(1, round(steps * warmup)) if warmup else 0
    # Begin, end and number of steps of each line; step 0 already has a rate above 0.
    rise = learning_rate / max(up, 1), learning_rate, max(up - 1, 1)
    fall = learning_rate, 0.0, max(steps - up, 1)
    # join_schedules counts the second schedule from its own start.
    schedule = optax.join_schedules([optax.linear_schedule(*rise), optax.linear_schedule(*fall)], [up])
    # On the host, where asking for a rate doesn't wait for a device.
    number = np.arange(steps)
    rates = np.where(number < up, _on_line(number, *rise), _on_line(number - up, *fall))
    return optax.adamw(schedule, weight_decay=weight_decay), rates


def _on_line(number: np.ndarray, begin: float, end: float, steps: int) -> np.ndarray:
    """Returns the values of ``optax.linear_schedule``, bit for bit."""
    left = np.float32(1) - np.clip(number, 0, steps).astype(np.float32) / np.float32(steps)
    return np.float32(begin - end) * left + np.float32(end)


class Program(NamedTuple):
    """A training program for a set of devices.

    Attributes:
        place: puts the base's variables onto the devices.
        place_state: puts a state onto them.
        fetch: brings a state back to the host.
        train: ``(state, variables, batch) -> (state, metrics)``; the state is donated, and the metrics may still be
            under way.
        evaluate: ``(adapter, variables, batch) -> (summed loss, right [rows, n])``, on the host.
    """

    place: Callable[[Any], Any]
    place_state: Callable[[State], Any]
    fetch: Callable[[Any], Any]
    train: Callable[[State, Any, Batch], tuple[State, Metrics]]
    evaluate: Callable[[Tree, Any, Batch], tuple[float, np.ndarray]]


def make_program(
    road: Road,
    tx: optax.GradientTransformation,
    variables: Any,
    state: State,
    *,
    parallel: str,
    accumulate: int,
    mesh: Mesh,
) -> Program:
    """Compiles the step for all devices: ``"jit"`` with shardings, or ``"pmap"``.

    Both give each device its share of a batch's rows and sum only the gradients of θ and α. With ``accumulate``, a
    device computes its rows in this many parts, one after the other, in one step. If the mesh has fsdp and tensor axes,
    ``jit`` stores and computes the base in shares, and places θ and α along the outputs that they rotate.

    Raises:
        AdapterError: the shares don't divide a quantised kernel's codes, or a layer's shards would cut a group of
            outputs.
    """
    if parallel == "pmap":
        return _pmap_program(road, tx, accumulate)
    return _jit_program(road, tx, variables, state, accumulate, mesh)


def on_mesh(road: Road, mesh: Mesh) -> Road:
    """Returns the same functions, but with a decoder that knows how its params and a batch's rows are sharded."""
    return road if mesh.size == 1 else dataclasses.replace(road, model=road.model.clone(mesh=mesh))


def check_rows(rows: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Refuses a batch that can't be divided evenly.

    Raises:
        AdapterError: the number of devices that share a batch, times ``accumulate``, doesn't divide the rows.
    """
    count = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (count * accumulate):
        parts = f" times {accumulate} parts of a step" if accumulate > 1 else ""
        shares = "devices" if count == mesh.size else "shares (data times fsdp)"
        raise AdapterError(
            f"batch_size: expected a multiple of the {count} {shares}{parts}, so that each has its share, found {rows}"
        )


def summed_loss(
    road: Road, adapter: Tree, variables: Any, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns the summed cross-entropy over a batch's targets, and which were predicted right, ``[rows, n]``."""
    return models.cross_entropy(
        road,
        variables,
        adapter,
        batch["input_ids"],
        batch["targets"],
        weights=batch["weights"],
        attention_mask=batch["segments"],
        logits_at=batch["logits_at"],
    )


def _summed_gradients(
    road: Road, adapter: Tree, variables: Any, batch: Mapping[str, jax.Array], accumulate: int
) -> tuple[jax.Array, Tree]:
    """Returns the loss summed over a batch's targets and its gradient, computed in ``accumulate`` parts of the rows."""

    def part(rows: Mapping[str, jax.Array]) -> tuple[jax.Array, Tree]:
        return jax.value_and_grad(lambda adapter: summed_loss(road, adapter, variables, rows)[0])(adapter)

    if accumulate == 1:
        return part(batch)

    def add(total: tuple[jax.Array, Tree], rows: Mapping[str, jax.Array]) -> tuple[tuple[jax.Array, Tree], None]:
        return jax.tree.map(jnp.add, total, part(rows)), None

    # Each device's rows are split over the parts, so that no row moves to another device.
    parts = jax.tree.map(lambda v: jnp.moveaxis(v.reshape(-1, accumulate, *v.shape[1:]), 1, 0), dict(batch))
    nothing = (jnp.float32(0), jax.tree.map(jnp.zeros_like, adapter))
    return jax.lax.scan(add, nothing, parts)[0]


def _arrays(batch: Batch) -> dict[str, np.ndarray]:
    return {name: getattr(batch, name) for name in ("input_ids", "segments", "logits_at", "targets", "weights")}


def _update(tx: optax.GradientTransformation, state: State, loss: jax.Array, gradients: Tree) -> tuple[State, Metrics]:
    # optax relies on dtype promotion, even if JAX is configured to refuse it.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = tx.update(gradients, state.opt_state, state.adapter)
        adapter = optax.apply_updates(state.adapter, updates)
        return State(adapter, opt_state), Metrics(loss, optax.tree.norm(gradients))


def train_step(
    road: Road,
    tx: optax.GradientTransformation,
    state: State,
    variables: Any,
    batch: Mapping[str, jax.Array],
    *,
    accumulate: int = 1,
) -> tuple[State, Metrics]:
    """Returns the state after one step on a batch that this program holds whole, and the step's metrics."""
    count = jnp.maximum(jnp.sum(batch["weights"]), 1)
    loss, gradients = jax.tree.map(
        lambda v: v / count, _summed_gradients(road, state.adapter, variables, batch, accumulate)
    )
    return _update(tx, state, loss, gradients)


def _share(array: np.ndarray) -> np.ndarray:
    """Returns this process's rows of a batch that every process has made alike."""
    rows = len(array) // jax.process_count()
    return array[jax.process_index() * rows :][:rows]


def _first(array: jax.Array) -> np.ndarray:
    """Returns the share of the first of this process's devices, from a result of ``pmap``."""
    return np.asarray(array.addressable_shards[0].data)[0]


def _jit_program(
    road: Road, tx: optax.GradientTransformation, variables: Any, state: State, accumulate: int, mesh: Mesh
) -> Program:
    road = on_mesh(road, mesh)
    everywhere, dealt = NamedSharding(mesh, P()), rows_sharding(mesh)
    base_where = models.shardings(variables, mesh)
    # Params are gathered over fsdp before a layer computes with them.
    at_work = models.shardings(variables, mesh, stored=False)

    adapter_where = shardings(state.adapter, at_work, config=road.config)
    # The optimiser's moments are placed like the params that they belong to.
    opt_where = optax.tree_utils.tree_map_params(
        tx, lambda _, where: where, state.opt_state, adapter_where, transform_non_params=lambda _: everywhere
    )
    state_where = State(adapter_where, opt_where)

    def evaluate(adapter: Tree, variables: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return summed_loss(road, adapter, variables, batch)

    train = functools.partial(train_step, road, tx, accumulate=accumulate)
    train_jit = jax.jit(train, donate_argnums=0, out_shardings=(state_where, everywhere))
    evaluate_jit = jax.jit(evaluate, out_shardings=everywhere)
    replicate = jax.jit(lambda state: state, out_shardings=everywhere)

    def deal(batch: Batch) -> Any:
        def place(array: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(array.shape, dealt, lambda index: array[index])

        return {name: place(array) for name, array in _arrays(batch).items()}

    def run_evaluate(adapter: Tree, variables: Any, batch: Batch) -> tuple[float, np.ndarray]:
        total, right = evaluate_jit(adapter, variables, deal(batch))
        return float(total), np.asarray(right)

    def fetch(state: State) -> State:
        # A process can't read what is on another one's devices.
        return jax.device_get(state if jax.process_count() == 1 else replicate(state))

    return Program(
        place=lambda variables: _processes.put(variables, base_where),
        place_state=lambda state: _processes.put(state, state_where),
        fetch=fetch,
        train=lambda state, variables, batch: train_jit(state, variables, deal(batch)),
        evaluate=run_evaluate,
    )


def _pmap_program(road: Road, tx: optax.GradientTransformation, accumulate: int) -> Program:
    def train(state: State, variables: Any, batch: Mapping[str, jax.Array]) -> tuple[State, Metrics]:
        count = jnp.maximum(jax.lax.psum(jnp.sum(batch["weights"]), AXIS), 1)
        total = jax.lax.psum(_summed_gradients(road, state.adapter, variables, batch, accumulate), AXIS)
        return _update(tx, state, *jax.tree.map(lambda v: v / count, total))

    def evaluate(adapter: Tree, variables: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, right = summed_loss(road, adapter, variables, batch)
        return jax.lax.psum(total, AXIS), jax.lax.all_gather(right, AXIS)

    train_pmap = jax.pmap(train, axis_name=AXIS, donate_argnums=0)
    evaluate_pmap = jax.pmap(evaluate, axis_name=AXIS)

    def deal(batch: Batch) -> Any:
        n = jax.local_device_count()
        mine = {name: _share(array) for name, array in _arrays(batch).items()}
        return {name: v.reshape(n, len(v) // n, *v.shape[1:]) for name, v in mine.items()}

    def run_train(state: State, variables: Any, batch: Batch) -> tuple[State, Metrics]:
        state, metrics = train_pmap(state, variables, deal(batch))
        # Left on the device, so that the caller decides when to wait for them.
        return state, Metrics(*(array.addressable_shards[0].data.reshape(()) for array in metrics))

    def run_evaluate(adapter: Tree, variables: Any, batch: Batch) -> tuple[float, np.ndarray]:
        total, right = evaluate_pmap(adapter, variables, deal(batch))
        # Every device has the result for all rows.
        return _first(total).item(), _first(right).reshape(batch.targets.shape)

    return Program(
        place=jax_utils.replicate,
        place_state=jax_utils.replicate,
        fetch=lambda state: jax.tree.map(_first, state),
        train=run_train,
        evaluate=run_evaluate,
    )
