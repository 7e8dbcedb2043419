"""`InterventionModel`: RoAd on what whole decoder blocks give, another intervention for each row of a batch."""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from road_core import AdapterError, Intervention, InterventionConfig, read_intervention
from road_torch._bank import Bank
from road_torch._io import to_tensor
from road_torch._kernels import default
from road_torch._model import checkpoints
from road_torch._routing import BASE, LOCK


class InterventionModel(nn.Module):
    """A decoder whose blocks' outputs are rotated at chosen tokens: interventions that road_jax trained.

    The base is left as it is: hooks stand on its blocks while a call of this model runs, for the thread that makes it,
    and are gone when it ends, however it ends. So a call of the base itself is the base's. Its weights may be
    quantised, and it may be a `RoadModel`, whose active adapters then act too. A block's output keeps its dtype;
    coefficients are formed in float32 and rounded to it once.

    Args:
        base: a Hugging Face decoder, or a model that holds one.
        blocks: the path of the ``nn.ModuleList`` with its blocks; if not given, the one of as many modules as the
            config says that the model has hidden layers.

    Raises:
        AdapterError: there are no such blocks.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_hidden_layers=3)
        >>> model = InterventionModel(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)))
        >>> model.blocks
        'model.layers'
    """

    base_model: Any

    def __init__(self, base: nn.Module, *, blocks: str | None = None) -> None:
        super().__init__()
        self.base_model = base
        self.blocks = _find_blocks(base) if blocks is None else blocks
        try:
            found = base.get_submodule(self.blocks)
        except AttributeError:
            found = None
        if not isinstance(found, nn.ModuleList) or not len(found):
            raise AdapterError(f"blocks: expected the path of a ModuleList in the model, found {self.blocks!r}")
        self._interventions: dict[str, Intervention] = {}
        # Rows of the banks; 0 is the identity.
        self._rows: dict[str, int] = {}
        self._banks: dict[int, Bank] = {}
        self._active: str | None = None
        self.train(base.training)

    @classmethod
    def from_pretrained(
        cls,
        base: nn.Module,
        directory: str | os.PathLike,
        adapter_name: str = "default",
        *,
        blocks: str | None = None,
    ) -> "InterventionModel":
        """Returns a model with the intervention of a folder, active.

        Raises:
            AdapterError: the folder is broken, or is for another model.
        """
        model = cls(base, blocks=blocks)
        model.load_adapter(directory, adapter_name)
        return model

    @property
    def adapter_names(self) -> list[str]:
        """All interventions, in the order in which they came."""
        return list(self._interventions)

    @property
    def active_adapter(self) -> str | None:
        """The intervention that a plain call applies; None for none."""
        return self._active

    @property
    def configs(self) -> dict[str, InterventionConfig]:
        """The config of each intervention."""
        return {name: intervention.config for name, intervention in self._interventions.items()}

    def load_adapter(self, directory: str | os.PathLike, adapter_name: str) -> None:
        """Loads a folder of ``road_jax.save_intervention``; the first one becomes active.

        Raises:
            AdapterError: the name is taken, the folder is broken or is for another model; nothing has changed.
        """
        if not isinstance(adapter_name, str) or not adapter_name or adapter_name == BASE:
            raise AdapterError(f"adapter_name: expected a name other than {BASE!r}, found {adapter_name!r}")
        if adapter_name in self._interventions:
            raise AdapterError(f"adapter_name: expected a new name, found {adapter_name!r}, which is there already")
        intervention = read_intervention(directory)
        count, hidden = len(self.base_model.get_submodule(self.blocks)), _hidden_size(self.base_model)
        if intervention.config.layers[-1] >= count:
            raise AdapterError(
                f"{directory}: expected an intervention on the model's {count} blocks, "
                f"found one on block {intervention.config.layers[-1]}"
            )
        if hidden not in (None, intervention.hidden_size):
            raise AdapterError(
                f"{directory}: expected an intervention on hidden vectors of size {hidden}, "
                f"found one on {intervention.hidden_size}"
            )
        with LOCK:
            self._interventions[adapter_name] = intervention.cleared()
            self._rows[adapter_name] = next(
                row for row in range(1, len(self._rows) + 2) if row not in self._rows.values()
            )
            # Banks are made when a call looks at them.
            self._banks.clear()
            if len(self._interventions) == 1:
                self._active = adapter_name

    def set_adapter(self, adapter_name: str | None) -> None:
        """Makes an intervention the one that plain calls apply, or with None makes them the base's.

        Raises:
            AdapterError: the name is unknown.
        """
        self._check_known([] if adapter_name is None else [adapter_name])
        self._active = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an intervention. If it was active, none is.

        Raises:
            AdapterError: the name is unknown.
        """
        self._check_known([adapter_name])
        with LOCK:
            del self._interventions[adapter_name], self._rows[adapter_name]
            self._banks.clear()
            if self._active == adapter_name:
                self._active = None

    def forward(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Calls the base model.

        Args:
            *args: for the base model.
            adapter_names: for each row of the batch an intervention's name, or ``"__base__"`` for none; without them
                all rows get the active one.
            prompt_mask: int or bool ``[batch, places]``, nonzero at the prompt's tokens, of as many places as the
                cache's and the new tokens have together. If not given, the prompt is what ``attention_mask`` doesn't
                call padding, and with a cache that holds tokens already, new tokens are no part of it.
            **kwargs: for the base model.

        Raises:
            AdapterError: an unknown name, another number of names than of rows, or a mask of another shape.
        """
        if len(args) > 1:
            raise AdapterError(f"forward: expected all inputs but the first by name, found {len(args)} without one")
        if torch.is_grad_enabled() and self.training and checkpoints(self.base_model):
            raise AdapterError(
                "forward: expected a model without gradient checkpointing, found one that would compute its blocks a "
                "second time after the call"
            )
        mask = kwargs.get("attention_mask") if prompt_mask is None else prompt_mask
        with self._hooked(_Call(self, adapter_names, mask, marked=prompt_mask is not None)):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Calls the base model's ``generate``: what it is given is the prompt.

        Args:
            *args: for the base model.
            adapter_names: as in `forward`; beams and returned sequences follow their row.
            **kwargs: for the base model; with padding, an ``attention_mask`` is needed.

        Raises:
            AdapterError: as `forward`; or there are padding tokens and no ``attention_mask``.
        """
        named = ("inputs", "input_ids", "inputs_embeds")
        given = [value for value in (*args[:1], *(kwargs.get(name) for name in named)) if isinstance(value, Tensor)]
        mask = kwargs.get("attention_mask")
        if mask is None and given:
            if not given[0].is_floating_point() and bool((given[0] == self._pad_token(kwargs)).any()):
                raise AdapterError(
                    "generate: expected an attention_mask beside prompts with padding tokens, found none"
                )
            mask = torch.ones(given[0].shape[:2], dtype=torch.long, device=given[0].device)
        if mask is None:
            raise AdapterError("generate: expected input_ids, inputs_embeds or an attention_mask, found none of them")
        with self._hooked(_Call(self, adapter_names, mask, generates=True)):
            return self.base_model.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Looks in the base model for what isn't here: ``config``, ``device``, ``generation_config``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Before __init__ has run there is no base model to ask.
            if name == "base_model" or "base_model" not in self._modules:
                raise
            return getattr(self._modules["base_model"], name)

    @contextlib.contextmanager
    def _hooked(self, call: "_Call") -> Iterator[None]:
        """While it is open, the blocks' outputs are those of a call."""
        with contextlib.ExitStack() as stack:
            if call.used:
                blocks: Any = self.base_model.get_submodule(self.blocks)
                trunk = self.base_model.get_submodule(self.blocks.rpartition(".")[0])
                stack.callback(trunk.register_forward_pre_hook(call.begin, with_kwargs=True).remove)
                for i in sorted({i for name in call.used for i in self._interventions[name].layers}):
                    stack.callback(blocks[i].register_forward_hook(functools.partial(call.end, i)).remove)
            yield

    def _bank(self, layer: int, device: torch.device) -> Bank:
        """Returns the coefficients of a block, on its device."""
        with LOCK, torch.inference_mode(False):
            bank = self._banks.get(layer)
            if bank is None or bank.first.device != device:
                found = next(iter(self._interventions.values()))
                bank = self._banks[layer] = Bank(found.hidden_size, device)
                for name, intervention in self._interventions.items():
                    bank.reserve(self._rows[name])
                    if layer in intervention.layers:
                        theta, alpha = (to_tensor(array).to(device) for array in intervention.layers[layer])
                        config = intervention.config
                        form = functools.partial(
                            default.coefficients, theta, alpha, config.variant, config.group_size, config.subspace
                        )
                        bank.update(self._rows[name], [theta, alpha], form)
            return bank

    def _check_known(self, names: Sequence[str]) -> None:
        if unknown := [name for name in dict.fromkeys(names) if name not in self._interventions]:
            there = ", ".join(map(repr, self.adapter_names)) or "none"
            raise AdapterError(f"adapter: expected one of {there}, found {', '.join(map(repr, unknown))}")

    def _pad_token(self, kwargs: Mapping[str, Any]) -> int:
        """As transformers guesses which tokens are padding; -1 for none."""
        configs = (kwargs.get("generation_config"), getattr(self.base_model, "generation_config", None))
        tokens = [kwargs.get("pad_token_id"), *(getattr(config, "pad_token_id", None) for config in configs)]
        return next((token for token in tokens if token is not None), -1)


class _Call:
    """One call of a model: who gets which intervention, and where in their rows the tokens of the moment stand.

    Args:
        model: that is called.
        names: one a row; None for the active intervention on all rows.
        prompt: the mask that tells what the prompt is, ``[batch, places]``; None if all is.
        marked: whether the mask marks the prompt alone; what of another one stands behind the cache is no prompt.
        generates: whether more tokens follow those of the mask, and rows may be repeated for beams.
    """

    def __init__(
        self,
        model: InterventionModel,
        names: Sequence[str] | None,
        prompt: Any,
        *,
        marked: bool = False,
        generates: bool = False,
    ) -> None:
        if isinstance(names, str):
            raise AdapterError(f"adapter_names: expected a list with one name a row, found the text {names!r}")
        self._model = model
        self._plain = names is None
        self._names = [model.active_adapter or BASE] if names is None else list(names)
        self.used = [name for name in dict.fromkeys(self._names) if name != BASE]
        model._check_known(self.used)
        self._configs = {name: model._interventions[name].config for name in self.used}
        # How many first and last tokens each name wants: the base none of them, None all.
        self._spans = [self._configs[name].spans if name in self._configs else (0, 0) for name in self._names]
        self._by_prompt = any(config.spans is not None for config in self._configs.values())
        if prompt is not None and not (isinstance(prompt, Tensor) and prompt.ndim == 2) and self._by_prompt:
            found = list(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
            raise AdapterError(
                f"attention_mask: expected [batch, places], or a prompt_mask of that shape beside it, found {found}"
            )
        if generates and names is not None and len(prompt) != len(self._names):
            raise AdapterError(
                f"adapter_names: expected one name for each of {len(prompt)} rows, found {len(self._names)}"
            )
        self._prompt: Tensor | None = prompt
        self._marked, self._generates = marked, generates
        self._thread = threading.get_ident()
        # Tokens that the cache holds already.
        self._start = 0
        self._masks: dict[tuple[int, int, torch.device], Tensor | None] = {}
        self._tables: dict[tuple[int, int, torch.dtype], list[tuple[Tensor, Tensor, int]]] = {}

    def begin(self, trunk: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A hook before all blocks: notes how many tokens the cache holds."""
        if threading.get_ident() == self._thread:
            cache = kwargs.get("past_key_values")
            self._start = 0 if cache is None else int(cache.get_seq_length())
            self._masks.clear()

    def end(self, layer: int, block: nn.Module, args: Any, output: Any) -> Any:
        """A hook behind a block: returns what stands in place of its output."""
        if threading.get_ident() != self._thread:
            return None
        if isinstance(output, Tensor):
            return self._turn(layer, output)
        return (self._turn(layer, output[0]), *output[1:])

    def _turn(self, layer: int, h: Tensor) -> Tensor:
        """Rotates hidden states ``[rows, length, hidden]``."""
        rows, length = h.shape[:2]
        if not self._generates and not self._plain and rows != len(self._names):
            raise AdapterError(f"adapter_names: expected one name for each of {rows} rows, found {len(self._names)}")
        key = (rows, length, h.device)
        if key not in self._masks:
            self._masks[key] = self._mask(*key)
        mask = self._masks[key]
        if mask is None:
            return h
        turned = h
        for first, cross, group_size in self._coefficients(layer, h):
            turned = default.rotate(turned, first, cross, group_size)
        return torch.where(mask, turned, h)

    def _mask(self, rows: int, length: int, device: torch.device) -> Tensor | None:
        """Returns which tokens are touched, bool ``[rows or 1, length or 1, 1]``; None for none of them."""
        everywhere = self._each(torch.tensor([span is None for span in self._spans], device=device), rows)[:, None]
        if not self._by_prompt:
            # Those of "all" and the base alone.
            return everywhere[..., None]
        start, prompt = self._start, self._prompt
        if prompt is None:
            prompt = torch.ones(rows, start or length, dtype=torch.bool, device=device)
        elif not self._generates and prompt.shape[1] != start + length:
            raise AdapterError(
                f"{'prompt_mask' if self._marked else 'attention_mask'}: expected {start + length} places, those of "
                f"the cache and of the new tokens, found shape {list(prompt.shape)}"
            )
        elif start and not self._marked and not self._generates:
            prompt = prompt[:, :start]
        if start >= prompt.shape[1] and None not in self._spans:
            return None
        there = prompt.to(device) != 0
        before = there.cumsum(1)
        behind = there.sum(1, keepdim=True) - before
        there, before, behind = (self._repeat(value, rows) for value in (there, before, behind))
        first, last = (
            self._each(torch.tensor([span[i] if span else 0 for span in self._spans], device=device), rows)[:, None]
            for i in (0, 1)
        )
        touched = (there & ((before <= first) | (behind < last)))[:, start : start + length]
        return (nn.functional.pad(touched, (0, length - touched.shape[1])) | everywhere)[..., None]

    def _coefficients(self, layer: int, h: Tensor) -> list[tuple[Tensor, Tensor, int]]:
        """Returns the rotations of a block, gathered by row: one for each group size among the interventions."""
        key = (layer, len(h), h.dtype)
        if key not in self._tables:
            bank = self._model._bank(layer, h.device)
            if bank.first.shape[1] != h.shape[-1]:
                raise AdapterError(
                    f"{self._model.blocks}.{layer}: expected hidden vectors of size {bank.first.shape[1]}, "
                    f"found {h.shape[-1]}"
                )
            sizes = {name: config.group_size for name, config in self._configs.items() if layer in config.layers}
            tables = self._tables[key] = []
            for size in dict.fromkeys(sizes.values()):
                rows = [self._model._rows[name] if sizes.get(name) == size else 0 for name in self._names]
                index = self._each(torch.tensor(rows, device=h.device), len(h))
                first, cross = (table[index].to(h.dtype)[:, None] for table in (bank.first, bank.cross))
                tables.append((first, cross, size))
        return self._tables[key]

    def _each(self, values: Tensor, rows: int) -> Tensor:
        """Returns the names' values for so many rows; a plain call's one stays one."""
        return values if self._plain else self._repeat(values, rows)

    def _repeat(self, values: Tensor, rows: int) -> Tensor:
        """Repeats what each row of the batch has for its beams or returned sequences."""
        repeats, rest = divmod(rows, len(values))
        if rest or not repeats:
            raise AdapterError(
                f"adapter_names: expected a multiple of {len(values)} rows, of the names and the mask, found {rows}"
            )
        return values if repeats == 1 else values.repeat_interleave(repeats, 0)


def _find_blocks(base: nn.Module) -> str:
    config = _text_config(base)
    if getattr(config, "is_encoder_decoder", False):
        raise AdapterError(f"InterventionModel: expected a decoder alone, found {type(base).__name__}")
    count = getattr(config, "num_hidden_layers", None)
    lists = [
        path for path, module in base.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    # Lists within blocks, of experts for instance, may be as long.
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise AdapterError(
            f"InterventionModel: expected one ModuleList of {count} blocks in {type(base).__name__}, "
            f"found {', '.join(outer) or 'none'}; say by blocks=… which it is"
        )
    return outer[0]


def _text_config(base: Any) -> Any:
    config: Any = getattr(base, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _hidden_size(base: nn.Module) -> int | None:
    return getattr(_text_config(base), "hidden_size", None)
