import json

import numpy as np
import pytest
from _models import WORDS, word_tokenizer
from transformers import PreTrainedTokenizerFast

from road_core import AdapterError
from road_jax.train import _data


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def words(ids):
    return " ".join(WORDS[i] for i in ids)


def test_only_completions_are_learned(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        {"prompt": "one two", "completion": "three"},
        {
            "messages": [
                {"role": "system", "content": "nine"},
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "two three"},
                {"role": "user", "content": "four"},
                {"role": "assistant", "content": "five"},
            ]
        },
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    first, second = _data.tokenize(_data.read_lines(path), tokenizer, str(path))
    assert (first.line, second.line) == (1, 3)
    assert words(first.input_ids) == "<user> one two </s> <assistant> three </s>"
    assert words(first.input_ids[first.is_target == 1]) == "three </s>"
    assert words(second.input_ids).endswith("two three </s> <user> four </s> <assistant> five </s>")
    assert words(second.input_ids[second.is_target == 1]) == "two three </s> five </s>"


def test_a_tokenizer_without_a_template_gets_plain_text(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    messages = [{"role": "user", "content": "one "}, {"role": "assistant", "content": "two "}]
    (example,) = _data.tokenize([(1, messages)], bare, "f")
    assert words(example.input_ids) == "one two </s>"
    assert words(example.input_ids[example.is_target == 1]) == "two </s>"


def examples(lengths, rng=None):
    rng = rng or np.random.default_rng(0)
    made = []
    for i, n in enumerate(lengths):
        target = np.zeros(n, np.int32)
        target[n - 2 :] = 1
        made.append(_data.Example(i + 1, rng.integers(1, 99, n).astype(np.int32), target))
    return made


def test_packing_keeps_every_example_whole_and_its_targets_its_own():
    made = examples(np.random.default_rng(1).integers(3, 30, 50))
    seen = {}
    shapes = set()
    for element in _data.packed(made, rows=4, length=64, seed=7, epochs=1):
        batch = _data.to_batch(element, 4)
        shapes.add(batch.input_ids.shape)
        owner = _data.examples_at(element, batch)
        for row in range(4):
            for segment in range(1, batch.segments[row].max() + 1):
                where = np.flatnonzero(batch.segments[row] == segment)
                index = element["example"][row][where[0]]
                assert index not in seen
                np.testing.assert_array_equal(batch.input_ids[row][where], made[index].input_ids)
                mine = (owner[row] == index) & (batch.weights[row] > 0)
                # The last two tokens, each predicted from the place before it.
                np.testing.assert_array_equal(batch.logits_at[row][mine], where[-3:-1])
                np.testing.assert_array_equal(batch.targets[row][mine], made[index].input_ids[-2:])
                seen[index] = True
    assert len(seen) == 50
    assert shapes == {(4, 64)}


def test_an_example_whose_first_token_is_a_target_does_not_learn_it():
    whole = _data.Example(1, np.array([5, 6], np.int32), np.ones(2, np.int32))
    (element,) = _data.packed([whole, whole], rows=1, length=8, seed=None, epochs=1)
    batch = _data.to_batch(element, 1)
    assert batch.targets[batch.weights > 0].tolist() == [6, 6]


def test_epochs_differ_in_order_and_the_place_can_be_taken_up_again():
    made = examples([8] * 16)

    def batches():
        return _data.packed(made, rows=2, length=16, seed=3, epochs=None)

    iterator = batches()
    orders = [np.concatenate([next(iterator)["example"].ravel()[::8] for _ in range(4)]).tolist() for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(16))
    assert orders[0] != orders[1] != list(range(16))
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator)["input_ids"] for _ in range(5)]
    again = batches()
    again.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(again)["input_ids"], batch)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: expected JSON, found '\{'"),
        ("[1]", "line 2: expected a JSON object, found list"),
        ('{"prompt": "a"}', "line 2: expected text in the field 'completion'.*found no such field"),
        ('{"prompt": 3, "completion": "a"}', "line 2: expected text in the field 'prompt'.*found int"),
        ('{"messages": []}', "line 2: expected messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: expected messages.*assistant"),
        ('{"messages": [{"role": "assistant", "content": 1}]}', "line 2: expected messages"),
        ("[" * 99999, "line 2: expected JSON"),
        (r'{"prompt": "a", "completion": "\ud83d"}', "line 2: expected JSON, .* surrogates not allowed"),
    ],
)
def test_bad_lines_are_named_by_their_number(line, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line)
    with pytest.raises(AdapterError, match=message):
        _data.read_lines(path)


def test_bad_files_are_refused(tmp_path, tokenizer):
    with pytest.raises(AdapterError, match=r"none\.jsonl: expected a file of JSON lines"):
        _data.read_lines(tmp_path / "none.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(AdapterError, match="can't be read"):
        _data.read_lines(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text("\n\n")
    with pytest.raises(AdapterError, match="at least one line"):
        _data.read_lines(tmp_path / "c.jsonl")


def test_long_lines_are_refused_or_left_out():
    made = examples([5, 9, 20])
    with pytest.raises(AdapterError, match=r"f, line 2: expected at most 8 tokens, found 9 \(2 such lines"):
        _data.check_lengths(made, 8, "f", skip_long=False)
    assert _data.check_lengths(made, 8, "f", skip_long=True) == made[:1]
    with pytest.raises(AdapterError, match="found none"):
        _data.check_lengths(made, 4, "f", skip_long=True)


def test_a_template_that_refuses_is_named(tokenizer):
    picky = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    picky.chat_template = "{{ raise_exception('no system turn, please') }}"
    with pytest.raises(AdapterError, match=r"f, line 4: expected a conversation.*no system turn, please"):
        _data.tokenize([(4, [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}])], picky, "f")
