"""Which modules a config selects: PEFT's rules, over the names of any module tree."""

import difflib
from collections.abc import Collection, Sequence

import regex

from road_core._config import RoadConfig
from road_core._errors import AdapterError

ALL_LINEAR = "all-linear"

# Seconds for one pattern on one name.
PATIENCE = 2.0

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
        AdapterError: nothing matches, or the table has no row for ``model_type``.
    """
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
        selected = [n for n in names if n in chosen and not _excluded(config, n) and _in_layers(config, n)]
        return selected or _nothing(config, names)
    selected = [
        name
        for name in names
        if _matches(targets, name)
        and not _excluded(config, name)
        # PEFT asks for layer indices only where the targets are a list.
        and (isinstance(targets, str) or _in_layers(config, name))
    ]
    return selected or _nothing(config, names)


def _nothing(config: RoadConfig, names: Sequence[str]) -> list[str]:
    wanted = config.target_modules if isinstance(config.target_modules, list) else [str(config.target_modules)]
    ends = sorted({name.rsplit(".", 1)[-1] for name in names if name})
    near = [end for want in wanted for end in difflib.get_close_matches(want.rsplit(".", 1)[-1], ends, n=3, cutoff=0.4)]
    found = ", ".join(dict.fromkeys(near)) or ", ".join(ends[:12]) or "no modules at all"
    raise AdapterError(f"RoadConfig.target_modules: expected a match for {config.target_modules!r}, nearest: {found}")


def _matches(patterns: str | list[str], name: str) -> bool:
    if isinstance(patterns, str):
        return _fullmatch(patterns, name)
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _excluded(config: RoadConfig, name: str) -> bool:
    if config.exclude_modules and _matches(config.exclude_modules, name):
        return True
    # A module that is saved whole must not be rotated as well.
    return any(_fullmatch(rf"(.*\.)?{module}(\..*)?", name) for module in config.modules_to_save or ())


def _in_layers(config: RoadConfig, name: str) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    # The first numbered segment is the layer; later ones are experts and the like.
    searches = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns if p] if patterns else [r".*?\.[^.]*\.(\d+)\."]
    for search in searches:
        if found := _match(search, name):
            if found.re.groups != 1:
                raise AdapterError(f"RoadConfig.layers_pattern: expected a pattern without groups, found {patterns!r}")
            index = int(found[1])
            return index == wanted if isinstance(wanted, int) else index in wanted
    return False


def _fullmatch(pattern: str, name: str) -> bool:
    return _match(pattern, name, whole=True) is not None


def _match(pattern: str, name: str, *, whole: bool = False) -> regex.Match[str] | None:
    # A config may come from anyone, and some patterns take longer than anybody can wait.
    try:
        return (regex.fullmatch if whole else regex.match)(pattern, name, timeout=PATIENCE)
    except (regex.error, RecursionError) as error:
        raise AdapterError(f"RoadConfig: expected a regular expression, found {pattern!r:.80} ({error})") from None
    except TimeoutError:
        raise AdapterError(
            f"RoadConfig: expected a regular expression that is tried in {PATIENCE:g} s, found {pattern!r:.80}"
        ) from None
