"""Interventions: RoAd on the outputs of whole blocks of a model, at chosen tokens of the prompt.

Paper: arXiv 2409.00119, section 4.3. docs/interventions.md says how this is a distributed interchange intervention, and
where it isn't; README.md beside this file specifies the file format.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from road_core._adapter import Adapter, Array
from road_core._config import RoadConfig
from road_core._errors import AdapterError, listed
from road_core._files import dump_json, inside, read_json, write_files
from road_core._reference import Float64, Subspace, output_size, rotate
from road_core._safetensors import dump_tensors, read_tensors

_CONFIG, _TENSORS = "intervention_config.json", "intervention.safetensors"
_SPAN = re.compile(r"(first|last)(?::([1-9][0-9]{0,8}))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterventionConfig:
    """Which blocks' outputs are rotated, at which tokens, and how. It checks itself when it is built.

    Raises:
        AdapterError: a field has a wrong type or value.

    Example:
        >>> InterventionConfig(layers=[16], positions="first:2+last:3", subspace=(0, 0.5)).spans
        (2, 3)
    """

    # Indices of the blocks, counted from 0 in the order in which they run.
    layers: tuple[int, ...]
    # "all" for all tokens, including generated ones; or tokens of the prompt: "first:k", "last:k" or both,
    # "first:k+last:k". "first" and "last" mean one token. In a shorter prompt all tokens are rotated.
    positions: str = "last"
    # These three are as in `RoadConfig`: how θ and α are read, and on which of the hidden vector's 2x2 blocks they act.
    variant: str = "road_1"
    group_size: int = 64
    subspace: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        indices = list(self.layers) if isinstance(self.layers, Iterable) and not isinstance(self.layers, str) else []
        whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in indices)
        if not indices or not whole or len(set(indices)) < len(indices):
            raise AdapterError(
                f"InterventionConfig.layers: expected indices from 0 up, each once, found {self.layers!r:.80}"
            )
        object.__setattr__(self, "layers", tuple(sorted(indices)))
        object.__setattr__(self, "subspace", self.road.subspace)
        _ = self.spans

    @property
    def road(self) -> RoadConfig:
        """The config by which θ and α are read."""
        try:
            return RoadConfig(variant=self.variant, group_size=self.group_size, subspace=self.subspace)
        except AdapterError as error:
            raise AdapterError(str(error).replace("RoadConfig.", "InterventionConfig.", 1)) from None

    @property
    def spans(self) -> tuple[int, int] | None:
        """How many of a prompt's first and of its last tokens are rotated; None for all tokens of any kind."""
        if self.positions == "all":
            return None
        parts = self.positions.split("+") if isinstance(self.positions, str) else []
        found = [_SPAN.fullmatch(part) for part in parts]
        counts = {match[1]: int(match[2] or 1) for match in found if match}
        if not parts or len(counts) < len(parts):
            raise AdapterError(
                "InterventionConfig.positions: expected 'all', 'first:k', 'last:k' or 'first:k+last:k', "
                f"found {self.positions!r:.80}"
            )
        return counts.get("first", 0), counts.get("last", 0)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as in ``intervention_config.json``."""
        return {"intervention_type": "ROAD", **dataclasses.asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "InterventionConfig":
        """Builds a config from the fields of a file.

        Raises:
            AdapterError: ``intervention_type`` isn't ``"ROAD"``, or a field is missing, unknown or wrong.
        """
        if fields.get("intervention_type") != "ROAD":
            raise AdapterError(
                f"InterventionConfig.intervention_type: expected 'ROAD', found {fields.get('intervention_type')!r:.80}"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if wrong := sorted(known.symmetric_difference(fields.keys() - {"intervention_type"})):
            raise AdapterError(
                f"InterventionConfig: expected the fields {', '.join(sorted(known))}, "
                f"found a difference in {', '.join(wrong[:5])}"
            )
        return cls(**{name: fields[name] for name in known})


@dataclasses.dataclass(frozen=True)
class Intervention:
    """One trained intervention. It checks itself when it is built.

    Attributes:
        config: where it acts, and how θ and α are read.
        layers: ``{block index: (theta, alpha)}``, each 1-D of `parameter_size` for the hidden vector; any floating
            dtype.

    Raises:
        AdapterError: the blocks aren't those of the config, sizes differ, or a tensor has a wrong shape or isn't
            finite.
    """

    config: InterventionConfig
    layers: Mapping[int, tuple[Array, Array]]

    def __post_init__(self) -> None:
        if sorted(self.layers) != list(self.config.layers):
            raise AdapterError(
                f"intervention: expected θ and α of the blocks {list(self.config.layers)!s:.80}, "
                f"found {sorted(self.layers)!s:.80}"
            )
        shapes = {theta.shape for theta, _ in self.layers.values()}
        if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
            raise AdapterError(f"intervention: expected θ of one axis and size, found {sorted(map(list, shapes))}")
        # Checks the values, and that the subspace contains a 2x2 block.
        self._adapter.cleared()

    @property
    def hidden_size(self) -> int:
        """The hidden size of the model that it was made for."""
        return output_size(self.config.variant, next(iter(self.layers.values()))[0].shape[0])

    @property
    def _adapter(self) -> Adapter:
        return Adapter(self.config.road, {f"layers.{i}": pair for i, pair in self.layers.items()})

    def cleared(self) -> "Intervention":
        """Returns the same function with θ = 0 and α = 1 outside of the config's subspace."""
        modules = self._adapter.cleared().modules
        return dataclasses.replace(self, layers={i: modules[f"layers.{i}"] for i in self.layers})

    def tensors(self) -> dict[str, Array]:
        """Returns all tensors by their keys in a file: ``layers.<index>.road_theta`` and ``.road_alpha``."""
        return self._adapter.tensors()

    def digest(self) -> str:
        """Returns a SHA-256 over what decides the function: positions, then what `Adapter.digest` covers."""
        return hashlib.sha256(f"{self.config.positions} {self._adapter.digest()}".encode()).hexdigest()


def position_mask(prompt_mask: ArrayLike, positions: str) -> NDArray[np.bool_]:
    """Returns which tokens an intervention rotates, whichever side the padding is on.

    Args:
        prompt_mask: int or bool ``[batch, length]``: nonzero at the tokens of the prompt, 0 at padding and at answers.
            Rows that contain several texts number them 1, 2, …, and each text has its own first and last tokens.
        positions: see `InterventionConfig`.

    Returns:
        bool ``[batch, length]``; for ``"all"`` it is true everywhere.

    Raises:
        AdapterError: ``positions`` isn't valid.

    Example:
        >>> position_mask([[0, 1, 1, 1], [1, 1, 0, 0]], "last").astype(int).tolist()
        [[0, 0, 0, 1], [0, 1, 0, 0]]
    """
    texts = np.asarray(prompt_mask).astype(np.int64)
    spans = InterventionConfig(layers=(0,), positions=positions).spans
    if spans is None:
        return np.ones(texts.shape, bool)
    first, last = spans
    mask = np.zeros(texts.shape, bool)
    for row, numbers in enumerate(texts):
        for text in set(numbers.tolist()) - {0}:
            places = np.flatnonzero(numbers == text)
            mask[row, places[:first]] = True
            mask[row, places[max(len(places) - last, 0) :]] = True
    return mask


def intervene(
    h: ArrayLike,
    theta: ArrayLike,
    alpha: ArrayLike,
    mask: ArrayLike,
    *,
    variant: str,
    group_size: int,
    subspace: Subspace = None,
) -> Float64:
    """Rotates a block's output at the tokens of a mask: ``h' = R h`` there, ``h' = h`` elsewhere.

    With α = 1 this is the distributed interchange intervention ``b + Rᵀ(R s − R b)`` whose source is ``s = R b``.
    Paper: section 4.3.

    Args:
        h: ``[..., length, hidden]``, any real dtype.
        theta: see `coefficients`.
        alpha: see `coefficients`.
        mask: bool ``[..., length]``, as returned by `position_mask`.
        variant: ``"road_1"``, ``"road_2"`` or ``"road_4"``.
        group_size: even; divides ``hidden``.
        subspace: see `coefficients`.

    Returns:
        A float64 array with the shape of ``h``.

    Raises:
        AdapterError: the sizes don't match.
    """
    h = np.asarray(h, np.float64)
    rotated = rotate(h, theta, alpha, variant=variant, group_size=group_size, subspace=subspace)
    return np.where(np.asarray(mask, bool)[..., None], rotated, h)


def write_intervention(directory: str | os.PathLike, intervention: Intervention, *, overwrite: bool = False) -> None:
    """Writes ``intervention_config.json`` and ``intervention.safetensors``, the same for both frameworks.

    Args:
        directory: a new or empty folder; with ``overwrite``, one whose two files are replaced.
        intervention: the intervention, which is written bit for bit.
        overwrite: see ``directory``.

    Raises:
        AdapterError: the folder already contains something.
    """
    metadata = {"format": "road-intervention", "road_digest": intervention.digest()}
    files = {
        _TENSORS: dump_tensors(intervention.tensors(), metadata),
        _CONFIG: dump_json(intervention.config.to_dict()),
    }
    write_files(directory, files, overwrite=overwrite)


def read_intervention(directory: str | os.PathLike) -> Intervention:
    """Reads what `write_intervention` wrote.

    Raises:
        AdapterError: a file is missing or broken, a field or key isn't one of the format's, a shape or value is wrong,
            or the digest doesn't match config and tensors.
    """
    config_path, tensors_path = inside(directory, _CONFIG), inside(directory, _TENSORS)
    try:
        config = InterventionConfig.from_dict(read_json(config_path))
    except AdapterError as error:
        raise AdapterError(f"{config_path}: {error}") from None
    tensors, metadata = read_tensors(tensors_path)
    expected = [f"layers.{i}.{name}" for i in config.layers for name in ("road_theta", "road_alpha")]
    if wrong := sorted(tensors.keys() ^ set(expected)):
        raise AdapterError(
            f"{tensors_path}: expected road_theta and road_alpha of layers.<index> for {list(config.layers)!s:.80}, "
            f"found a difference in {listed(wrong)}"
        )
    layers = {i: (tensors[f"layers.{i}.road_theta"], tensors[f"layers.{i}.road_alpha"]) for i in config.layers}
    try:
        intervention = Intervention(config, layers)
    except AdapterError as error:
        raise AdapterError(f"{tensors_path}: {error}") from None
    if metadata.get("road_digest") != (digest := intervention.digest()):
        raise AdapterError(
            f"{tensors_path}: expected the digest {str(metadata.get('road_digest'))[:12]} that was written with config "
            f"and tensors, found {digest[:12]}"
        )
    return intervention
