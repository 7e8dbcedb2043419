"""`RoadConfig`: the config of an adapter, with PEFT's field names."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from road_core._errors import AdapterError

VARIANTS = ("road_1", "road_2", "road_4")

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# Fields that choose layers and that PEFT's own RoadConfig lacks.
NOT_IN_PEFT = ("exclude_modules", "layers_to_transform", "layers_pattern")

# All fields that choose layers.
TARGETS = ("target_modules", *NOT_IN_PEFT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoadConfig:
    """The config of a RoAd adapter: the variant of the rotation and the layers that it is applied to.

    Field names, defaults and meaning are those of PEFT's ``RoadConfig`` and of the target rules that PEFT's tuners
    share. A config checks itself when it is built.

    Raises:
        AdapterError: a field has a wrong type or value.

    Example:
        >>> RoadConfig(variant="road_2", target_modules=["q_proj", "v_proj"]).target_modules
        ['q_proj', 'v_proj']
    """

    # road_1 shares θ and α within a pair, road_2 has one of each per element, road_4 two of each.
    variant: str = "road_1"
    # Outputs are divided into groups of this size; element i is paired with i + group_size / 2. The paper uses 2.
    group_size: int = 64
    # True starts at the identity (θ = 0, α = 1); False draws θ ~ N(0, 0.5), α ~ N(1, 0.5), for tests.
    init_weights: bool = True
    # A list matches the ends of module paths, a string is a regular expression for whole paths, "all-linear" takes
    # every linear layer except the output head, None uses the table of model types.
    target_modules: str | list[str] | None = None
    # Modules that are taken out again, by the same rules.
    exclude_modules: str | list[str] | None = None
    # Modules that are trained whole and saved with the adapter.
    modules_to_save: list[str] | None = None
    # Only the layers with these indices; needs target_modules as a list.
    layers_to_transform: int | list[int] | None = None
    # The name before a layer's index, needed if the index isn't the first number in a path.
    layers_pattern: str | list[str] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None
    # The fractions (start, stop) of each layer's 2x2 blocks between which the adapter acts and is trained; None means
    # all blocks. Outside of them it is the identity, whatever θ and α are. PEFT doesn't know this field, so its files
    # contain θ = 0, α = 1 there.
    subspace: tuple[float, float] | None = None
    # Fields of a file that PEFT knows and this project doesn't; kept through a round trip.
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        if isinstance(self.modules_to_save, str):
            object.__setattr__(self, "modules_to_save", [self.modules_to_save])
        object.__setattr__(self, "layers_to_transform", _indices(self.layers_to_transform))
        object.__setattr__(self, "subspace", _fractions(self.subspace))
        object.__setattr__(self, "extra", dict(self.extra))

        if self.variant not in VARIANTS:
            raise AdapterError(f"RoadConfig.variant: expected one of {', '.join(VARIANTS)}, found {self.variant!r}")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int):
            raise AdapterError(f"RoadConfig.group_size: expected an integer, found {self.group_size!r}")
        if self.group_size < 2 or self.group_size % 2:
            raise AdapterError(f"RoadConfig.group_size: expected an even number from 2 up, found {self.group_size}")
        for name in ("init_weights", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise AdapterError(f"RoadConfig.{name}: expected true or false, found {getattr(self, name)!r}")
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                raise AdapterError(f"RoadConfig.{name}: expected text or nothing, found {getattr(self, name)!r}")
        if self.task_type is not None:
            # PEFT's TaskType is an enum of strings; files contain its plain value.
            task = getattr(self.task_type, "value", self.task_type)
            if task not in TASK_TYPES:
                raise AdapterError(f"RoadConfig.task_type: expected one of {', '.join(TASK_TYPES)}, found {task!r}")
            object.__setattr__(self, "task_type", str(task))
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise AdapterError(
                "RoadConfig.layers_to_transform: expected target_modules as a list beside it, "
                f"found the pattern {self.target_modules!r}"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise AdapterError("RoadConfig.layers_pattern: expected layers_to_transform beside it, found none")
        known = {field.name for field in dataclasses.fields(self)}
        if clash := sorted(known.intersection(self.extra)):
            raise AdapterError(f"RoadConfig.extra: expected names that are no fields, found {', '.join(clash)}")

    def __hash__(self) -> int:
        # Fields may be lists, for which the generated hash fails; but configs are static arguments of jitted functions.
        return hash(json.dumps(self.to_dict(), default=str))

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as in PEFT's ``adapter_config.json``, including ``peft_type``."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "extra"}
        # Written only when set, so that PEFT reads a plain file without a warning.
        for name in (*NOT_IN_PEFT, "subspace"):
            if fields[name] is None:
                del fields[name]
        return dict(sorted({**self.extra, **fields, "peft_type": "ROAD"}.items()))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "RoadConfig":
        """Builds a config from the fields of a file; unknown fields go to ``extra``.

        Raises:
            AdapterError: ``peft_type`` is given and isn't ``"ROAD"``, or a field is wrong.
        """
        if not isinstance(fields, Mapping):
            raise AdapterError(f"RoadConfig: expected a JSON object, found {type(fields).__name__}")
        kind = fields.get("peft_type", "ROAD")
        if getattr(kind, "value", kind) != "ROAD":
            raise AdapterError(f"RoadConfig.peft_type: expected 'ROAD', found {kind!r}")
        known = {field.name for field in dataclasses.fields(cls)} - {"extra"}
        extra = {name: value for name, value in fields.items() if name not in known and name != "peft_type"}
        return cls(**{name: value for name, value in fields.items() if name in known}, extra=extra)


def config_of_run(options: Mapping[str, Any]) -> RoadConfig:
    """Returns the config of the adapter that a run of road-train trains.

    Args:
        options: the fields of ``road_jax.train.TrainOptions``, also as stored in a run's ``options.json``.

    Raises:
        AdapterError: a field is wrong.
    """
    targets, base = options.get("target_modules"), options.get("base")
    return RoadConfig(
        variant=str(options.get("variant")),
        group_size=options.get("group_size"),  # type: ignore[arg-type]  # it checks itself
        target_modules="all-linear" if targets in (["all-linear"], ("all-linear",)) else targets,
        subspace=options.get("subspace"),
        modules_to_save=options.get("modules_to_save") or None,
        base_model_name_or_path=os.fspath(base) if isinstance(base, os.PathLike) else base,
        task_type="CAUSAL_LM",
    )


def _names(field: str, value: object) -> str | list[str] | None:
    """Returns text and None as they are, and any other collection of text as a list (a set in sorted order)."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Iterable) and not isinstance(value, Mapping | bytes):
        names = list(value)
        if all(isinstance(name, str) for name in names):
            return sorted(names) if isinstance(value, set | frozenset) else names
    raise AdapterError(f"RoadConfig.{field}: expected text or a list of text, found {value!r}")


def _indices(value: object) -> int | list[int] | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        indices = list(value)
        if all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
            return sorted(indices) if isinstance(value, set | frozenset) else indices
    raise AdapterError(f"RoadConfig.layers_to_transform: expected an integer or a list of them, found {value!r}")


def _fractions(value: object) -> tuple[float, float] | None:
    if value is None:
        return None
    numbers = list(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) else []
    if len(numbers) == 2 and all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        start, stop = map(float, numbers)
        if 0 <= start < stop <= 1:
            return start, stop
    raise AdapterError(
        f"RoadConfig.subspace: expected two fractions (start, stop) with 0 <= start < stop <= 1, found {value!r}"
    )
