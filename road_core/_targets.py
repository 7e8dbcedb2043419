"""Which modules a config selects: PEFT's rules, applied to the names of any module tree."""

import difflib
import functools
import math
import re
import time
from collections.abc import Collection, Sequence

import regex

from road_core._config import RoadConfig
from road_core._errors import AdapterError, listed

ALL_LINEAR = "all-linear"

# The seconds for all patterns of a config on all names, and the greatest product of a pattern's length and its counts,
# since `regex` writes counted parts out. A pattern of all modules' names is far shorter.
PATIENCE = 10.0
_LONGEST = 1 << 20

_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
# What `regex` interprets, but `re`, which PEFT uses, takes literally: fuzzy matches, POSIX classes.
_FOREIGN = re.compile(r"\{(?!\d*,?\d*\})|\[:\^?\w+:\]")
_PATH = re.compile(r"[\w.-]+")

_ATTENTION = ["q_proj", "v_proj"]

# What `target_modules=None` means: PEFT's table for RoAd (0.21.2), which is its table for LoRA.
MODEL_TARGETS: dict[str, list[str] | str] = {
    "RefinedWeb": ["query_key_value"],
    "RefinedWebModel": ["query_key_value"],
    "bart": _ATTENTION,
    "bert": ["query", "value"],
    "blip-2": ["q", "v", "q_proj", "v_proj"],
    "bloom": ["query_key_value"],
    "btlm": ["c_proj", "c_attn"],
    "chatglm": ["query_key_value"],
    "codegen": ["qkv_proj"],
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "electra": ["query", "value"],
    "falcon": ["query_key_value"],
    "gemma": _ATTENTION,
    "gemma2": _ATTENTION,
    "gemma3_text": _ATTENTION,
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt2": ["c_attn"],
    "gpt_bigcode": ["c_attn"],
    "gpt_neo": _ATTENTION,
    "gpt_neox": ["query_key_value"],
    "gptj": _ATTENTION,
    "layoutlm": ["query", "value"],
    "llama": _ATTENTION,
    "llama4": _ATTENTION,
    "mistral": _ATTENTION,
    "mixtral": _ATTENTION,
    "mpt": ["Wqkv"],
    "mt5": ["q", "v"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "opt": _ATTENTION,
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "qwen2": _ATTENTION,
    "qwen3": _ATTENTION,
    "roberta": ["query", "value"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
    "stablelm": _ATTENTION,
    "t5": ["q", "v"],
    "xlm-roberta": ["query", "value"],
}


def is_all_linear(targets: object) -> bool:
    """True for ``"all-linear"``, in whatever case, as in PEFT."""
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def select_modules(
    config: RoadConfig,
    names: Sequence[str],
    *,
    linear: Collection[str],
    output_head: Collection[str] = (),
    model_type: str | None = None,
) -> list[str]:
    """Returns the modules that a config targets, by PEFT's rules.

    Args:
        config: its ``target_modules``, ``exclude_modules``, ``modules_to_save``, ``layers_to_transform`` and
            ``layers_pattern`` are used.
        names: the paths of all modules, joined by dots. PEFT looks at modules of every kind, so pass all of them; a
            match that isn't a linear layer is then for the caller to refuse.
        linear: the modules that ``"all-linear"`` may take.
        output_head: the modules in ``linear`` that ``"all-linear"`` leaves out.
        model_type: the row of the table that is used for ``target_modules=None``.

    Returns:
        The selected paths, in the order of ``names``.

    Raises:
        AdapterError: nothing matches, the table has no row for ``model_type``, or a pattern is invalid, too large or
            too slow.
    """
    match = _Matcher()
    targets = config.target_modules
    all_linear = is_all_linear(targets)
    if targets is None:
        if model_type not in MODEL_TARGETS:
            raise AdapterError(
                "RoadConfig.target_modules: expected a choice of modules, or a model type of the table, "
                f"found neither (model type {model_type!r})"
            )
        targets = MODEL_TARGETS[model_type]
    if all_linear:
        head = set(output_head)
        selected = [name for name in names if name in linear and name not in head]
    else:
        selected = _matching("target_modules", targets, names, match)
    if not selected:
        raise _nothing(config, names)
    left = _not_excluded(config, selected, match)
    if not left:
        raise AdapterError(
            "RoadConfig.exclude_modules and modules_to_save: expected to leave some of what target_modules matches, "
            f"found none left of {listed(selected)}"
        )
    # PEFT uses layer indices only if the targets are a list, and turns "all-linear" into one.
    if not all_linear and not isinstance(targets, list):
        return left
    if not (chosen := _in_layers(config, left, match)):
        behind = f"{config.layers_pattern!r:.80}" if config.layers_pattern else "two other names or layers_pattern"
        raise AdapterError(
            f"RoadConfig.layers_to_transform: expected names with one of {config.layers_to_transform!r:.80} between "
            f"dots behind {behind}, as in model.blocks.0.mlp, among what target_modules matches, found {listed(left)}"
        )
    return chosen


def _nothing(config: RoadConfig, names: Sequence[str]) -> AdapterError:
    if is_all_linear(config.target_modules):
        return AdapterError(
            "RoadConfig.target_modules: expected a linear layer with an even number of outputs besides the head for "
            f"{config.target_modules!r}, found none"
        )
    wanted = config.target_modules if isinstance(config.target_modules, list) else [str(config.target_modules)]
    near: list[str] = []
    # Only a few short ones, because comparing is slow.
    for want in (want for want in wanted[:20] if len(want) < 200):
        # A path is compared whole. The dots of a regular expression don't separate names.
        parts = want.count(".") + 1 if _PATH.fullmatch(want) else 1
        end = want.split(".", want.count(".") + 1 - parts)[-1]
        near += difflib.get_close_matches(end, _ends(names, parts)[:500], n=3, cutoff=0.4)
    found = ", ".join(dict.fromkeys(near)) or ", ".join(_ends(names, 1)[:12]) or "no modules at all"
    kind = " as a regular expression of whole paths" if isinstance(config.target_modules, str) else ""
    return AdapterError(
        f"RoadConfig.target_modules: expected a match for {config.target_modules!r:.200}{kind}, nearest: {found}"
    )


def _ends(names: Sequence[str], parts: int) -> list[str]:
    """Returns the last ``parts`` parts of each name, without duplicates."""
    return sorted({".".join(name.split(".")[-parts:]) for name in names if name})


class _Matcher:
    """Tries a config's patterns, which may be hostile: each has a limited size, and all together a limited time."""

    def __init__(self) -> None:
        self._left = PATIENCE

    def __call__(
        self, field: str, pattern: str, names: Sequence[str], *, whole: bool = True
    ) -> dict[str, regex.Match[str]]:
        """Returns the names that match, in order, with their matches."""
        compiled = _compiled(field, pattern)
        start = time.thread_time()
        found = {}
        try:
            for name in names:
                left = self._left - (time.thread_time() - start)
                if left <= 0:
                    raise TimeoutError
                if match := (compiled.fullmatch if whole else compiled.match)(name, timeout=left):
                    found[name] = match
        except TimeoutError:
            raise AdapterError(
                f"RoadConfig.{field}: expected a regular expression that is tried in {PATIENCE:g} s, "
                f"found {pattern!r:.80}"
            ) from None
        finally:
            self._left -= time.thread_time() - start
        return found


@functools.lru_cache(maxsize=8)
def _compiled(field: str, pattern: str) -> regex.Pattern[str]:
    counts = [max(int(f"0{n[-18:]}") for n in count) for count in _COUNT.findall(pattern[: _LONGEST + 1])]
    if (size := len(pattern) * math.prod(max(1, count) for count in counts)) > _LONGEST:
        raise AdapterError(
            f"RoadConfig.{field}: expected a regular expression of {_LONGEST:,} characters at most, its counts written "
            f"out, found {size:.3g} in {pattern!r:.80}"
        )
    try:
        if foreign := _FOREIGN.search(pattern):
            raise ValueError(f"{foreign[0]!r} is no count or class")
        re.compile(pattern)
        return regex.compile(pattern, cache_pattern=False)
    except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
        raise AdapterError(
            f"RoadConfig.{field}: expected a regular expression, found {pattern!r:.80} ({error})"
        ) from None


def _matching(field: str, patterns: str | list[str], names: Sequence[str], match: _Matcher) -> list[str]:
    if isinstance(patterns, str):
        found = match(field, patterns, names)
        return [name for name in names if name in found]
    return [name for name in names if any(name == p or name.endswith(f".{p}") for p in patterns)]


def _not_excluded(config: RoadConfig, names: Sequence[str], match: _Matcher) -> list[str]:
    out = set(_matching("exclude_modules", config.exclude_modules, names, match)) if config.exclude_modules else set()
    # A module that is saved whole must not be rotated too.
    for module in config.modules_to_save or ():
        left = [name for name in names if name not in out]
        out.update(match("modules_to_save", rf"(.*\.)?{module}(\..*)?", left))
    return [name for name in names if name not in out]


def _in_layers(config: RoadConfig, names: Sequence[str], match: _Matcher) -> list[str]:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return list(names)
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    # The first numbered segment is the layer; later ones are experts and the like.
    searches = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns if p] if patterns else [r".*?\.[^.]*\.(\d+)\."]
    layers: dict[str, int] = {}
    for search in searches:
        left = [name for name in names if name not in layers]
        for name, found in match("layers_pattern", search, left, whole=False).items():
            if found.re.groups != 1:
                raise AdapterError(f"RoadConfig.layers_pattern: expected a pattern without groups, found {patterns!r}")
            # Python refuses to parse a number of thousands of digits.
            layers[name] = int(found[1]) if len(found[1]) < 19 else -1
    indices = [wanted] if isinstance(wanted, int) else wanted
    return [name for name in names if name in layers and layers[name] in indices]
