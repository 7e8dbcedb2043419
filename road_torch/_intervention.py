"""`InterventionModel`: RoAd on the outputs of decoder blocks, with an intervention for each row of a batch."""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from road_core import AdapterError, Intervention, InterventionConfig, read_intervention
from road_torch._bank import Bank
from road_torch._call import of_base
from road_torch._checkpoint import checkpointing
from road_torch._io import to_tensor
from road_torch._kernels import default
from road_torch._routing import BASE, HOOKED, LOCK, check_known, check_name


class InterventionModel(nn.Module):
    """A decoder whose blocks' outputs are rotated at chosen tokens, by interventions that road_jax trained.

    The base is not changed: its blocks get another ``forward`` only while a call of this model runs, which acts only in
    the calling thread, and get their own back even if the call fails. So calls of the base itself are unaffected. The
    base may be quantised, or a `RoadModel`, whose active adapters then apply too. A block's output keeps its dtype;
    coefficients are formed in float32 and rounded to it once.

    With ``torch.compile``, of this model or of the base, the same graph serves any choice of interventions. An
    intervention that is loaded later needs a new graph only if it has a block or a group size that no other had.

    Args:
        base: a Hugging Face decoder, or a model that contains one.
        blocks: path of the ``nn.ModuleList`` of blocks. If None, it is the one whose length is the config's number of
            hidden layers.

    Raises:
        AdapterError: the blocks aren't found, or the base is an `InterventionModel`.

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
        if isinstance(base, InterventionModel):
            raise AdapterError("base: expected a decoder, found an InterventionModel, which can load more itself")
        self.base_model = base
        self.blocks = _find_blocks(base) if blocks is None else blocks
        try:
            found = base.get_submodule(self.blocks)
        except AttributeError:
            found = None
        if not isinstance(found, nn.ModuleList) or not len(found):
            raise AdapterError(f"blocks: expected the path of a ModuleList in the model, found {self.blocks!r}")
        self._interventions: dict[str, Intervention] = {}
        # Rows of the banks; row 0 is the identity.
        self._rows: dict[str, int] = {}
        self._banks: dict[int, Bank] = {}
        self._active: str | None = None
        # Running calls.
        self._calls: list[_Call] = []
        self.train(base.training)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        *,
        blocks: str | None = None,
    ) -> "InterventionModel":
        """Wraps a model and loads an intervention from a folder as the active one.

        Raises:
            AdapterError: the folder is broken, or its intervention is for another model.
        """
        intervened = cls(model, blocks=blocks)
        intervened.load_adapter(model_id, adapter_name)
        return intervened

    @property
    def adapter_names(self) -> list[str]:
        """All interventions, in the order in which they were loaded."""
        return list(self._interventions)

    @property
    def active_adapter(self) -> str | None:
        """The intervention that a call without ``adapter_names`` applies; None if there is none."""
        return self._active

    @property
    def configs(self) -> dict[str, InterventionConfig]:
        """The config of each intervention."""
        return {name: intervention.config for name, intervention in self._interventions.items()}

    def load_adapter(self, model_id: str | os.PathLike, adapter_name: str = "default") -> None:
        """Loads an intervention from a folder of ``road_jax.save_intervention``; the model's first becomes active.

        Raises:
            AdapterError: the name is taken or invalid, the folder is broken, or its intervention is for another model;
                nothing is changed.
        """
        check_name(adapter_name, self._interventions)
        intervention = read_intervention(model_id)
        # Only now, so that calls of other threads don't wait for the file.
        with LOCK:
            check_name(adapter_name, self._interventions)
            self._check_fits(intervention, model_id)
            self._interventions[adapter_name] = intervention.cleared()
            self._rows[adapter_name] = next(
                row for row in range(1, len(self._rows) + 2) if row not in self._rows.values()
            )
            for layer, bank in self._banks.items():
                self._write(bank, layer, adapter_name)
            if len(self._interventions) == 1:
                self._active = adapter_name

    def set_adapter(self, adapter_name: str | None) -> None:
        """Activates an intervention for calls without ``adapter_names``; with None they apply none.

        Raises:
            AdapterError: the name is unknown.
        """
        check_known([] if adapter_name is None else [adapter_name], self._interventions)
        self._active = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an intervention.

        Raises:
            AdapterError: the name is unknown, the intervention is active (``set_adapter(None)`` deactivates it), or a
                running call uses it; nothing is changed.
        """
        with LOCK:
            check_known([adapter_name], self._interventions)
            if any(adapter_name in call.used for call in self._calls):
                raise AdapterError(
                    f"delete_adapter: expected an intervention that no call uses, found {adapter_name!r}"
                )
            if adapter_name == self._active:
                raise AdapterError(
                    f"delete_adapter: expected an intervention that is not active, found {adapter_name!r}"
                )
            row = self._rows.pop(adapter_name)
            del self._interventions[adapter_name]
            for bank in self._banks.values():
                bank.clear(row)
            if not self._interventions:
                # The next intervention may have another hidden size.
                self._banks.clear()

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block, calls without ``adapter_names`` apply no intervention."""
        before = self._active
        self._active = None
        try:
            yield
        finally:
            self._active = before

    def get_base_model(self) -> nn.Module:
        """Returns the base model, which has not been changed."""
        return self.base_model

    # Blocks learn from tensors what each row gets, so a compiled graph must not contain this function.
    @torch.compiler.disable(recursive=False)
    def forward(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Calls the base model.

        Args:
            *args: passed to the base model.
            adapter_names: an intervention's name for each row of the batch, ``"__base__"`` for none. If None, all rows
                get the active intervention.
            prompt_mask: int or bool ``[batch, places]``, nonzero at the prompt's tokens. It covers the tokens in the
                cache and the new ones. If None, the prompt consists of the tokens that ``attention_mask`` doesn't mark
                as padding; if the cache already holds tokens, new tokens don't belong to it.
            **kwargs: passed to the base model.

        Raises:
            AdapterError: a name is unknown, the number of names differs from that of the rows, or a mask has another
                shape.
        """
        with self._open(adapter_names, prompt_mask, args, kwargs):
            return self.base_model(*args, **kwargs)

    @torch.compiler.disable
    def _open(
        self,
        adapter_names: Sequence[str] | None,
        prompt_mask: Tensor | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> "_Call":
        if len(args) > 1:
            raise AdapterError(f"forward: expected all inputs but the first by name, found {len(args)} without one")
        if torch.is_grad_enabled() and self.training and checkpointing(self.base_model):
            raise AdapterError(
                "forward: expected a model without gradient checkpointing, found one that would compute its blocks a "
                "second time after the call"
            )
        mask = kwargs.get("attention_mask") if prompt_mask is None else prompt_mask
        call = _Call(self, adapter_names, mask, marked=prompt_mask is not None)
        call.begin(args, kwargs)
        return call

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Calls the base model's ``generate``; its input is the prompt.

        Args:
            *args: passed to the base model.
            adapter_names: as in `forward`; beams and returned sequences get the intervention of their row.
            **kwargs: passed to the base model; ``attention_mask`` is required if there are padding tokens.

        Raises:
            AdapterError: as in `forward`; or there are padding tokens, but no ``attention_mask``.
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
        with _Call(self, adapter_names, mask, prompts=len(given[0] if given else mask)):
            return self.base_model.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Looks up missing attributes in the base model: ``config``, ``device``, ``generation_config``, …."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # There is no base model before __init__ has run, and accelerate's hooks on the base are not this model's.
            if name in ("base_model", *HOOKED) or "base_model" not in self._modules:
                raise
            return of_base(self._modules["base_model"], name)

    def _bank(self, layer: int, device: torch.device) -> Bank:
        """Returns a block's table of coefficients on a device."""
        with LOCK:
            bank = self._banks.get(layer)
            if bank is None or bank.first.device != device:
                bank = Bank(next(iter(self._interventions.values())).hidden_size, device)
                for name in self._interventions:
                    self._write(bank, layer, name)
                self._banks[layer] = bank
            return bank

    def _write(self, bank: Bank, layer: int, name: str) -> None:
        """Writes an intervention's coefficients for a block into its bank; other blocks keep the identity."""
        intervention, row = self._interventions[name], self._rows[name]
        bank.reserve(row)
        if layer in intervention.layers:
            with torch.inference_mode(False):
                theta, alpha = (to_tensor(array).to(bank.first.device) for array in intervention.layers[layer])
            config = intervention.config
            form = functools.partial(
                default.coefficients, theta, alpha, config.variant, config.group_size, config.subspace
            )
            bank.update(row, [theta, alpha], form)
            bank.forget(row)

    def _check_fits(self, intervention: Intervention, model_id: str | os.PathLike) -> None:
        count, hidden = len(self.base_model.get_submodule(self.blocks)), _hidden_size(self.base_model)
        if hidden is None:
            hidden = next((each.hidden_size for each in self._interventions.values()), None)
        if intervention.config.layers[-1] >= count:
            raise AdapterError(
                f"{model_id}: expected an intervention on the model's {count} blocks, "
                f"found one on block {intervention.config.layers[-1]}"
            )
        if hidden not in (None, intervention.hidden_size):
            raise AdapterError(
                f"{model_id}: expected an intervention on hidden vectors of size {hidden}, "
                f"found one on {intervention.hidden_size}"
            )

    def _pad_token(self, kwargs: Mapping[str, Any]) -> int:
        """Returns the padding token as transformers chooses it; -1 for none."""
        configs = (kwargs.get("generation_config"), getattr(self.base_model, "generation_config", None))
        tokens = [kwargs.get("pad_token_id"), *(getattr(config, "pad_token_id", None) for config in configs)]
        return next((token for token in tokens if token is not None), -1)


class _Call:
    """One call of a model: which intervention each row gets, and which of the current tokens it touches.

    Args:
        model: the model that is called.
        names: one name for each row; None for the active intervention on all rows.
        prompt: mask of the prompt, ``[batch, places]``; None if all tokens belong to it.
        marked: whether the mask is a ``prompt_mask``. In an attention mask, places behind the cached tokens don't
            belong to the prompt.
        prompts: the number of prompts of a generation, in which more tokens follow those of the mask and rows may be
            repeated for beams; None for other calls.
    """

    def __init__(
        self,
        model: InterventionModel,
        names: Sequence[str] | None,
        prompt: Any,
        *,
        marked: bool = False,
        prompts: int | None = None,
    ) -> None:
        if isinstance(names, str):
            raise AdapterError(f"adapter_names: expected a list with one name a row, found the text {names!r}")
        self._model = model
        self._plain = names is None
        self._names = [model.active_adapter or BASE] if names is None else list(names)
        if wrong := [name for name in self._names if not isinstance(name, str)]:
            raise AdapterError(f"adapter_names: expected a name for each row, found {wrong[0]!r}")
        self.used = [name for name in dict.fromkeys(self._names) if name != BASE]
        check_known(self.used, model._interventions)
        self._configs = {name: model._interventions[name].config for name in self.used}
        # How many first and last tokens each name touches: (0, 0) for the base, None for all tokens.
        self._spans = [self._configs[name].spans if name in self._configs else (0, 0) for name in self._names]
        self._by_prompt = any(config.spans is not None for config in self._configs.values())
        self._what = "prompt_mask" if marked else "attention_mask"
        if not (marked or self._by_prompt):
            # An attention mask may have any form if no intervention depends on it.
            prompt = None
        if prompt is not None and not (isinstance(prompt, Tensor) and prompt.ndim == 2):
            found = list(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
            other = "" if marked else ", or a prompt_mask of that shape beside it"
            raise AdapterError(f"{self._what}: expected [batch, places]{other}, found {found}")
        self._prompt: Tensor | None = prompt
        self._marked, self._generates = marked, prompts is not None
        if prompts is not None:
            self._check_rows(prompts)
        blocks: Any = model.base_model.get_submodule(model.blocks)
        self.trunk = model.base_model.get_submodule(model.blocks.rpartition(".")[0])
        # Blocks and group sizes of all loaded interventions, so that a compiled graph doesn't depend on these rows.
        loaded = list(model._interventions.values()) if self.used or not self._plain else []
        self._sizes = sorted({intervention.config.group_size for intervention in loaded})
        self._blocks = {layer: blocks[layer] for layer in sorted({i for each in loaded for i in each.layers})}
        # What blocks read in the current step: touched tokens, bool [rows, length, 1]; whether it is certain that there
        # are none; and for each group size the banks' row of each row.
        self._touched, self._idle, self._steps = torch.empty(0), True, list[tuple[int, Tensor]]()
        self._masks: dict[tuple[int, int, int], tuple[Tensor, bool]] = {}
        self._tables: dict[tuple[int, int, torch.dtype, torch.device], list[tuple[Tensor, Tensor, int]]] = {}

    @torch.compiler.disable
    def __enter__(self) -> None:
        with LOCK:
            self._model._calls.append(self)
        self._before, LOCAL.call = LOCAL.call, self
        for layer, block in self._blocks.items():
            _patch(block, functools.partial(_turning, self.trunk, layer))
        if self._blocks and self._generates:
            _patch(self.trunk, functools.partial(_counting, self.trunk))

    @torch.compiler.disable
    def __exit__(self, *error: object) -> None:
        LOCAL.call = self._before
        for block in self._blocks.values():
            _restore(block)
        if self._blocks and self._generates:
            _restore(self.trunk)
        with LOCK:
            self._model._calls.remove(self)

    @torch.compiler.disable
    def begin(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Prepares a step from the arguments of the model, before its blocks are called."""
        if self._plain and not self._blocks:
            return
        given = (*args[:1], kwargs.get("inputs_embeds"), kwargs.get("input_ids"))
        new = next((value for value in given if isinstance(value, Tensor)), None)
        if new is None:
            raise AdapterError("forward: expected input_ids or inputs_embeds, found neither")
        rows, length = new.shape[:2]
        # Its name since transformers 5.24, and before.
        cache = next((kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None), None)
        start = 0 if cache is None else int(cache.get_seq_length())
        if not self._generates:
            self._check_rows(rows)
            self._check_places(start + length)
        # Generated tokens don't extend the prompt: all places behind it are alike.
        place = start if self._prompt is None else min(start, self._prompt.shape[1])
        key = (rows, length, place if self._by_prompt else 0)
        if key not in self._masks:
            self._masks[key] = self._mask(rows, length, start, new.device)
        self._touched, self._idle = self._masks[key]
        if not self._steps or len(self._steps[0][1]) != rows:
            self._steps = [(size, self._index(self._configs, size, rows, new.device)) for size in self._sizes]
        for layer in self._blocks:
            if layer not in self._model._banks:
                self._model._bank(layer, new.device)

    def _check_rows(self, rows: int) -> None:
        if not self._plain and rows != len(self._names):
            raise AdapterError(f"adapter_names: expected one name for each of {rows} rows, found {len(self._names)}")
        if self._prompt is not None and rows != len(self._prompt):
            raise AdapterError(
                f"{self._what}: expected {rows} rows, those of the batch, found shape {list(self._prompt.shape)}"
            )

    def _check_places(self, places: int) -> None:
        if self._prompt is not None and places != self._prompt.shape[1]:
            raise AdapterError(
                f"{self._what}: expected {places} places, those of the cache and of the new tokens, "
                f"found shape {list(self._prompt.shape)}"
            )

    def end(self, layer: int, output: Any) -> Any:
        """Returns a block's output, rotated where the call touches it."""
        # The block may be patched for another model's call on this base, in another thread.
        if not torch.compiler.is_compiling() and (self._idle or layer not in self._blocks):
            return output
        if isinstance(output, Tensor):
            return self._turn(layer, output)
        return (self._turn(layer, output[0]), *output[1:])

    def _turn(self, layer: int, h: Tensor) -> Tensor:
        """Rotates hidden states ``[rows, length, hidden]``."""
        if h.shape[:2] != self._touched.shape[:2]:
            raise AdapterError(
                f"{self._model.blocks}.{layer}: expected hidden vectors of {list(self._touched.shape[:2])} tokens, "
                f"found shape {list(h.shape)}"
            )
        turned = h
        if torch.compiler.is_compiling():
            bank = self._model._banks[layer]
            first, cross = bank.first.to(h.device), bank.cross.to(h.device)
            for size, index in self._steps:
                turned = default.rotate(turned, first, cross, size, index.to(h.device))
        else:
            for first, cross, size in self._coefficients(layer, h):
                turned = default.rotate(turned, first, cross, size)
        return torch.where(self._touched.to(h.device), turned, h)

    def _mask(self, rows: int, length: int, start: int, device: torch.device) -> tuple[Tensor, bool]:
        """Returns which tokens are touched, bool ``[rows, length, 1]``, and whether it is certain that none are."""
        spans = self._spans
        everywhere = self._repeat(torch.tensor([span is None for span in spans], device=device), rows)[:, None]
        touched = torch.zeros(rows, length, dtype=torch.bool, device=device)
        if not self._by_prompt:
            # There are only interventions on all tokens, and the base.
            return (touched | everywhere)[..., None], None not in spans
        prompt = self._prompt
        if prompt is None:
            prompt = torch.ones(rows, start or length, dtype=torch.bool, device=device)
        elif start and not self._marked and not self._generates:
            prompt = prompt[:, :start]
        if start < prompt.shape[1]:
            there = prompt.to(device) != 0
            before = there.cumsum(1)
            behind = there.sum(1, keepdim=True) - before
            there, before, behind = (self._repeat(value, rows) for value in (there, before, behind))
            first, last = (
                self._repeat(torch.tensor([span[i] if span else 0 for span in spans], device=device), rows)[:, None]
                for i in (0, 1)
            )
            chosen = (there & ((before <= first) | (behind < last)))[:, start : start + length]
            touched[:, : chosen.shape[1]] = chosen
        return (touched | everywhere)[..., None], start >= prompt.shape[1] and None not in spans

    def _coefficients(self, layer: int, h: Tensor) -> list[tuple[Tensor, Tensor, int]]:
        """Returns a block's rotations, gathered by row: one for each group size of the interventions."""
        key = (layer, len(h), h.dtype, h.device)
        if key not in self._tables:
            bank = self._model._bank(layer, h.device)
            if bank.first.shape[1] != h.shape[-1]:
                raise AdapterError(
                    f"{self._model.blocks}.{layer}: expected hidden vectors of size {bank.first.shape[1]}, "
                    f"found {h.shape[-1]}"
                )
            here = {name: config for name, config in self._configs.items() if layer in config.layers}
            tables = self._tables[key] = []
            for size in dict.fromkeys(config.group_size for config in here.values()):
                index = self._index(here, size, len(h), h.device)
                first, cross = (table[index].to(h.dtype)[:, None] for table in (bank.first, bank.cross))
                tables.append((first, cross, size))
        return self._tables[key]

    def _index(self, configs: Mapping[str, InterventionConfig], size: int, rows: int, device: torch.device) -> Tensor:
        """Returns the banks' row for each row of the batch, int64 ``[rows]``; 0 for other group sizes."""
        mine = {name: self._model._rows[name] for name, config in configs.items() if config.group_size == size}
        return self._repeat(torch.tensor([mine.get(name, 0) for name in self._names], device=device), rows)

    def _repeat(self, values: Tensor, rows: int) -> Tensor:
        """Repeats each row's values for its beams or returned sequences."""
        repeats, rest = divmod(rows, len(values))
        if rest or not repeats:
            raise AdapterError(
                f"adapter_names: expected a multiple of {len(values)} rows, of the names and the mask, found {rows}"
            )
        return values if repeats == 1 else values.repeat_interleave(repeats, 0)


class _Local(threading.local):
    """The current call of a thread. Compiled graphs read it too."""

    def __init__(self) -> None:
        self.call: _Call | None = None


LOCAL = _Local()

# By patched module: the number of running calls, and the ``forward`` that it had as an instance attribute.
_PATCHED: dict[nn.Module, tuple[int, Any]] = {}


# Modules get a `forward` and no hooks, because torch.compile would reuse a graph of the base in spite of new hooks.
def _patch(module: nn.Module, wrap: Callable[[Callable], Callable]) -> None:
    """Gives a module another ``forward``, until every call that patched it has restored it."""
    with LOCK:
        calls, own = _PATCHED.get(module, (0, module.__dict__.get("forward")))
        if not calls:
            module.__dict__["forward"] = wrap(module.forward)
        _PATCHED[module] = calls + 1, own


def _restore(module: nn.Module) -> None:
    with LOCK:
        calls, own = _PATCHED.pop(module)
        if calls > 1:
            _PATCHED[module] = calls - 1, own
        elif own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _turning(trunk: nn.Module, layer: int, inner: Callable) -> Callable:
    """Returns a block's ``forward`` that rotates the output in the thread that called an `InterventionModel`."""

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        output, call = inner(*args, **kwargs), LOCAL.call
        return output if call is None or call.trunk is not trunk else call.end(layer, output)

    return forward


def _counting(trunk: nn.Module, inner: Callable) -> Callable:
    """Returns a ``forward`` for the module that holds the blocks, which prepares each step of a generation."""

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        call = LOCAL.call
        if call is not None and call.trunk is trunk:
            call.begin(args, kwargs)
        return inner(*args, **kwargs)

    return forward


def _find_blocks(base: nn.Module) -> str:
    config = _text_config(base)
    if getattr(config, "is_encoder_decoder", False):
        raise AdapterError(f"InterventionModel: expected a decoder alone, found {type(base).__name__}")
    count = getattr(config, "num_hidden_layers", None)
    lists = [
        path for path, module in base.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    # Lists within blocks, of experts for instance, may have the same length.
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
