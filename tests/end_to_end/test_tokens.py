"""Training and generation use the same tokens."""

import pytest
import transformers
from _models import small_model, word_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import road_torch
from road_core._chat import Chat
from road_jax.train import _data
from road_torch._generate import _end_tokens, _tokenize

TEXTS = ["hello world good morning the answer is yes positive negative user assistant"] * 50
TEMPLATES = {
    None: None,
    "instruct": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "turns": "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}",
}


def llama():
    """Like Llama 2's: a beginning-of-text token, and a ▁ before every text that is tokenised."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    inner.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def gpt():
    """Like GPT-2's: bytes, with spaces before words; this one adds an end-of-text token by itself."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["</s>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([*TEXTS, "\n\n\n" * 9], trainer)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"llama": llama(), "gpt": gpt()}
LINES = [("hello", "positive"), ("hello ", "yes"), ("the answer is\n", "\n\nno"), ("the ans", "wer"), ("", "yes")]


def trained(tokenizer, *messages):
    examples = _data.tokenize([(1, list(messages))], tokenizer, "f")
    return [(example.input_ids.tolist(), example.is_target.tolist()) for example in examples]


def said(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_trained_prompt_is_the_one_that_is_asked(kind, template):
    tokenizer = TOKENIZERS[kind]
    tokenizer.chat_template = TEMPLATES[template]
    for prompt, completion in LINES:
        ((ids, is_target),) = trained(tokenizer, said("user", prompt), said("assistant", completion))
        start = is_target.index(1)
        if prompt or template or kind == "llama":
            assert ids[:start] == _tokenize(tokenizer, Chat(tokenizer), {"prompt": prompt}, "f")
        assert ids.count(tokenizer.bos_token_id) == (template == "instruct" or (kind == "llama" and not template))
        learned = ids[start : start + sum(is_target)]
        assert learned[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1 + (template == "turns")
        # Nothing is inserted or lost between prompt and answer.
        border = {"instruct": "[/INST] ", "turns": "<assistant>\n", None: prompt}[template]
        assert tokenizer.decode([*ids[:start], *learned]).endswith(border + completion + "</s>")


@pytest.mark.parametrize("template", ["instruct", "turns"])
def test_a_trained_history_is_the_one_that_is_asked(template):
    tokenizer = TOKENIZERS["llama"]
    tokenizer.chat_template = TEMPLATES[template]
    messages = [said("user", "hello"), said("assistant", "yes"), said("user", "good"), said("assistant", "positive")]
    ((ids, is_target),) = trained(tokenizer, *messages)
    asked = _tokenize(tokenizer, Chat(tokenizer), {"messages": messages[:3]}, "f")
    assert ids[: len(asked)] == asked
    assert is_target[len(asked)] == 1
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    assert ids == whole


def test_the_end_of_turn_ends_an_answer_where_it_is_not_the_end_of_text():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "<pad>"
    ((ids, is_target),) = trained(tokenizer, said("user", "one"), said("assistant", "two"))
    learned = [token for token, target in zip(ids, is_target, strict=True) if target]
    assert tokenizer.convert_ids_to_tokens(learned) == ["two", "</s>"]
    model = road_torch.RoadModel(small_model())
    model.generation_config.eos_token_id = 0
    assert _end_tokens(model, tokenizer, Chat(tokenizer)) == [0, 2]
    # The template may continue after it.
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>\n", "</s> ten\n")
    ((_, is_target),) = trained(tokenizer, said("user", "one"), said("assistant", "two"))
    assert is_target == [0, 0, 0, 0, 0, 1, 1, 0]
    # A template that refuses the question leaves the end-of-text token.
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert Chat(tokenizer).end == 0


def test_a_turn_that_is_shown_otherwise_in_the_history_is_an_example_of_its_own():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {% if loop.last and m.role == 'assistant' %}ten {% endif %}"
        "{{ m.content }} </s>\n{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    messages = [said("user", "one"), said("assistant", "two"), said("user", "three"), said("assistant", "four")]
    (first, second) = _data.tokenize([(3, messages)], tokenizer, "f")
    assert (first.line, second.line) == (3, 3)
    assert tokenizer.decode(first.input_ids) == "<user> one </s> <assistant> ten two </s>"
    assert tokenizer.decode(first.input_ids[first.is_target == 1]) == "ten two </s>"
    history = "<user> one </s> <assistant> two </s> <user> three </s> <assistant>"
    assert tokenizer.decode(second.input_ids) == history + " ten four </s>"
    assert tokenizer.decode(second.input_ids[second.is_target == 1]) == "ten four </s>"
    assert tokenizer.decode(_tokenize(tokenizer, Chat(tokenizer), {"messages": messages[:3]}, "f")) == history
