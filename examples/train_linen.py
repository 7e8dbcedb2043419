"""Trains RoAd on a Linen model of your own: the base is frozen, and optax trains an adapter for a changed task.

The base, a small classifier, learns which of eight directions a point lies in. Then the directions are turned, and an
adapter learns the new ones in a jitted step that changes θ and α only. The adapter is saved, loaded, and merged into
plain variables, which then need no adapter.

    python examples/train_linen.py [FOLDER]     # the adapter goes to FOLDER, runs/example-linen by default
"""

import sys

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import road_jax

CLASSES = 8


class Classifier(nn.Module):
    """Maps points [batch, 2] to logits [batch, classes]; it knows nothing of adapters."""

    @nn.compact
    def __call__(self, points: jax.Array) -> jax.Array:
        """Returns the logits."""
        x = nn.gelu(nn.Dense(128, name="up")(points))
        x = nn.gelu(nn.Dense(128, name="middle")(x))
        return nn.Dense(CLASSES, name="head")(x)


def data(seed: int, count: int, turned: float) -> tuple[jax.Array, jax.Array]:
    """Returns points, and the direction that each lies in if the directions are turned by ``turned`` radians."""
    points = jax.random.normal(jax.random.key(seed), (count, 2))
    angles = jnp.arctan2(points[:, 1], points[:, 0]) - turned
    return points, (angles % (2 * jnp.pi) / (2 * jnp.pi) * CLASSES).astype(jnp.int32)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits: jax.Array, labels: jax.Array) -> float:
    return float((logits.argmax(-1) == labels).mean())


def main(folder: str) -> None:
    model = Classifier()
    points, labels = data(0, 1024, turned=0.0)
    variables = model.init(jax.random.key(1), points)
    optimizer = optax.adamw(5e-3)

    # The base, trained like any Flax model. Yours would come from a checkpoint.
    @jax.jit
    def base_step(variables, state):
        gradient = jax.grad(lambda v: cross_entropy(model.apply(v, points), labels))(variables)
        updates, state = optimizer.update(gradient, state, variables)
        return optax.apply_updates(variables, updates), state

    state = optimizer.init(variables)
    for _ in range(200):
        variables, state = base_step(variables, state)

    # The adapter. From here on the variables are only read.
    road = road_jax.transform(model, road_jax.RoadConfig(target_modules=["up", "middle"], group_size=64))
    adapter = road.init(jax.random.key(2), variables, points)
    points, labels = data(3, 1024, turned=0.6)

    @jax.jit
    def step(adapter, state, variables):
        loss, gradient = jax.value_and_grad(lambda a: cross_entropy(road.apply(variables, a, points), labels))(adapter)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    state = optimizer.init(adapter)
    for number in range(301):
        adapter, state, loss = step(adapter, state, variables)
        if number % 100 == 0:
            print(f"step {number}: loss {loss:.4f}")

    road_jax.save_adapter(folder, adapter, road.config)
    adapter, _ = road_jax.load_adapter(folder)
    points, labels = data(4, 2048, turned=0.6)
    adapted = road.apply(variables, adapter, points)
    merged = model.apply(road.merge(variables, adapter), points)
    trained, frozen = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (adapter, variables))
    print(f"trained: {trained} numbers beside {frozen} frozen ones, saved to {folder}")
    print(f"held-out accuracy: base {accuracy(model.apply(variables, points), labels):.3f}", end=", ")
    print(f"adapter {accuracy(adapted, labels):.3f}")
    print(f"merged model, greatest difference of a logit: {jnp.abs(merged - adapted).max():.1e}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/example-linen")
