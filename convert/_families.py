"""The conversion tables: Flax path ⇄ PyTorch path, one table per model family."""

import dataclasses
import functools
import re

from road_core import AdapterError

# Stands for a layer's number. A Flax path without it is that of a stack, whose tensors have a layer axis in front.
LAYER = "{layer}"

_NUMBER = re.compile(r"(?<=[._])(0|[1-9][0-9]{0,5})(?=\.)")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A tensor of a module that is saved whole.

    Attributes:
        flax: the tensor's name in Flax.
        torch: the tensor's name in PyTorch.
        axes: the number of its axes, without a stack's layer axis.
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

    Rows that share a path are parts of one fused module, in the order of the rows; each of them has a ``width``.

    Attributes:
        flax: the module's path in Flax, with `LAYER` for a layer's number.
        torch: the module's path in PyTorch.
        leaves: the tensors that may be saved whole.
        linear: whether the module may have θ and α.
        interleaved: whether Flax has a head's outputs in RoPE's interleaved order (x0, y0, x1, y1, …) where PyTorch has
            them in halves (x0, x1, …, y0, y1, …).
        width: for a part, its number of outputs: ``"heads"``, ``"kv_heads"``, or ``"equal"`` if all parts have the
            same.
        bias_apart: whether Flax adds the bias outside of the layer, after the rotation, while PyTorch rotates it too.
    """

    flax: str
    torch: str
    leaves: tuple[Leaf, ...] = LINEAR
    linear: bool = True
    interleaved: bool = False
    width: str | None = None
    bias_apart: bool = False


@dataclasses.dataclass(frozen=True)
class Place:
    """A path's place in a table.

    Attributes:
        rows: the row that matches the path, or the rows of a fused module's parts.
        layer: the layer's number; None for a stack and for a module outside the layers.
        stacked: whether the path is that of a stack.
    """

    rows: tuple[Row, ...]
    layer: int | None
    stacked: bool = False

    @property
    def row(self) -> Row:
        """The row, or that of the first part."""
        return self.rows[0]


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family's table for one style of Flax models.

    Attributes:
        name: the ``model_type`` of the family's checkpoints, with a suffix if there are several tables for it.
        rows: the table's rows; no two of them match the same path, unless they are parts of a fused module.
        head: the PyTorch path of the output head, which "all-linear" leaves out.
        style: whose Flax models it is for, see `LAYOUTS`.
        axis: the layer axis in a stack's params.
        asked: whether the table is used only if it is requested by name.
        partial: whether the PyTorch model has further linear layers, which a config's names may match too.
    """

    name: str
    rows: tuple[Row, ...]
    head: str = "lm_head"
    style: str = "road"
    axis: int = 0
    asked: bool = False
    partial: bool = False

    @property
    def model_type(self) -> str:
        """The ``model_type``; a table's name may have more after a hyphen."""
        return self.name.partition("-")[0]

    def find_flax(self, path: str) -> Place | None:
        """Returns the place of a Flax module path, or None."""
        if path in self._by_stack:
            return Place(self._by_stack[path], None, stacked=True)
        return _find(self._by_flax, path)

    def find_torch(self, path: str) -> Place | None:
        """Returns the place of a PyTorch module path, or None."""
        return _find(self._by_torch, path)

    def parts(self, row: Row, side: str) -> tuple[Row, ...]:
        """Returns the rows that share the row's path on a side, ``"flax"`` or ``"torch"``; usually the row alone."""
        return (self._by_flax if side == "flax" else self._by_torch)[getattr(row, side)]

    @functools.cached_property
    def _by_flax(self) -> dict[str, tuple[Row, ...]]:
        return _index(self.name, [(row.flax, row) for row in self.rows])

    @functools.cached_property
    def _by_stack(self) -> dict[str, tuple[Row, ...]]:
        return _index(self.name, [(unnumbered(row.flax), row) for row in self.rows if LAYER in row.flax])

    @functools.cached_property
    def _by_torch(self) -> dict[str, tuple[Row, ...]]:
        return _index(self.name, [(row.torch, row) for row in self.rows])


def unnumbered(path: str) -> str:
    """Returns a stack's path: without the layer's number, be it separate (``layers.0``) or not (``layers_0``)."""
    return path.replace(f".{LAYER}", "").replace(f"_{LAYER}", "")


def _find(index: dict[str, tuple[Row, ...]], path: str) -> Place | None:
    form, layer = _form(path)
    rows = index.get(form)
    return None if rows is None else Place(rows, layer)


# Many adapters of one model have the same paths, and every table looks them up.
@functools.lru_cache(maxsize=1 << 14)
def _form(path: str) -> tuple[str, int | None]:
    """Returns a path with a placeholder in place of the layer's number, and the number."""
    number = _NUMBER.search(path)
    if LAYER in path:  # a literal placeholder matches nothing
        return "", None
    return (f"{path[: number.start()]}{LAYER}{path[number.end() :]}", int(number[0])) if number else (path, None)


def _index(family: str, entries: list[tuple[str, Row]]) -> dict[str, tuple[Row, ...]]:
    index: dict[str, tuple[Row, ...]] = {}
    for path, row in entries:
        index[path] = (*index.get(path, ()), row)
    if any(len(rows) > 1 and not all(row.width for row in rows) for rows in index.values()):
        raise ValueError(f"family {family}: two rows of the table match one path")
    return index


# The style of the Flax models, and whether their layers are stacked.
LAYOUTS = {
    "scanned": ("road", True),
    "unrolled": ("road", False),
    "transformers": ("transformers", False),
    "easydel": ("easydel", False),
    "tunix": ("tunix", False),
    "maxtext": ("maxtext", True),
    "maxtext-unrolled": ("maxtext", False),
}


def _same(path: str, leaves: tuple[Leaf, ...] = LINEAR) -> Row:
    """Returns the row of a module that has the same path on both sides."""
    return Row(path, path, leaves, linear=leaves is LINEAR)


def _linears(flax: str, torch: str, names: dict[str, str] | str) -> tuple[Row, ...]:
    """Returns rows of linear layers below two prefixes, by their names; a string has names that both sides share."""
    pairs = names if isinstance(names, dict) else {name: name for name in names.split()}
    return tuple(Row(f"{flax}.{ours}", f"{torch}.{theirs}") for ours, theirs in pairs.items())


# road_jax.models mirrors Hugging Face's names. So may other models, which these tables serve too.

_BLOCK = f"model.layers.{LAYER}"
_ATTENTION = _linears(f"{_BLOCK}.self_attn", f"{_BLOCK}.self_attn", "q_proj k_proj v_proj o_proj")
_MLP = _linears(f"{_BLOCK}.mlp", f"{_BLOCK}.mlp", "gate_proj up_proj down_proj")
_FUSED = tuple(
    _same(f"{_BLOCK}.{name}")
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
)


def _decoder(layers: tuple[Row, ...], norm: tuple[Leaf, ...] = NORM, *norms: str) -> tuple[Row, ...]:
    """Returns a decoder's rows, with the same paths on both sides; ``norms`` are those beyond the two of each layer."""
    return (
        _same("model.embed_tokens", EMBEDDING),
        *layers,
        *(_same(f"{_BLOCK}.{name}", norm) for name in ("input_layernorm", "post_attention_layernorm", *norms)),
        _same("model.norm", norm),
        _same("lm_head"),
    )


_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_GEMMA_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_LAYERS = _ATTENTION + _MLP
# Of a mixture of experts, the router is no linear layer, nor are the experts, which transformers 5 holds in one tensor.
_EXPERTS = (Row(f"{_BLOCK}.mlp.gate", f"{_BLOCK}.mlp.gate", (Leaf("weight", "weight", 2),), linear=False),)
_SHARED_EXPERT = (
    *_linears(f"{_BLOCK}.mlp.shared_expert", f"{_BLOCK}.mlp.shared_expert", "gate_proj up_proj down_proj"),
    _same(f"{_BLOCK}.mlp.shared_expert_gate"),
)

# Phi-3's fused layers, for a Flax model that keeps them separate.
_PHI3_APART = (
    *(
        Row(f"{_BLOCK}.self_attn.{name}_proj", f"{_BLOCK}.self_attn.qkv_proj", (), width=width)
        for name, width in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))
    ),
    _same(f"{_BLOCK}.self_attn.o_proj"),
    *(Row(f"{_BLOCK}.mlp.{n}_proj", f"{_BLOCK}.mlp.gate_up_proj", (), width="equal") for n in ("gate", "up")),
    _same(f"{_BLOCK}.mlp.down_proj"),
)


def _mirrored(style: str, norm: tuple[Leaf, ...]) -> tuple[Family, ...]:
    return (
        Family("llama", _decoder(_LAYERS, norm), style=style),
        Family("mistral", _decoder(_LAYERS, norm), style=style),
        Family("qwen2", _decoder(_LAYERS, norm), style=style),
        Family("qwen3", _decoder(_LAYERS, norm, *_HEAD_NORMS), style=style),
        Family("gemma2", _decoder(_LAYERS, norm, *_GEMMA_NORMS), style=style),
        Family("gemma3_text", _decoder(_LAYERS, norm, *_HEAD_NORMS, *_GEMMA_NORMS), style=style),
        Family("phi3", _decoder(_FUSED, norm), style=style),
    )


# The Linen models of transformers 4 (read from the models of 4.48.3, see tests/convert/test_families.py). Their layers
# are numbered. GPT-2's FlaxConv1D keeps its kernel as [out, in], PyTorch's Conv1D its weight as [in, out].

_SCALE = (Leaf("scale", "weight", 1), Leaf("bias", "bias", 1))


def _norms(*paths: str, torch: dict[str, str] | None = None) -> tuple[Row, ...]:
    return tuple(Row(path, (torch or {}).get(path, path), _SCALE, linear=False) for path in paths)


_GPT2 = f"transformer.h.{LAYER}"


def _bert(name: str, heads: tuple[Row, ...]) -> Family:
    layer = f"{name}.encoder.layer.{LAYER}"
    return Family(
        name,
        (
            *(_same(f"{name}.embeddings.{kind}_embeddings", EMBEDDING) for kind in ("word", "position", "token_type")),
            *_linears(f"{layer}.attention.self", f"{layer}.attention.self", "query key value"),
            *_linears(layer, layer, "attention.output.dense intermediate.dense output.dense"),
            *_norms(f"{name}.embeddings.LayerNorm", f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"),
            _same(f"{name}.pooler.dense"),
            *heads,
        ),
        head="cls.predictions.decoder" if name == "bert" else "lm_head.decoder",
        style="transformers",
    )


def _t5(stack: str, attentions: str, mlp: int) -> tuple[Row, ...]:
    block = f"{stack}.block.{LAYER}.layer"
    return (
        *(row for a in attentions.split() for row in _linears(f"{block}.{a}", f"{block}.{a}", "q k v o")),
        *_linears(f"{block}.{mlp}.DenseReluDense", f"{block}.{mlp}.DenseReluDense", "wi wi_0 wi_1 wo"),
        *(_same(f"{block}.{i}.layer_norm", NORM) for i in range(mlp + 1)),
        _same(f"{block}.0.SelfAttention.relative_attention_bias", EMBEDDING),
        _same(f"{stack}.final_layer_norm", NORM),
    )


def _vit(layer: str, attention: str, names: dict[str, str]) -> tuple[Row, ...]:
    """``layer`` and ``attention`` are PyTorch's prefixes, ``names`` maps Flax's names of linear layers to PyTorch's."""
    flax = f"vit.encoder.layer.{LAYER}"
    return (
        *_linears(
            f"{flax}.attention.attention", f"{layer}.{attention}", {n: names[n] for n in ("query", "key", "value")}
        ),
        *_linears(flax, layer, {n: names[n] for n in ("attention.output.dense", "intermediate.dense", "output.dense")}),
        *(Row(f"{flax}.layernorm_{at}", f"{layer}.layernorm_{at}", _SCALE, linear=False) for at in ("before", "after")),
        *_norms("vit.layernorm"),
        _same("classifier"),
    )


def _clip(tower: str) -> tuple[Row, ...]:
    layer = f"{tower}.encoder.layers.{LAYER}"
    return (
        *_linears(f"{layer}.self_attn", f"{layer}.self_attn", "q_proj k_proj v_proj out_proj"),
        *_linears(f"{layer}.mlp", f"{layer}.mlp", "fc1 fc2"),
        *_norms(f"{layer}.layer_norm1", f"{layer}.layer_norm2"),
    )


_OPT = f"model.decoder.layers.{LAYER}"

_TRANSFORMERS = (
    *_mirrored("transformers", NORM)[:2],
    Family("gemma", _decoder(_LAYERS), style="transformers"),
    Family(
        "gpt2",
        (
            _same("transformer.wte", EMBEDDING),
            _same("transformer.wpe", EMBEDDING),
            *_linears(_GPT2, _GPT2, "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
            *_norms(f"{_GPT2}.ln_1", f"{_GPT2}.ln_2", "transformer.ln_f"),
            _same("lm_head"),
        ),
        style="transformers",
    ),
    Family(
        "opt",
        (
            _same("model.decoder.embed_tokens", EMBEDDING),
            _same("model.decoder.embed_positions", EMBEDDING),
            _same("model.decoder.project_in"),
            _same("model.decoder.project_out"),
            *_linears(f"{_OPT}.self_attn", f"{_OPT}.self_attn", "q_proj k_proj v_proj out_proj"),
            *_linears(_OPT, _OPT, "fc1 fc2"),
            *_norms(f"{_OPT}.self_attn_layer_norm", f"{_OPT}.final_layer_norm", "model.decoder.final_layer_norm"),
            _same("lm_head"),
        ),
        style="transformers",
    ),
    Family(
        "t5",
        (
            _same("shared", EMBEDDING),
            *_t5("encoder", "0.SelfAttention", 1),
            *_t5("decoder", "0.SelfAttention 1.EncDecAttention", 2),
            _same("lm_head"),
        ),
        style="transformers",
    ),
    _bert(
        "bert",
        (_same("cls.predictions.transform.dense"), *_norms("cls.predictions.transform.LayerNorm"), _same("classifier")),
    ),
    _bert(
        "roberta",
        (
            _same("lm_head.dense"),
            *_norms("lm_head.layer_norm"),
            _same("classifier.dense"),
            _same("classifier.out_proj"),
        ),
    ),
    Family(
        "vit",
        _vit(
            f"vit.layers.{LAYER}",
            "attention",
            {
                "query": "q_proj",
                "key": "k_proj",
                "value": "v_proj",
                "attention.output.dense": "attention.o_proj",
                "intermediate.dense": "mlp.fc1",
                "output.dense": "mlp.fc2",
            },
        ),
        head="classifier",
        style="transformers",
    ),
    # The same model with the names that transformers 4 gives it in PyTorch.
    Family(
        "vit-4",
        _vit(
            f"vit.encoder.layer.{LAYER}",
            "attention.attention",
            {n: n for n in ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")},
        ),
        head="classifier",
        style="transformers",
        asked=True,
    ),
    Family(
        "clip",
        (
            *_clip("text_model"),
            *_clip("vision_model"),
            _same("text_model.embeddings.token_embedding", EMBEDDING),
            _same("text_model.embeddings.position_embedding", EMBEDDING),
            _same("vision_model.embeddings.position_embedding", EMBEDDING),
            *_norms("text_model.final_layer_norm", "vision_model.pre_layrnorm", "vision_model.post_layernorm"),
            _same("text_projection"),
            _same("visual_projection"),
        ),
        head="",
        style="transformers",
    ),
)

# tunix (models/llama3, qwen2, qwen3, gemma3 of 0.1.7, tested in tests_published/test_convert.py). Attention layers are
# Einsums with a `w` of [embed, heads, head_dim], and θ is for the flattened outputs. RoPE is in halves, as in PyTorch.

_TUNIX = f"layers.{LAYER}"


def _tunix(attention: tuple[Row, ...]) -> tuple[Row, ...]:
    return (
        *attention,
        *_linears(f"{_TUNIX}.mlp", f"{_BLOCK}.mlp", "gate_proj up_proj down_proj"),
        Row("lm_head", "lm_head", (Leaf("w", "weight", 2, transposed=True),)),
    )


_TUNIX_SEPARATE = tuple(Row(f"{_TUNIX}.attn.{name}_proj", f"{_BLOCK}.self_attn.{name}_proj", ()) for name in "qkvo")
_TUNIX_QWEN2 = (*(dataclasses.replace(row, bias_apart=True) for row in _TUNIX_SEPARATE[:3]), _TUNIX_SEPARATE[3])
# With as many key heads as query heads, one Einsum computes all three; with fewer, one computes keys and values.
_TUNIX_GEMMA = (
    *(Row(f"{_TUNIX}.attn.qkv_einsum", f"{_BLOCK}.self_attn.{name}_proj", (), width="equal") for name in "qkv"),
    Row(f"{_TUNIX}.attn.attn_vec_einsum", f"{_BLOCK}.self_attn.o_proj", ()),
)
_TUNIX_GEMMA_GROUPED = (
    Row(f"{_TUNIX}.attn.q_einsum", f"{_BLOCK}.self_attn.q_proj", ()),
    *(Row(f"{_TUNIX}.attn.kv_einsum", f"{_BLOCK}.self_attn.{name}_proj", (), width="equal") for name in "kv"),
    Row(f"{_TUNIX}.attn.attn_vec_einsum", f"{_BLOCK}.self_attn.o_proj", ()),
)

# MaxText (0.2.4). Stacks have their layers on axis 1. Llama 3.1's q and k are in RoPE's interleaved order, Qwen3's in
# halves.

_MAXTEXT = f"decoder.layers_{LAYER}"


def _maxtext(*, interleaved: bool) -> tuple[Row, ...]:
    attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    return (
        Row("token_embedder", "model.embed_tokens", EMBEDDING, linear=False),
        *(
            Row(
                f"{_MAXTEXT}.self_attention.{ours}",
                f"{_BLOCK}.self_attn.{theirs}",
                (),
                interleaved=interleaved and ours in ("query", "key"),
            )
            for ours, theirs in attention.items()
        ),
        *_linears(f"{_MAXTEXT}.mlp", f"{_BLOCK}.mlp", {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}),
        Row("decoder.logits_dense", "lm_head"),
    )


_KERNEL = (Leaf("kernel", "weight", 1),)


def _with_vision(name: str, rows: tuple[Row, ...]) -> Family:
    """Returns the table of a model with vision, whose language model has these rows."""

    def inner(path: str) -> str:
        return re.sub(r"^model\.", "model.language_model.", path)

    inside = tuple(dataclasses.replace(row, flax=inner(row.flax), torch=inner(row.torch)) for row in rows)
    return Family(name, inside, partial=True)


TABLES = (
    *_mirrored("road", NORM),
    Family("phi3-apart", _decoder(_PHI3_APART), asked=True),
    Family("gemma", _decoder(_LAYERS)),
    Family("smollm3", _decoder(_LAYERS)),
    *(Family(name, _decoder(_LAYERS, NORM, *_HEAD_NORMS, _GEMMA_NORMS[1])) for name in ("olmo2", "olmo3")),
    *(Family(name, _decoder(_LAYERS)) for name in ("granite", "ministral3")),
    # In transformers 4 each expert has linear layers of its own.
    Family("mixtral", _decoder(_ATTENTION + _EXPERTS), partial=True),
    Family("qwen2_moe", _decoder(_ATTENTION + _EXPERTS + _SHARED_EXPERT), partial=True),
    Family("qwen3_moe", _decoder(_ATTENTION + _EXPERTS, NORM, *_HEAD_NORMS), partial=True),
    Family("olmoe", _decoder(_ATTENTION + _EXPERTS, NORM, *_HEAD_NORMS), partial=True),
    _with_vision("gemma3", _decoder(_LAYERS, NORM, *_HEAD_NORMS, *_GEMMA_NORMS)),
    _with_vision("mistral3", _decoder(_LAYERS)),
    *_TRANSFORMERS,
    *_mirrored("easydel", _KERNEL),
    *(Family(name, _tunix(_TUNIX_SEPARATE), style="tunix") for name in ("llama", "qwen3")),
    Family("qwen2", _tunix(_TUNIX_QWEN2), style="tunix"),
    Family("gemma3_text", _tunix(_TUNIX_GEMMA_GROUPED), style="tunix"),
    Family("gemma3_text-fused", _tunix(_TUNIX_GEMMA), style="tunix"),
    Family("llama", _maxtext(interleaved=True), style="maxtext", axis=1),
    Family("qwen3", _maxtext(interleaved=False), style="maxtext", axis=1),
)

# In the order in which they are tried.
FAMILIES = tuple(dict.fromkeys(table.name for table in TABLES))


def tables(name: str | None = None, style: str | None = None) -> list[Family]:
    """Returns the tables of a family, of a style, or of both; None matches any.

    Raises:
        AdapterError: there is none.
    """
    if name is not None and name not in FAMILIES:
        raise AdapterError(f"family: expected one of {', '.join(FAMILIES)}, found {name!r}")
    found = [table for table in TABLES if name in (None, table.name) and style in (None, table.style)]
    if not found:
        styles = ", ".join(layout for layout, (s, _) in LAYOUTS.items() if any(t.style == s for t in tables(name)))
        raise AdapterError(f"layout: expected one that has a table of the family {name} ({styles}), found {style!r}")
    return found
