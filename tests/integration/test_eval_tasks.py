"""`lora eval --tasks`: lm-evaluation-harness on tasks of our own files, base beside adapter."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.adapters import make_adapter, make_harmful_adapter

pytest.importorskip("lm_eval", reason="the extra `harness` isn't installed")

CHOICES = tuple("bdfhkmqvwz")
"""Of equal length: random models find short answers likeliest."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_config, tiny):
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder)
    make_adapter(folder / "run" / "adapter", tiny, scale=2)
    shutil.copy(config, folder / "run" / "config.yaml")
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copied")


@pytest.fixture(scope="module")
def questions(tiny):
    """Twenty questions with the answer that the base itself finds likeliest, so that it is always right."""
    asked = [f"it rained at {number}, so we met at" for number in range(20)]
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    likeliest = [likeliest_choice(base, tokenizer, question) for question in asked]
    return [{"question": question, "label": label} for question, label in zip(asked, likeliest, strict=True)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, questions):
    """A task to choose in and one to write in, as the harness takes them."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": " ",
    }
    choosing = {
        "task": "choosing",
        "output_type": "multiple_choice",
        "doc_to_choice": list(CHOICES),
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    writing = {
        "task": "writing",
        "output_type": "generate_until",
        "doc_to_target": "{{question}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choosing, writing):
        (folder / f"{task['task']}.yaml").write_text(json.dumps({**shared, **task}))
    return folder


def likeliest_choice(model, tokenizer, question):
    """By the summed log-probability of the choice's tokens, which is what the harness's `acc` goes by."""
    before = tokenizer(question, add_special_tokens=False)["input_ids"]
    found = []
    for choice in CHOICES:
        ids = tokenizer(f"{question} {choice}", add_special_tokens=False)["input_ids"]
        assert ids[: len(before)] == before
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        places = torch.arange(len(before), len(ids))
        found.append(float(logits[places - 1, torch.tensor(ids)[places]].sum()))
    return max(range(len(CHOICES)), key=found.__getitem__)


def test_choices_are_marked_as_a_plain_loop_would(run, tiny, tasks, questions, lora):
    code, out, err = lora("eval", run, "--tasks", tasks / "choosing.yaml", "--json")
    assert code == 0, err
    found = json.loads(out)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, run / "adapter").eval()
    right = [likeliest_choice(adapted, tokenizer, one["question"]) == one["label"] for one in questions]
    rows = pyarrow.parquet.read_table(run / "eval" / "choosing" / "rows.parquet").to_pydict()
    assert rows["base"] == [1.0] * 20  # the base is right by how the labels were made
    assert rows["adapter"] == [float(one) for one in right]
    assert 0 < sum(right) < 20
    assert found["base"]["choosing acc"] == 1.0
    assert found["adapter"]["choosing acc"] == pytest.approx(sum(right) / 20)
    low, high = found["difference"]["intervals"]["choosing acc"]
    assert low < found["difference"]["choosing acc"] < high
    assert json.loads((run / "eval" / "choosing" / "summary.json").read_text()) == found
    assert "choosing acc" in (run / "eval" / "choosing" / "report.html").read_text()


def test_a_harmful_adapter_exits_3(run, tiny, tasks, lora):
    shutil.rmtree(run / "adapter")
    make_harmful_adapter(run / "adapter", tiny, factor=-1)
    code, out, err = lora(
        "eval", run, "--tasks", f"{tasks / 'choosing.yaml'},{tasks / 'writing.yaml'}", "--fail-if-worse"
    )
    assert code == 3, err
    assert "choosing acc" in out and "writing exact_match" in out
    assert "1 worse" in out and "Traceback" not in err


def test_zero_b_changes_nothing(run, tiny, tasks, lora):
    shutil.rmtree(run / "adapter")
    make_adapter(run / "adapter", tiny, scale=0)
    tasks_ = f"{tasks / 'choosing.yaml'},{tasks / 'writing.yaml'}"
    code, out, _ = lora("eval", run, "--tasks", tasks_, "--limit", "8", "--fail-if-worse", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["documents"] == {"choosing acc": 8, "writing exact_match": 8}
    assert [found["difference"][name] for name in found["documents"]] == [0.0, 0.0]


BAD_TASKS = {
    "an unknown name": ("arc_esay", ["arc_esay", "no such task"]),
    "no file": ("nowhere.yaml", ["no file", "nowhere.yaml"]),
    "nothing": (",", ["names no task"]),
    "no YAML": ("broken.yaml", ["broken.yaml", "can't be loaded"]),
    "data that isn't there": ("dataless.yaml", ["dataless.yaml", "can't be loaded"]),
}


@pytest.mark.parametrize(("name", "named"), BAD_TASKS.values(), ids=BAD_TASKS)
def test_tasks_that_cant_be_put(run, tasks, tmp_path, monkeypatch, lora, name, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("task: {broken\n")
    whole = json.loads((tasks / "choosing.yaml").read_text())
    gone = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "gone.jsonl")}}}
    (tmp_path / "dataless.yaml").write_text(json.dumps({**whole, **gone}))
    code, out, err = lora("eval", run, "--tasks", name, "--json")
    assert (code, out) == (2, ""), err
    assert all(part in err for part in named), err
    assert "Traceback" not in err and "loading weights" not in err
    assert not (run / "eval").exists()
