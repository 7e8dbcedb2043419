"""Layers whose first axis isn't the batch's rows: refused in a mixed batch, where rows would get others' adapters."""

import pytest
import torch
import transformers
from _compare import assert_close
from torch import nn

from road_torch import AdapterError, RoadConfig, RoadModel

IDS = torch.randint(5, 60, (4, 8), generator=torch.Generator().manual_seed(0))
TEXT = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
PAIR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
SWIN = {"patch_size": 4, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 2}
NO_TIMM = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def swin():
    return transformers.SwinConfig(image_size=64, out_features=["stage1", "stage2", "stage3", "stage4"], **SWIN)


def masks():
    return {
        "backbone_config": swin(),
        "hidden_dim": 32,
        "encoder_feedforward_dim": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_attention_heads": 2,
        "dim_feedforward": 32,
        "num_queries": 8,
        "num_labels": 3,
    }


def longformer():
    config = transformers.LongformerConfig(attention_window=4, max_position_embeddings=64, **TEXT)
    seen = torch.ones(4, 8, dtype=torch.long)
    first = torch.zeros_like(seen).index_fill(1, torch.tensor([0]), 1)
    return transformers.LongformerModel(config), {
        "input_ids": IDS,
        "attention_mask": seen,
        "global_attention_mask": first,
    }


def led():
    config = transformers.LEDConfig(
        vocab_size=128,
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        **PAIR,
    )
    return transformers.LEDModel(config), {**longformer()[1], "decoder_input_ids": IDS}


def xlnet():
    config = transformers.XLNetConfig(vocab_size=128, d_model=32, n_layer=1, n_head=2, d_inner=64)
    return transformers.XLNetModel(config), {"input_ids": IDS}


def fsmt():
    config = transformers.FSMTConfig(langs=["a", "b"], src_vocab_size=128, tgt_vocab_size=128, **PAIR)
    return transformers.FSMTModel(config), {"input_ids": IDS, "decoder_input_ids": IDS}


def bros():
    config = transformers.BrosConfig(**{**TEXT, "hidden_size": 64})
    boxes = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": IDS, "bbox": boxes, "attention_mask": torch.ones(4, 8, dtype=torch.long)}
    return transformers.BrosSpadeEEForTokenClassification(config), inputs


def bridgetower():
    text, vision = {**TEXT, "hidden_size": 64}, {"hidden_size": 64, "patch_size": 32, "image_size": 64}
    config = transformers.BridgeTowerConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        text_config=text,
        vision_config={**vision, "num_hidden_layers": 1},
    )
    return transformers.BridgeTowerModel(config), {"input_ids": IDS, "pixel_values": IMAGES}


def mask2former():
    config = transformers.Mask2FormerConfig(feature_size=32, mask_feature_size=32, **masks())
    return transformers.Mask2FormerForUniversalSegmentation(config), {"pixel_values": IMAGES}


def oneformer():
    text = {"width": 32, "num_layers": 1, "vocab_size": 64, "context_length": 8, "n_ctx": 4}
    config = transformers.OneFormerConfig(
        mask_dim=32, conv_dim=32, task_seq_len=8, **{f"text_encoder_{key}": v for key, v in text.items()}, **masks()
    )
    return transformers.OneFormerForUniversalSegmentation(config), {"pixel_values": IMAGES, "task_inputs": IDS.float()}


def dab_detr():
    stages = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage2"]}
    sizes = {**PAIR, "decoder_layers": 4, "hidden_size": 32, "num_queries": 8}
    del sizes["d_model"]
    config = transformers.DabDetrConfig(backbone_config=transformers.ResNetConfig(**stages), **NO_TIMM, **sizes)
    return transformers.DabDetrForObjectDetection(config), {"pixel_values": IMAGES}


@torch.no_grad()
def outputs(model, paths, inputs):
    """What each layer gives at its first call."""
    given = {path: [] for path in paths}
    layers = [(model.get_submodule(path), path) for path in paths]
    hooks = [
        m.register_forward_hook(lambda *call, path=path: given[path].append(call[2].clone())) for m, path in layers
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return {path: calls[0] for path, calls in given.items()}


def adapted(base, target):
    model = RoadModel(base)
    for name in "ab":
        torch.manual_seed(ord(name))
        model.add_adapter(
            name, RoadConfig(target_modules=target, group_size=2, init_weights=False, inference_mode=True)
        )
    return model.eval()


LAYERS = {
    longformer: {
        "encoder.layer.0.attention.self.query": "LongformerSelfAttention",
        "encoder.layer.0.attention.self.value_global": "LongformerSelfAttention",
    },
    led: {"encoder.layers.0.self_attn.longformer_self_attn.key": "LEDEncoderSelfAttention"},
    xlnet: {"layer.0.ff.layer_1": "XLNetFeedForward", "layer.0.ff.layer_2": "XLNetFeedForward"},
    fsmt: {"encoder.layers.0.self_attn.q_proj": "FSMTEncoder", "decoder.layers.0.fc2": "FSMTDecoder"},
    bros: {
        "bros.bbox_embeddings.bbox_projection": "BrosBboxEmbeddings",
        "subsequent_token_classifier.query": "BrosRelationExtractor",
        "initial_token_classifier.1": "BrosSpadeEEForTokenClassification",
    },
    bridgetower: {"vision_model.visual.transformer.resblocks.0.mlp.c_fc": "BridgeTowerTransformer"},
    mask2former: {"model.transformer_module.decoder.layers.0.fc1": "Mask2FormerMaskedAttentionDecoderLayer"},
    oneformer: {
        "model.transformer_module.decoder.layers.0.ffn.linear1": "OneFormerTransformerDecoderFFNLayer",
        "model.transformer_module.decoder.query_transformer.decoder.layers.0.linear2": (
            "OneFormerTransformerDecoderQueryTransformerDecoderLayer"
        ),
    },
    dab_detr: {"bbox_predictor.layers.0": "DabDetrForObjectDetection"},
}


@pytest.mark.parametrize("build", LAYERS)
def test_layers_of_transformers_with_another_axis_first(build):
    torch.manual_seed(0)
    base, inputs = build()
    base.eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.ndim > 1 and "backbone" not in name:
                parameter.normal_(std=0.2)
    # A row of the batch moves more than its share of the layer's.
    other = dict(inputs)
    for key in ("input_ids", "decoder_input_ids", "pixel_values", "bbox"):
        if key in inputs:
            other[key] = inputs[key].clone()
            other[key][0] = inputs[key][0].flip(-1)
    before, after = (outputs(base, LAYERS[build], given) for given in (inputs, other))
    for path, owner in LAYERS[build].items():
        moved = (before[path] != after[path]).flatten(1).any(1).nonzero()
        assert int(moved.max()) >= len(before[path]) / 4, "the batch is the first axis: there is no need to refuse it"
        model = adapted(base, f".*{path.replace('.', '[.]')}")
        with pytest.raises(AdapterError, match=f"{path}: expected a layer that sees .* in order .* in {owner}, which"):
            model(**inputs, adapter_names=["a", "__base__", "b", "a"])
        base = model.unload()


def test_other_layers_of_such_a_model_are_mixed():
    base, inputs = longformer()
    model = adapted(base, ["output.dense"])
    names = ["a", "__base__", "b", "a"]
    with torch.no_grad():
        mixed, plain = (model(**inputs, adapter_names=given)[0] for given in (names, ["__base__"] * 4))
        for row, name in enumerate(names):
            model.set_adapter([] if name == "__base__" else name)
            assert_close(mixed[row], model(**inputs)[0][row], "float32")
    assert not torch.allclose(mixed[0], plain[0], atol=1e-2)


def test_a_saved_module_of_such_a_model():
    base, inputs = xlnet()
    model = adapted(base, ["layer_2"])
    model.add_adapter("c", RoadConfig(target_modules=["layer_2"], modules_to_save=["layer_1"], group_size=2))
    with pytest.raises(AdapterError, match=r"layer_1: expected a module that sees .* in order .* XLNetFeedForward"):
        model(**inputs, adapter_names=["a", "c", "b", "a"])


PATCHES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION = r".*vision_(tower|model).*(q_proj|fc1)"
PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def llava(target=VISION):
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=16, patch_size=8, **PATCHES),
        text_config=transformers.LlamaConfig(num_key_value_heads=2, **TEXT),
        image_token_index=99,
        image_seq_length=4,
        vision_feature_select_strategy="default",
    )
    return adapted(transformers.LlavaForConditionalGeneration(config).eval(), target)


def with_images(*numbers):
    """Rows of tokens, each with so many images of four tokens."""
    ids = IDS.repeat(1, 2)[: len(numbers)].clone()
    for row, number in zip(ids, numbers, strict=True):
        for i in range(number):
            row[5 * i : 5 * i + 4] = 99
    return ids


@torch.no_grad()
def check_rows(model, names, **inputs):
    mixed = model(**inputs, adapter_names=names).logits
    for row, name in enumerate(names):
        model.set_adapter(name)
        assert_close(mixed[row], model(**inputs).logits[row], "float32")


@pytest.mark.parametrize("numbers", [(2, 0), (3, 1), (0, 2)])
def test_images_of_which_rows_have_different_numbers(numbers):
    model, pixels = llava(), PIXELS[: sum(numbers)]
    found = ", ".join(str(4 * number) for number in numbers)
    for call in (model, model.generate):
        with pytest.raises(AdapterError, match=rf"vision_tower\..*: expected as much of pixel_values .* found {found}"):
            call(input_ids=with_images(*numbers), pixel_values=pixels, adapter_names=["a", "b"])
    with pytest.raises(AdapterError, match=rf"found {found} image tokens"):
        model(with_images(*numbers), pixels, adapter_names=["a", "b"])
    # Layers that are given the text see its rows, and rows with the same adapters have the same layers.
    check_rows(llava(r".*language_model.*q_proj"), ["a", "b"], input_ids=with_images(*numbers), pixel_values=pixels)
    check_rows(model, ["a", "a"], input_ids=with_images(*numbers), pixel_values=pixels)


@pytest.mark.parametrize("number", [1, 2])
def test_images_of_which_rows_have_as_many(number):
    inputs = {"input_ids": with_images(number, number), "pixel_values": PIXELS[: 2 * number]}
    check_rows(llava(), ["b", "a"], **inputs)
    embeds = llava().base_model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(AdapterError, match="found no input_ids with the rows' image tokens"):
        llava()(inputs_embeds=embeds, **inputs, adapter_names=["a", "b"])


def test_images_that_the_text_does_not_call_for():
    config = transformers.CLIPConfig(
        text_config=dict(TEXT), vision_config={"image_size": 16, "patch_size": 8, **PATCHES}, projection_dim=16
    )
    model = adapted(transformers.CLIPModel(config), VISION)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        model(**inputs, pixel_values=PIXELS, adapter_names=list("abab"))
        model(**inputs, pixel_values=PIXELS.repeat(2, 1, 1, 1))
    with pytest.raises(AdapterError, match=r"vision_model\..*: expected as much of pixel_values .* 4 rows .* found 8"):
        model(**inputs, pixel_values=PIXELS.repeat(2, 1, 1, 1), adapter_names=list("abab"))


def test_a_model_of_one_s_own_is_not_known():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, input_ids, pixel_values):
            return self.up(pixel_values)

    model = adapted(Own(), ["up"])
    assert model(torch.zeros(2, 3), pixel_values=torch.ones(4, 8), adapter_names=["a", "b"]).shape == (4, 8)
