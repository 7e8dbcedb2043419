"""Layers whose first axis isn't the batch are refused in mixed batches, where rows would get wrong adapters."""

import copy

import pytest
import torch
import transformers
from _compare import assert_close
from torch import nn

from road_torch import AdapterError, RoadConfig, RoadModel
from road_torch._rows import check_media

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
    text = {"width": 64, "num_layers": 1, "vocab_size": 64, "context_length": 8, "n_ctx": 0}
    # With texts as in training, but without its dropout.
    sizes = {"mask_dim": 32, "conv_dim": 32, "task_seq_len": 8, "is_training": True, "dropout": 0.0}
    config = transformers.OneFormerConfig(**{f"text_encoder_{key}": v for key, v in text.items()}, **sizes, **masks())
    inputs = {"pixel_values": IMAGES, "task_inputs": IDS.float(), "text_inputs": IDS[:, None].repeat(1, 4, 1)}
    return transformers.OneFormerForUniversalSegmentation(config), inputs


def dab_detr():
    stages = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage2"]}
    sizes = {**PAIR, "decoder_layers": 4, "hidden_size": 32, "num_queries": 8}
    del sizes["d_model"]
    config = transformers.DabDetrConfig(backbone_config=transformers.ResNetConfig(**stages), **NO_TIMM, **sizes)
    return transformers.DabDetrForObjectDetection(config), {"pixel_values": IMAGES}


def mlcd():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MLCDVisionConfig(image_size=64, patch_size=16, **sizes)
    return transformers.MLCDVisionModel(config), {"pixel_values": IMAGES}


def higgs(audio=(1, 6, 6, 6)):
    """The rows have as many audio tokens each; all other tokens are text."""
    config = transformers.HiggsAudioV2Config(
        num_key_value_heads=2, head_dim=16, codebook_size=8, audio_token_id=90, pad_token_id=0, **TEXT
    )
    ids = torch.where(torch.arange(8) < torch.tensor(audio)[:, None], 90, IDS)
    return transformers.HiggsAudioV2ForConditionalGeneration(config), {"input_ids": ids}


def higgs_audio():
    return higgs((6, 1, 1, 1))


def seggpt():
    config = transformers.SegGptConfig(
        image_size=[128, 64],
        patch_size=16,
        pretrain_image_size=64,
        hidden_size=32,
        mlp_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_hidden_state_indices=[0, 1],
        merge_index=0,
        decoder_hidden_size=16,
    )
    images = dict.fromkeys(("pixel_values", "prompt_pixel_values", "prompt_masks"), IMAGES)
    return transformers.SegGptForImageSegmentation(config), images


@torch.no_grad()
def outputs(model, paths, inputs):
    """Returns each layer's output at its first call."""
    given = {path: [] for path in paths}
    layers = [(model.get_submodule(path), path) for path in paths]
    hooks = [
        m.register_forward_hook(lambda *call, path=path: given[path].append(call[2].clone())) for m, path in layers
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return {path: calls[0] for path, calls in given.items()}


def adapted(base, target, **more):
    model = RoadModel(base)
    for name in "ab":
        torch.manual_seed(ord(name))
        config = RoadConfig(target_modules=target, group_size=2, init_weights=False, inference_mode=True, **more)
        model.add_adapter(name, config)
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
        "model.text_mapper.text_encoder.transformer.layers.0.mlp.fc1": "OneFormerTextTransformer",
    },
    dab_detr: {"bbox_predictor.layers.0": "DabDetrForObjectDetection"},
    mlcd: {"encoder.layers.0.self_attn.out_proj": "MLCDAttention"},
    higgs: {"model.layers.0.mlp.down_proj": "HiggsAudioV2DecoderLayer"},
    higgs_audio: {"model.layers.0.audio_mlp.down_proj": "HiggsAudioV2DecoderLayer"},
    seggpt: {"model.encoder.layers.0.attention.qkv": "SegGptEncoder"},
}


@pytest.mark.parametrize("build", LAYERS)
def test_layers_of_transformers_with_another_order(build):
    torch.manual_seed(0)
    base, inputs = build()
    base.eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.ndim > 1 and "backbone" not in name:
                parameter.normal_(std=0.2)
    # Changing one row of the batch changes rows of the layer beyond that row's share.
    other = dict(inputs)
    for key in inputs:
        if key != "global_attention_mask":
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


def test_a_saved_module_within_another():
    model = RoadModel(
        transformers.XLNetModel(transformers.XLNetConfig(vocab_size=128, d_model=32, n_layer=2, n_head=2, d_inner=64))
    )
    for name, path in {"a": "layer.0", "b": "layer.0.ff.layer_1"}.items():
        changes = {"target_modules": ["layer.1.ff.layer_2"], "modules_to_save": [path]}
        model.add_adapter(name, RoadConfig(**changes, group_size=2))
    with pytest.raises(AdapterError, match=r"layer\.0\.ff\.layer_1: expected .* found one in XLNetFeedForward"):
        model(IDS, adapter_names=["b", "__base__", "b", "b"])


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
    """Returns rows of tokens with the given numbers of images, each of four tokens."""
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
    # No error: layers that are given the text see its rows, and for rows with the same adapter order doesn't matter.
    check_rows(llava(r".*language_model.*q_proj"), ["a", "b"], input_ids=with_images(*numbers), pixel_values=pixels)
    check_rows(model, ["a", "a"], input_ids=with_images(*numbers), pixel_values=pixels)
    # The head, outside of the decoder, sees the rows, too.
    check_rows(llava("lm_head"), ["a", "b"], input_ids=with_images(*numbers), pixel_values=pixels)


@pytest.mark.parametrize("number", [1, 2])
def test_images_of_which_rows_have_as_many(number):
    inputs = {"input_ids": with_images(number, number), "pixel_values": PIXELS[: 2 * number]}
    check_rows(llava(), ["b", "a"], **inputs)
    embeds = llava().base_model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(AdapterError, match="found no input_ids with the rows' image tokens"):
        llava()(inputs_embeds=embeds, **inputs, adapter_names=["a", "b"])


def test_images_of_different_sizes():
    model, inputs = llava(), {"input_ids": with_images(1, 1), "pixel_values": PIXELS[:2]}
    with pytest.raises(AdapterError, match=r"vision_tower\..*: expected as much .* found image_sizes that differ"):
        model(**inputs, image_sizes=torch.tensor([[16, 16], [16, 8]]), adapter_names=["a", "b"])
    check_media(model.base_model, ["a", "b"], (), {**inputs, "image_sizes": torch.tensor([[16, 16]] * 2)})


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


def whisper():
    torch.manual_seed(0)
    sizes = {"vocab_size": 120, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    none = {"suppress_tokens": None, "begin_suppress_tokens": None}
    base = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**sizes, **special, **none, **PAIR, num_hidden_layers=1)
    )
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    for key, value in {**special, **none, "no_timestamps_token_id": 90, "is_multilingual": False}.items():
        setattr(base.generation_config, key, value)
    base.generation_config.max_initial_timestamp_index, base.generation_config.prev_sot_token_id = 5, 5
    return adapted(base.eval(), r".*\.(q_proj|fc1)")


def test_speech_of_which_rows_end_in_different_segments():
    model = whisper()
    mask = torch.ones(4, 120, dtype=torch.long)
    mask[:2, 40:] = 0
    features = torch.randn(4, 8, 120, generator=torch.Generator().manual_seed(2)) * mask[:, None]
    settings = {"return_timestamps": True, "condition_on_prev_tokens": False, "max_new_tokens": 10, "num_beams": 2}

    def generate(features=features, mask=mask, **more):
        return model.generate(features, attention_mask=mask, **{"temperature": 0.0, **settings, **more})

    short = {"features": features[:, :, :40], "mask": mask[:, :40]}
    once = {**short, "return_timestamps": False}
    for found, call in {
        "120 frames": {},
        "return_timestamps": short,
        "2 temperatures": {**once, "temperature": (0.0, 0.4)},
    }.items():
        with pytest.raises(AdapterError, match=rf"one adapter for all rows .* found several and {found};"):
            generate(**call, adapter_names=list("abab"))
    # One adapter for all rows stays right for the rows that are left.
    alike, mixed = generate(adapter_names=list("bbbb")), generate(**once, adapter_names=list("abab"))
    plain = {}
    for name in "ab":
        model.set_adapter(name)
        plain[name] = generate(), generate(**once)
    assert torch.equal(alike, plain["b"][0])
    assert not torch.equal(alike, plain["a"][0])
    for row, name in enumerate("abab"):
        expected = plain[name][1][row]
        length = min(mixed.shape[1], len(expected))
        assert torch.equal(mixed[row, :length], expected[:length])


def test_a_layer_of_distances_instead_of_rows():
    base = transformers.DebertaForMaskedLM(
        transformers.DebertaConfig(relative_attention=True, pos_att_type=["p2c", "c2p"], **TEXT)
    )
    both = r".*(pos_proj|output.dense)"
    with pytest.raises(
        AdapterError, match=r"pos_proj: expected a multiple of .* \[1, .*; exclude_modules leaves it out$"
    ):
        adapted(copy.deepcopy(base), both)(IDS, adapter_names=list("abab"))
    check_rows(adapted(base, both, exclude_modules=["pos_proj"]), list("abab"), input_ids=IDS)


@pytest.mark.parametrize("trained", [False, True])
def test_rows_alike_are_not_counted(trained):
    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x):
            return self.up(x[:3])

    model = adapted(Some(), ["up"])
    model.add_adapter("c", RoadConfig(target_modules=["up"], group_size=2, init_weights=False))
    model.set_adapter("c" if trained else "b")
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(4))
    plain, alike = model(x), model(x, adapter_names=[model.active_adapter] * 4)
    assert alike.requires_grad is plain.requires_grad is trained
    base = model(x, adapter_names=["__base__"] * 4)
    assert_close(alike.detach(), plain.detach(), "float32", moved_from=base.detach())
    with pytest.raises(AdapterError, match=r"up: expected a multiple of the 4 rows"):
        model(x, adapter_names=["a", "a", "a", model.active_adapter])
