"""The demo's stages on a small random model, its scoring against Hugging Face's model, and its report."""

import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from _models import WORDS, small_checkpoint
from rich.console import Console

from convert import Verification
from examples.demo import report
from examples.demo.flax_model import ROWS, FlaxModel
from examples.demo.folder import demo_folder
from examples.demo.packages import VADER
from examples.demo.run import BASE_LINES, STAGES, interleave, run_demo
from examples.demo.stages import Stage, Stages
from examples.demo.tasks import Line, Task, score_labels
from road_core import AdapterError, read_flax, read_peft
from road_jax.train import TrainOptions, TrainResult

ROOT = Path(__file__).parents[2]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def make_task(name, **changes):
    """Counting on: 'three four' is answered by 'five'."""
    starts = np.random.default_rng(len(name)).integers(0, 8, 120)
    lines = [Line(f"{NUMBERS[start]} {NUMBERS[start + 1]}", NUMBERS[start + 2]) for start in starts]
    fields = {
        "summary": "What comes next?",
        "package": VADER,
        "instruction": "ten",
        "labels": (),
        "answer_tokens": 4,
        "steps": 4,
        "learning_rate": 3e-2,
        "train": lines[40:],
        "held_out": lines[:40],
        "scorer": score_labels,
    }
    return Task(name=name, **{**fields, **changes})


TASKS = [make_task("label", labels=("five", "six", "seven")), make_task("text")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "small"
    return small_checkpoint(folder, num_hidden_layers=2, vocab_size=len(WORDS))


@pytest.fixture(scope="module")
def demo(base, tmp_path_factory):
    """A whole run; gives its folder and results."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with demo_folder(out) as folder:
        stages = Stages(Console(file=io.StringIO()), STAGES)
        with stages.stage("Getting nothing"):
            pass
        results = run_demo(base, TASKS, folder, stages)
        report.write_report(results, folder, out)
    return out, results


def test_all_stages_are_done_and_timed(demo):
    _, results = demo
    assert len(results.stages) == STAGES
    assert all(stage.seconds > 0 for stage in results.stages)
    assert results.seconds == sum(stage.seconds for stage in results.stages)
    # The process holds two frameworks.
    assert 2**28 < results.peak_memory < 2**35


def test_the_adapters_were_trained_and_converted(demo):
    out, results = demo
    for result in results.tasks:
        flax = read_flax(out / "flax" / result.task.name)
        peft = read_peft(out / "torch" / result.task.name)
        theta, alpha = flax.modules["model.layers.mlp.up_proj"]
        for layer in range(2):
            there = peft.modules[f"model.layers.{layer}.mlp.up_proj"]
            assert np.array_equal(there[0], theta[layer])
            assert np.array_equal(there[1], alpha[layer])
        assert np.abs(theta).max() > 1e-2
        assert result.verification.passed
        assert result.training.parameters == sum(v.size for pair in flax.modules.values() for v in pair)
        options = json.loads((out / "flax" / result.task.name / "options.json").read_text())
        assert options["quantize"] == "nf4"


def test_every_held_out_line_is_answered_in_mixed_batches(demo):
    out, results = demo
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 2 * (40 + BASE_LINES)
    first = {row["adapter"] for row in answers[: results.batch_rows]}
    assert first == {"label", "text", "__base__"}
    for result in results.tasks:
        mine = [row for row in answers if row["adapter"] == result.task.name]
        assert [row["messages"] for row in mine] == [result.task.prompt(line) for line in result.task.held_out]
        assert result.torch == result.task.score([row["completion"] for row in mine])
        plain = [row for row in answers if row["adapter"] == "__base__" and row["task"] == result.task.name]
        assert [shown.base for shown in result.shown] == [row["completion"] for row in plain]
        assert [shown.line for shown in result.shown] == list(result.task.held_out[:BASE_LINES])
        assert results.base_rows == 2 * BASE_LINES
        assert {shown.torch for shown in result.shown} - {shown.base for shown in result.shown}


def test_the_base_is_asked_fairly(demo):
    _, results = demo
    label, text = results.tasks
    assert label.asked == "the likelier label counts"
    assert text.asked == "with the format told and 2 answered examples"


def conversations(task):
    return [task.prompt(line, examples=i % 3) for i, line in enumerate(task.held_out)]


def hugging_face(base, task):
    """Each conversation's prompt ids, in the task's order, and the model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations(task)]
    return (
        model,
        tokenizer,
        [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in texts],
    )


@torch.no_grad()
def test_the_likelier_label_is_hugging_faces(base):
    task = TASKS[0]
    model, tokenizer, prompts = hugging_face(base, task)
    labels = tokenizer.convert_tokens_to_ids(list(task.labels))
    expected = [task.labels[model(ids).logits[0, -1, labels].argmax()] for ids in prompts]
    assert len(prompts) > ROWS
    assert len(set(expected)) > 1
    assert FlaxModel(base).choose(conversations(task), task.labels) == expected
    with pytest.raises(ValueError, match="too many values"):
        FlaxModel(base).choose(conversations(task), ["one two"])


def test_answers_are_hugging_faces_in_the_order_of_the_questions(base):
    task = TASKS[1]
    model, tokenizer, prompts = hugging_face(base, task)
    expected = []
    for ids in prompts:
        given = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        expected.append(tokenizer.decode(given[0, ids.shape[1] :], skip_special_tokens=True))
    assert len(set(expected)) > 5
    assert FlaxModel(base).answer(conversations(task), max_new_tokens=5) == expected


def test_weights_of_4_bits_speak_otherwise(base):
    asked = conversations(TASKS[1])
    plain = FlaxModel(base).answer(asked, max_new_tokens=5)
    assert FlaxModel(base, "nf4").answer(asked, max_new_tokens=5) != plain


def test_groups_are_spread_evenly():
    mixed = interleave(list("aaaaaaaa"), list("bbbb"), ["c", "C"])
    assert sorted(mixed) == sorted("aaaaaaaabbbbcC")
    assert mixed.index("c") < mixed.index("C")
    for start in (0, 7):
        assert {item.lower() for item in mixed[start : start + 7]} == {"a", "b", "c"}
    assert interleave([], ["a"]) == ["a"]


def fake_results(**changes):
    """Results whose figures all differ."""
    line = Line("a | b\n`c`", "answer")
    task = make_task("fruit", held_out=[line] * 10, summary="Which fruit?")
    fields = {
        "task": task,
        "asked": "by its text",
        "base": {"exact": 0.375, "city": 0.0},
        "flax": {"exact": 0.5, "city": 0.625},
        "torch": {"exact": 0.75, "city": 0.875},
        "options": TrainOptions(base=Path("b"), data=Path("d/fruit.train.jsonl"), out=Path("o"), steps=7),
        "training": TrainResult(Path("o"), 7, 1234, 20.0, 4000, {}, {}),
        "flax_bytes": 2048,
        "torch_bytes": 3072,
        "verification": Verification(1e-5, 1e-6, 2e-6, 10.0, 3.0, 1.0, 59, 1e-4),
        "shown": [report.Shown(line, "x" * 300, "said", "said"), report.Shown(line, "", "said", "other")],
    }
    return report.Results(
        device="the machine's name",
        base=Path("models/tiny"),
        base_parameters=1_234_000,
        tasks=[report.TaskResult(**{**fields, **changes})],
        base_rows=3,
        batch_rows=32,
        stages=[Stage("First", 61.0, 90.0), Stage("Second", 59.0, 80.0)],
        peak_memory=3 * 2**30,
    )


def cells(text, start):
    """The cells of the only line that starts like this; an escaped bar separates nothing."""
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.fixture
def written(tmp_path):
    report.write_report(fake_results(), tmp_path, Path("runs/demo"))
    return (tmp_path / "report.md").read_text(encoding="utf-8"), tmp_path


def test_the_report_tells_the_figures(written):
    text, folder = written
    assert "Device: the machine's name." in text
    assert "Made in 2.0 minutes; the process held 3.0 GiB" in text
    assert cells(text, "| fruit | exact") == ["fruit", "exact", "10", "37.5%", "50.0%", "75.0%"]
    assert cells(text, "|  | city") == ["", "city", "10", "0.0%", "62.5%", "87.5%"]
    assert "The base was asked in Flax, float32: by its text." in text
    assert "a score of 50 % has a standard error of 15.8 points" in text
    assert cells(text, "| fruit | 1,234") == ["fruit", "1,234", "0.100%", "7", "4,000", "200", "2 KiB", "3 KiB"]
    assert cells(text, "| fruit | 1.0e-05")[2:] == ["1.0e-06", "2.0e-06", "3.00", "100% of 59", "yes"]
    assert cells(text, "| all ") == ["all", "120", "170"]
    figures = json.loads((folder / "demo.json").read_text())
    assert figures["tasks"]["fruit"]["torch"] == {"exact": 0.75, "city": 0.875}
    assert figures["tasks"]["fruit"]["verification"]["positions"] == 59
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_verification_stands_out(tmp_path):
    found = dataclasses.replace(fake_results().tasks[0].verification, max_difference=1.0)
    report.write_report(fake_results(verification=found), tmp_path, Path("out"))
    assert cells((tmp_path / "report.md").read_text(), "| fruit | 1.0e+00")[-1] == "**no**"


def test_what_a_model_says_breaks_no_table(written):
    text, _ = written
    rows = [line for line in text.splitlines() if line.startswith("| `a ")]
    assert [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows] == [
        [r" `a \| b 'c'` ", " `answer` ", f" `{'x' * 120}…` ", " `said` ", " yes "],
        [r" `a \| b 'c'` ", " `answer` ", "  ", " `other` ", " no "],
    ]


def test_all_links_of_the_report_lead_somewhere(demo):
    out, _ = demo
    links = re.findall(r"\]\(([^)]+)\)", (out / "report.md").read_text(encoding="utf-8"))
    assert len(links) == 5
    for link in links:
        assert (out / link).read_bytes().startswith(b"\x89PNG"), link


def test_the_commands_of_the_report_are_those_of_the_run(demo):
    import shlex

    import tyro

    from road_torch._generate import GenerateOptions

    out, results = demo
    lines = [shlex.split(line) for line in (out / "report.md").read_text().splitlines() if line.startswith("    road-")]
    trained = [tyro.cli(TrainOptions, args=line[1:]) for line in lines if line[0] == "road-train"]
    for options, result in zip(trained, results.tasks, strict=True):
        assert options.data.is_file()
        theirs = dataclasses.replace(result.options, data=options.data, out=options.out)
        assert options == theirs
    (given,) = [tyro.cli(GenerateOptions, args=line[1:]) for line in lines if line[0] == "road-generate"]
    assert given.prompts.is_file()
    assert given.quantize == "nf4"
    assert [part for several in given.adapter for part in several] == ["label=adapters/label", "text=adapters/text"]


def test_the_table_for_the_terminal():
    console = Console(file=io.StringIO(), width=120)
    console.print(report.summary(fake_results()))
    text = console.file.getvalue()
    assert "the machine's name" in text
    assert re.search(r"fruit +│ exact │ 10 +│ 37\.5% │ +50\.0% │ +75\.0%", text)


def test_a_former_demo_is_replaced_when_the_new_one_is_whole(tmp_path):
    out = tmp_path / "runs" / "demo"
    for text in ("first", "second"):
        with demo_folder(out) as folder:
            report.write_report(fake_results(), folder, out)
            (folder / text).write_text(text)
    assert (out / "second").is_file()
    assert not (out / "first").exists()

    def fail():
        with demo_folder(out) as folder:
            (folder / "third").write_text("third")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (out / "second").is_file()
    assert [path.name for path in out.parent.iterdir()] == ["demo"]


@pytest.mark.parametrize("content", ["mine", '{"made_by": "someone"}', "[1]"])
def test_a_folder_of_something_else_is_left_alone(content, tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "demo.json").write_text(content)
    with pytest.raises(AdapterError, match="already holds something"), demo_folder(tmp_path / "demo"):
        pytest.fail("nothing may begin")
    assert (tmp_path / "demo" / "demo.json").read_text() == content


def test_the_command_refuses_a_full_folder_at_once(tmp_path):
    (tmp_path / "notes").write_text("mine")
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"error: .*: expected an empty or new folder, found one that already holds something\n", done.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
