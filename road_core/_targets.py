"""Which modules a config selects: PEFT's rules, over the names of any module tree."""

import difflib
import functools
import math
import re
import time
from collections.abc import Collection, Sequence

import regex

from road_core._config import RoadConfig
from road_core._errors import AdapterError

ALL_LINEAR = "all-linear"

# Seconds for all patterns of a config on all names, and what a pattern's length and counts may give when multiplied:
# `regex` writes counted parts out. A pattern of all modules' names is far shorter.
PATIENCE = 10.0
_LONGEST = 1 << 20

_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
# What `regex` reads and `re`, by which PEFT goes, takes for plain characters: fuzzy matches, POSIX classes.
_FOREIGN = re.compile(r"\{(?!\d*,?\d*\})|\[:\^?\w+:\]")

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
            ``layers_pattern`` decide.
        names: the paths of all modules, joined by dots. PEFT looks at modules of every kind, so do the same: a
            match that isn't a linear layer is then the caller's to refuse.
        linear: those of them that ``"all-linear"`` may take.
        output_head: those of ``linear`` that ``"all-linear"`` leaves out.
        model_type: the row of the table that ``target_modules=None`` asks.

    Returns:
        The selected paths, in the order of ``names``.

    Raises:
        AdapterError: nothing matches, the table has no row for ``model_type``, or a pattern isn't one, is too large or
            takes too long.
    """
    match = _Matcher()
    targets = config.target_modules
    if targets is None:
        if model_type not in MODEL_TARGETS:
            raise AdapterError(
                "RoadConfig.target_modules: expected a choice of modules, or a model type of the table, "
                f"found neither (model type {model_type!r})"
            )
        targets = MODEL_TARGETS[model_type]
    elif isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        head = set(output_head)
        targets = [name for name in names if name in linear and name not in head]
        chosen = set(targets)
        selected = [
            n for n in names if n in chosen and not _excluded(config, n, match) and _in_layers(config, n, match)
        ]
        return selected or _nothing(config, names)
    selected = [
        name
        for name in names
        if _matches("target_modules", targets, name, match)
        and not _excluded(config, name, match)
        # PEFT asks for layer indices only where the targets are a list.
        and (isinstance(targets, str) or _in_layers(config, name, match))
    ]
    return selected or _nothing(config, names)


def _nothing(config: RoadConfig, names: Sequence[str]) -> list[str]:
    wanted = config.target_modules if isinstance(config.target_modules, list) else [str(config.target_modules)]
    ends = sorted({name.rsplit(".", 1)[-1] for name in names if name})
    # Few and short ones: comparing takes long.
    tried = [want.rsplit(".", 1)[-1] for want in wanted[:20] if len(want) < 200]
    near = [end for want in tried for end in difflib.get_close_matches(want, ends[:500], n=3, cutoff=0.4)]
    found = ", ".join(dict.fromkeys(near)) or ", ".join(ends[:12]) or "no modules at all"
    raise AdapterError(
        f"RoadConfig.target_modules: expected a match for {config.target_modules!r:.200}, nearest: {found}"
    )


class _Matcher:
    """Tries a config's patterns. It may come from anyone: each has a limited size, and all together a limited time."""

    def __init__(self) -> None:
        self._left = PATIENCE

    def __call__(self, field: str, pattern: str, name: str, *, whole: bool = True) -> regex.Match[str] | None:
        compiled = _compiled(field, pattern)
        start = time.thread_time()
        try:
            if self._left <= 0:
                raise TimeoutError
            return (compiled.fullmatch if whole else compiled.match)(name, timeout=self._left)
        except TimeoutError:
            raise AdapterError(
                f"RoadConfig.{field}: expected a regular expression that is tried in {PATIENCE:g} s, "
                f"found {pattern!r:.80}"
            ) from None
        finally:
            self._left -= time.thread_time() - start


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


def _matches(field: str, patterns: str | list[str], name: str, match: _Matcher) -> bool:
    if isinstance(patterns, str):
        return match(field, patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _excluded(config: RoadConfig, name: str, match: _Matcher) -> bool:
    if config.exclude_modules and _matches("exclude_modules", config.exclude_modules, name, match):
        return True
    # A module that is saved whole must not be rotated as well.
    return any(match("modules_to_save", rf"(.*\.)?{module}(\..*)?", name) for module in config.modules_to_save or ())


def _in_layers(config: RoadConfig, name: str, match: _Matcher) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    # The first numbered segment is the layer; later ones are experts and the like.
    searches = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns if p] if patterns else [r".*?\.[^.]*\.(\d+)\."]
    for search in searches:
        if found := match("layers_pattern", search, name, whole=False):
            if found.re.groups != 1:
                raise AdapterError(f"RoadConfig.layers_pattern: expected a pattern without groups, found {patterns!r}")
            # Python refuses to read a number of thousands of digits.
            index = int(found[1]) if len(found[1]) < 19 else -1
            return index == wanted if isinstance(wanted, int) else index in wanted
    return False
