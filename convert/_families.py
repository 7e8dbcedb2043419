"""The tables: Flax path ⇄ PyTorch path, one table a model family."""

import dataclasses
import functools
import re

from road_core import AdapterError

# Stands for a layer's number. A Flax path without it is that of a stack, whose tensors have a layer axis in front.
LAYER = "{layer}"

_NUMBER = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,5})(?=\.)")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A tensor of a module that is saved whole.

    Attributes:
        flax: its name in Flax.
        torch: its name in PyTorch.
        axes: how many it has, a stack's layer axis not counted.
        transposed: whether the two differ by a transpose: Flax kernels are ``[in, out]``, PyTorch weights
            ``[out, in]``.
    """

    flax: str
    torch: str
    axes: int
    transposed: bool = False


LINEAR = (Leaf("kernel", "weight", 2, transposed=True), Leaf("bias", "bias", 1))
NORM = (Leaf("weight", "weight", 1),)
EMBEDDING = (Leaf("embedding", "weight", 2),)


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of module, in all layers.

    Attributes:
        flax: its path in Flax, with `LAYER` for a layer's number.
        torch: its path in PyTorch.
        leaves: the tensors it may save whole. Only a linear layer (`LINEAR`) carries θ and α.
    """

    flax: str
    torch: str
    leaves: tuple[Leaf, ...] = LINEAR


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a path stands in a table.

    Attributes:
        row: the one row that it matches.
        layer: the layer's number; None for a stack and for a module outside the layers.
        stacked: whether the path is that of a stack.
    """

    row: Row
    layer: int | None
    stacked: bool = False

    def flax(self, *, stacked: bool = False) -> str:
        """Returns the path in Flax, a stack's without the layer's number."""
        return _unnumbered(self.row.flax) if stacked else self.row.flax.replace(LAYER, str(self.layer))

    def torch(self, layer: int | None = None) -> str:
        """Returns the path in PyTorch; ``layer`` chooses one of a stack's."""
        return self.row.torch.replace(LAYER, str(self.layer if layer is None else layer))


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family's table.

    Attributes:
        name: the ``model_type`` of its checkpoints.
        rows: no two of them match one path.
        head: the PyTorch path of the output head, which "all-linear" leaves out.
    """

    name: str
    rows: tuple[Row, ...]
    head: str = "lm_head"

    def find_flax(self, path: str) -> Place | None:
        """Returns the place of a Flax module path, or None."""
        if path in self._by_stack:
            return Place(self._by_stack[path], None, stacked=True)
        return _find(self._by_flax, path)

    def find_torch(self, path: str) -> Place | None:
        """Returns the place of a PyTorch module path, or None."""
        return _find(self._by_torch, path)

    @functools.cached_property
    def _by_flax(self) -> dict[str, Row]:
        return _index(self.name, [(row.flax, row) for row in self.rows])

    @functools.cached_property
    def _by_stack(self) -> dict[str, Row]:
        return _index(self.name, [(_unnumbered(row.flax), row) for row in self.rows if LAYER in row.flax])

    @functools.cached_property
    def _by_torch(self) -> dict[str, Row]:
        return _index(self.name, [(row.torch, row) for row in self.rows])


def _find(index: dict[str, Row], path: str) -> Place | None:
    number = _NUMBER.search(path)
    form = f"{path[: number.start()]}{LAYER}{path[number.end() :]}" if number else path
    row = index.get(form)
    # A path that spells the placeholder out is nobody's.
    return None if row is None or LAYER in path else Place(row, int(number[0]) if number else None)


def _unnumbered(path: str) -> str:
    return path.replace(f".{LAYER}", "")


def _index(family: str, entries: list[tuple[str, Row]]) -> dict[str, Row]:
    index = dict(entries)
    if len(index) != len(entries):
        raise ValueError(f"family {family}: two rows of the table match one path")
    return index


def _same(path: str, leaves: tuple[Leaf, ...] = LINEAR) -> Row:
    """A module that has one path in both: `road_jax.models` mirrors Hugging Face's names."""
    return Row(path, path, leaves)


_BLOCK = f"model.layers.{LAYER}"

_DECODER = (
    _same("model.embed_tokens", EMBEDDING),
    *(_same(f"{_BLOCK}.self_attn.{name}_proj") for name in "qkvo"),
    *(_same(f"{_BLOCK}.mlp.{name}_proj") for name in ("gate", "up", "down")),
    *(_same(f"{_BLOCK}.{name}_layernorm", NORM) for name in ("input", "post_attention")),
    _same("model.norm", NORM),
    _same("lm_head"),
)

_HEAD_NORMS = tuple(_same(f"{_BLOCK}.self_attn.{name}_norm", NORM) for name in "qk")

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", _DECODER),
        Family("mistral", _DECODER),
        Family("qwen2", _DECODER),
        Family("qwen3", _DECODER + _HEAD_NORMS),
    )
}


def family(name: str) -> Family:
    """Returns a family's table.

    Raises:
        AdapterError: there is none of that name.
    """
    if name not in FAMILIES:
        raise AdapterError(f"family: expected one of {', '.join(FAMILIES)}, found {name!r}")
    return FAMILIES[name]
