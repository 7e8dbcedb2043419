"""Trains RoAd on an NNX model of your own: wrap it, and train `RoadParam` with nnx.Optimizer; the base doesn't change.

The base, a small classifier, learns which of eight directions a point lies in. Then the directions are turned, and an
adapter learns the new ones. `examples/train_linen.py` does the same with a Linen model.

    python examples/train_nnx.py [FOLDER]     # the adapter goes to FOLDER, runs/example-nnx by default
"""

import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import road_jax
from road_jax.nnx import RoadParam

CLASSES = 8


class Classifier(nnx.Module):
    """Maps points [batch, 2] to logits [batch, classes]; it knows nothing of adapters."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(2, 128, rngs=rngs)
        self.middle = nnx.Linear(128, 128, rngs=rngs)
        self.head = nnx.Linear(128, CLASSES, rngs=rngs)

    def __call__(self, points: jax.Array) -> jax.Array:
        """Returns the logits."""
        return self.head(nnx.gelu(self.middle(nnx.gelu(self.up(points)))))


def data(seed: int, count: int, turned: float) -> tuple[jax.Array, jax.Array]:
    """Returns points, and the direction that each lies in if the directions are turned by ``turned`` radians."""
    points = jax.random.normal(jax.random.key(seed), (count, 2))
    angles = jnp.arctan2(points[:, 1], points[:, 0]) - turned
    return points, (angles % (2 * jnp.pi) / (2 * jnp.pi) * CLASSES).astype(jnp.int32)


def cross_entropy(model: Classifier, points: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(points), labels).mean()


def accuracy(logits: jax.Array, labels: jax.Array) -> float:
    return float((logits.argmax(-1) == labels).mean())


@nnx.jit(static_argnames="trained")
def step(model, optimizer, points, labels, trained):
    """Takes one training step on the Variables of type ``trained``."""
    loss, gradient = nnx.value_and_grad(cross_entropy, argnums=nnx.DiffState(0, trained))(model, points, labels)
    optimizer.update(model, gradient)
    return loss


def main(folder: str) -> None:
    # The base, trained like any NNX model. Yours would come from a checkpoint.
    model = Classifier(nnx.Rngs(0))
    points, labels = data(0, 1024, turned=0.0)
    optimizer = nnx.Optimizer(model, optax.adamw(5e-3), wrt=nnx.Param)
    for _ in range(200):
        step(model, optimizer, points, labels, nnx.Param)

    # The adapter. `model` itself stays the base: the two share its Variables.
    config = road_jax.RoadConfig(target_modules=["up", "middle"], group_size=64)
    adapted = road_jax.nnx.wrap(model, config)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    points, labels = data(3, 1024, turned=0.6)
    optimizer = nnx.Optimizer(adapted, optax.adamw(5e-3), wrt=RoadParam)
    for number in range(301):
        loss = step(adapted, optimizer, points, labels, RoadParam)
        if number % 100 == 0:
            print(f"step {number}: loss {loss:.4f}")

    road_jax.save_adapter(folder, road_jax.nnx.get_adapter(adapted), config)
    points, labels = data(4, 2048, turned=0.6)
    given, base = adapted(points), model(points)
    same = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, nnx.state(model)))
    trained = sum(x.size for x in jax.tree.leaves(nnx.state(adapted, RoadParam)))
    print(f"trained: {trained} numbers, saved to {folder}; the base is {'as it was' if same else 'another one'}")
    print(f"held-out accuracy: base {accuracy(base, labels):.3f}, adapter {accuracy(given, labels):.3f}")
    road_jax.nnx.merge(adapted)  # in place, and so in `model` too; unmerge undoes it
    print(f"merged model, greatest difference of a logit: {jnp.abs(model(points) - given).max():.1e}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/example-nnx")
