"""Trains two skills separately on disjoint parts of a layer's 2x2 blocks, then combines them without more training.

The base learns two facts about a point, each read from one half of its features: which of four directions it lies in,
and which of four rings. Then both change: the directions are turned and the rings are moved. One adapter, on the first
half of the blocks, is trained on the turned directions only; another one, on the second half, on the moved rings only.
`road_jax.compose` makes one adapter from both, and one batch uses neither, each and both of them.

Rotations of disjoint blocks always add exactly. Here each question has its own half of the features, so the skills add
exactly, too. In a network that mixes the halves they may not; docs/compose.md has a study on a language model.

    python examples/compose.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import road_jax

TURNED, MOVED = 0.5, 1.35


class TwoHeads(nn.Module):
    """Points [batch, 2] to logits [batch, 2 questions, 4 answers]."""

    @nn.compact
    def __call__(self, points: jax.Array) -> jax.Array:
        """Returns the logits of both questions."""
        x = nn.gelu(nn.Dense(256, name="up")(points))
        x = nn.gelu(nn.Dense(256, name="middle")(x))
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.stack([nn.Dense(4, name="direction")(first), nn.Dense(4, name="ring")(second)], axis=-2)


def data(seed: int, count: int, turned: float = 0.0, moved: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Returns points, and the answers to both questions, [batch, 2]."""
    points = jax.random.normal(jax.random.key(seed), (count, 2))
    angles = (jnp.arctan2(points[:, 1], points[:, 0]) - turned) % (2 * jnp.pi)
    rings = jnp.digitize(jnp.linalg.norm(points, axis=-1) * moved, jnp.array([0.8, 1.2, 1.7]))
    return points, jnp.stack([(angles / (jnp.pi / 2)).astype(jnp.int32), rings], axis=-1)


def loss_of(logits: jax.Array, answers: jax.Array, questions: list[int]) -> jax.Array:
    each = optax.softmax_cross_entropy_with_integer_labels(logits, answers)
    return each[:, jnp.array(questions)].mean()


def train(loss, start, steps: int, rate: float):
    """Minimises a loss over one tree of arrays."""
    optimizer = optax.adam(rate)

    @jax.jit
    def step(tree, state):
        updates, state = optimizer.update(jax.grad(loss)(tree), state)
        return optax.apply_updates(tree, updates), state

    state = optimizer.init(start)
    for _ in range(steps):
        start, state = step(start, state)
    return start


def main() -> None:
    model = TwoHeads()
    points, answers = data(0, 1024)
    variables = model.init(jax.random.key(0), points)
    variables = train(lambda v: loss_of(model.apply(v, points), answers, [0, 1]), variables, 200, 5e-3)

    points, answers = data(1, 1024, TURNED, MOVED)
    adapters, configs = [], []
    for question, subspace in enumerate([(0.0, 0.5), (0.5, 1.0)]):
        config = road_jax.RoadConfig(target_modules=["middle"], subspace=subspace)
        road = road_jax.transform(model, config)

        def loss(adapter, road=road, question=question):
            return loss_of(road.apply(variables, adapter, points), answers, [question])

        adapters.append(train(loss, road.init(jax.random.key(0), variables, points), 200, 2e-2))
        configs.append(config)

    both, config = road_jax.compose(adapters, configs)
    other, _ = road_jax.compose(adapters[::-1], configs[::-1])
    same = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), both, other))
    print(f"composed in either order: {'the same numbers' if same else 'other numbers'}")

    # One batch with four copies of the held-out points, each with another choice of adapters.
    points, answers = data(2, 512, TURNED, MOVED)
    several = road_jax.stack_adapters([*adapters, both], configs=[*configs, config])
    road = road_jax.transform(model, config)
    ids = jnp.repeat(jnp.arange(4), len(points))
    logits = road.apply(variables, several, jnp.tile(points, (4, 1)), adapter_ids=ids)
    right = (logits.argmax(-1) == jnp.tile(answers, (4, 1))).reshape(4, -1, 2).mean(1)
    for name, (directions, rings) in zip(("neither", "directions", "rings", "both"), right, strict=True):
        print(f"{name:10}  directions {directions:.3f}  rings {rings:.3f}")


if __name__ == "__main__":
    main()
