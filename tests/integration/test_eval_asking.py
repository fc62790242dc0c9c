"""What `lora eval` can be asked besides the loss: choices, patterns, groups, merged models, sources, a kept base."""

from __future__ import annotations

import json
import os
import shutil

import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.errors import DataError, RunFolderError, UserError
from lora_cli.evaluate import evaluate
from lora_cli.report.events import Working
from tests.integration.adapters import make_adapter

ANSWERS = ("yes", "no", "not at all")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Rows whose answer is one of three, with a topic; the last one's answer is another, and it has no topic."""
    path = tmp_path_factory.mktemp("labelled") / "labelled.jsonl"
    rows = [
        {
            "prompt": f"is it {'raining ' * (number % 5)}at noon in town {number}?",
            "completion": f" {ANSWERS[number * 7 % 3]}",
            "topic": ("rent", "rain")[number % 3 == 0],
            "meta": {"source": f"s{number % 2}"},
        }
        for number in range(23)
    ]
    rows.append({"prompt": "is it far?", "completion": " who knows", "topic": None, "meta": {}})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(judged_copy):
    return judged_copy


def table(run, name="labelled"):
    return pyarrow.parquet.read_table(run / "eval" / name / "rows.parquet").to_pydict()


def measures(result):
    return {measure.name: measure for measure in result.comparison.measures}


def plain_choice_losses(model, tokenizer, row, choices):
    """Of each choice in the answer's place, as the chat template writes it, the end of the turn included."""

    def laid_out(**more):
        messages = [{"role": "user", "content": row["prompt"]}, *more.pop("answer", ())]
        return tokenizer.apply_chat_template(messages, return_dict=False, **more)

    before = laid_out(add_generation_prompt=True)
    losses = []
    for choice in choices:
        ids = laid_out(answer=[{"role": "assistant", "content": f" {choice}"}])
        assert ids[: len(before)] == before
        ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]  # without the white space after the turn
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        places = torch.arange(len(before), len(ids))
        losses.append(-float(logits[places - 1, torch.tensor(ids)[places]].sum()))
    return losses


def test_choices_are_weighed_as_plain_transformers_would(run, tiny, labelled):
    result = evaluate(run, data=str(labelled), choices=",".join(ANSWERS))
    assert result.choices == ANSWERS
    assert any("1 of 24 rows have none of the choices" in text for text in result.warnings)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    rows = [json.loads(line) for line in labelled.read_text().splitlines()][:-1]
    right, likely = [], []
    for row, chosen in zip(rows, table(run)["base_choice"], strict=False):
        losses = torch.tensor(plain_choice_losses(base, tokenizer, row, ANSWERS))
        assert chosen == ANSWERS[int(losses.argmin())]
        right.append(chosen == row["completion"].strip())
        likely.append(float((-losses).softmax(0)[ANSWERS.index(row["completion"].strip())]))
    assert table(run)["base_choice"][-1] is None
    found = measures(result)
    assert found["choice_accuracy"].base == pytest.approx(sum(right) / 23)
    assert found["choice_probability"].base == pytest.approx(sum(likely) / 23, rel=1e-5)
    assert found["choice_probability"].adapter != found["choice_probability"].base
    assert "exact_match" not in found  # nothing was generated


def test_choices_can_be_those_of_the_rows(run, labelled):
    result = evaluate(run, data=str(labelled), choices="auto")
    assert set(result.choices) == {*ANSWERS, "who knows"}


@pytest.mark.parametrize(
    ("choices", "error", "says"),
    [
        ("yes", UserError, "two or more"),
        (" , ", UserError, "two or more"),
        ("left,right", DataError, "no row's answer is one of the choices"),
    ],
)
def test_choices_that_arent_any(run, labelled, choices, error, says):
    with pytest.raises(error, match=says):
        evaluate(run, data=str(labelled), choices=choices)
    assert not (run / "eval").exists()


def test_free_answers_are_no_choices(run, tmp_path):
    path = tmp_path / "free.jsonl"
    path.write_text("".join(json.dumps({"prompt": "say", "completion": f" it {n}"}) + "\n" for n in range(60)))
    with pytest.raises(UserError, match="60 different answers"):
        evaluate(run, data=str(path), choices="auto")


def test_a_pattern_implies_answers(run, labelled):
    result = evaluate(run, data=str(labelled), pattern=r"\b(yes|no)\b", max_new_tokens=4)
    found = table(run)
    wanted = [reference.strip() for reference in found["reference"]]
    counted = [text for text in wanted if text in ("yes", "no")]
    assert 0 < len(counted) < 24
    assert result.answers == 24
    pattern = measures(result)["pattern_match"]
    expected = sum(
        answer is not None and answer.split()[:1] == [text] if text in ("yes", "no") else 0
        for answer, text in zip(found["base_answer"], wanted, strict=True)
    )
    assert pattern.base == pytest.approx(expected / len(counted))
    lengths = measures(result)["answer_tokens"]
    assert lengths.adapter == pytest.approx(sum(found["adapter_answer_tokens"]) / 24)


@pytest.mark.parametrize(("pattern", "says"), [("(", "no regular expression"), ("zebra", "found in no row's answer")])
def test_a_pattern_that_finds_nothing(run, labelled, pattern, says):
    with pytest.raises(UserError, match=says):
        evaluate(run, data=str(labelled), pattern=pattern)


def test_a_group_is_its_rows_alone(run, labelled, tmp_path):
    result = evaluate(run, data=str(labelled), group_by="topic", choices=",".join(ANSWERS))
    groups = {group.name: group for group in result.comparison.groups}
    assert {name: group.rows for name, group in groups.items()} == {"rent": 15, "rain": 8, "(none)": 1}
    assert [group.name for group in result.comparison.groups] == ["rent", "rain", "(none)"]
    path = tmp_path / "rain.jsonl"
    lines = labelled.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["topic"] == "rain"))
    alone = measures(evaluate(run, data=str(path), choices=",".join(ANSWERS)))
    found = {measure.name: measure for measure in groups["rain"].measures}
    assert found.keys() == alone.keys()
    for name, measure in found.items():
        assert measure.base == pytest.approx(alone[name].base, rel=1e-5), name
        assert measure.adapter == pytest.approx(alone[name].adapter, rel=1e-5), name
    assert "choice_accuracy" not in {measure.name for measure in groups["(none)"].measures}  # none of its rows chose
    assert groups["(none)"].outcome == "can't tell"
    assert set(table(run)["group"]) == set(groups)
    [first, *_] = json.loads((run / "eval" / "labelled" / "summary.json").read_text())["groups"]
    assert (first["group"], first["rows"]) == ("rent", 15)


def test_groups_of_held_out_rows_and_of_objects(run, labelled):
    """The rows are a share of the training file, so their columns must be found by place."""
    share = [f"data.train={labelled}", "data.validation=0.5", "data.max_length=96"]
    result = evaluate(run, overrides=share, group_by="meta.source")
    assert sum(group.rows for group in result.comparison.groups) == result.rows == 12
    sources = [json.loads(line)["meta"].get("source", "(none)") for line in labelled.read_text().splitlines()]
    found = table(run, "validation")
    assert found["group"] == [sources[int(place.split(":")[1]) - 1] for place in found["place"]]


def test_a_column_that_isnt_there(run, labelled):
    with pytest.raises(UserError, match="no row has such a column") as caught:
        evaluate(run, data=str(labelled), group_by="subject")
    assert "prompt, completion, topic, meta" in caught.value.remedy
    assert not (run / "eval").exists()


@pytest.fixture
def merged(run, tiny, tmp_path):
    """The adapter in the weights, by plain PEFT."""
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    whole = PeftModel.from_pretrained(base, run / "adapter").merge_and_unload()
    whole.save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def test_a_merged_model_is_judged_beside_its_adapter(run, merged, tiny, tmp_path):
    make_adapter(tmp_path / "other", tiny, scale=0.3, seed=1)
    result = evaluate(run, adapters=[str(merged), str(tmp_path / "other")])
    [whole, other] = result.others
    assert whole.loss.adapter == pytest.approx(result.comparison.loss.adapter, rel=1e-5)
    assert whole.versus.base == result.comparison.loss.adapter
    assert abs(whole.versus.difference) < 1e-4 < abs(other.versus.difference)
    assert other.versus.difference == pytest.approx(other.loss.adapter - result.comparison.loss.adapter)
    found = table(run, "validation")
    assert found["adapter_2_loss"] == pytest.approx(found["adapter_loss"], rel=1e-5)
    assert found["adapter_3_loss"] != pytest.approx(found["adapter_loss"], rel=1e-4)


def test_a_merged_model_has_no_base_of_its_own(run, merged, lora):
    code, out, err = lora("eval", merged, "--json")
    assert (code, out) == (2, "")
    assert "whole model" in err and f"--adapter {merged}" in err


def test_a_merged_model_beside_a_quantized_base_keeps_its_weights(run, merged):
    nf4 = ("model.quantization={type: nf4, allow_partial: true}",)
    result = evaluate(run, adapters=[str(merged)], overrides=nf4)
    plain = evaluate(run)
    assert result.others[0].precision == "nf4, double quant; the model in float32"
    assert result.others[0].loss.adapter == pytest.approx(plain.comparison.loss.adapter, rel=1e-5)
    assert result.comparison.loss.adapter != pytest.approx(plain.comparison.loss.adapter, rel=1e-5)


def test_figures_go_where_they_are_asked_to(run, rows, tmp_path):
    bare = shutil.copytree(run / "adapter", tmp_path / "bare")
    wanted = {"data": str(rows / "heldout.jsonl"), "overrides": ["model.dtype=float32", "data.max_length=96"]}
    kept = tmp_path / "figures"
    result = evaluate(bare, output=kept, **wanted)
    assert result.folder == kept
    assert sorted(path.name for path in kept.iterdir()) == ["report.html", "rows.parquet", "summary.json"]
    evaluate(bare, output=kept, **wanted)
    (kept / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="something else"):
        evaluate(bare, output=kept, **wanted)
    assert (kept / "thesis.txt").read_text() == "mine"


def test_rows_can_be_named_as_in_a_config(run, rows, labelled):
    one = evaluate(run, data=str(labelled))
    as_mapping = evaluate(run, data=f"{{path: {labelled}, format: prompt_completion}}")
    assert as_mapping.comparison == one.comparison
    two = evaluate(run, data=f"[{labelled}, {rows / 'heldout.jsonl'}]")
    assert two.rows == 30
    assert (run / "eval" / "labelled+heldout" / "rows.parquet").is_file()


@pytest.mark.parametrize("data", ["{pth: x}", "[", "{path: a.jsonl, splt: x}", "[]"])
def test_rows_that_are_named_wrongly(run, lora, data):
    code, out, err = lora("eval", run, "--data", data, "--json")
    assert (code, out) == (2, "")
    assert f"--data {data}" in err and "Traceback" not in err


CACHED = ["data.cache=true"]


def asked_the_base(run, **arguments):
    heard = []
    result = evaluate(run, overrides=[*CACHED, *arguments.pop("overrides", [])], emit=heard.append, **arguments)
    asked = any(isinstance(event, Working) and event.what.endswith("the base") for event in heard)
    assert result.base_kept is not asked
    return result, asked


def test_a_base_is_asked_once(run, tiny, labelled, tmp_path):
    wanted = {"data": str(labelled), "choices": "auto", "generate": True, "max_new_tokens": 5}
    first, asked = asked_the_base(run, **wanted)
    assert asked
    again, asked = asked_the_base(run, **wanted)
    assert not asked
    assert again.comparison == first.comparison
    make_adapter(tmp_path / "other" / "adapter", tiny, scale=0)
    shutil.copy(run / "config.yaml", tmp_path / "other")
    zero, asked = asked_the_base(tmp_path / "other", **wanted)
    assert not asked
    assert zero.comparison.outcome == "no difference"
    assert {measure.difference for measure in zero.comparison.measures} == {0.0}


@pytest.mark.parametrize(
    "change",
    [
        {"limit": 5},
        {"overrides": ["model.quantization={type: nf4, allow_partial: true}"]},
        {"overrides": ["train.micro_batch_tokens=7"]},
        {"overrides": ["model.dtype=bfloat16"]},
        {"generate": True, "max_new_tokens": 3},
    ],
    ids=str,
)
def test_another_question_is_asked_anew(run, change):
    asked_the_base(run)
    _, asked = asked_the_base(run, **change)
    assert asked


def test_another_base_is_asked_anew_and_so_is_one_whose_figures_are_damaged(run, tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    elsewhere = [f"model.name_or_path={copy}"]
    asked_the_base(run, overrides=elsewhere)
    [entry] = (tmp_path / "cache" / "evaluated").glob("*.npz")
    entry.write_bytes(entry.read_bytes()[:100])
    result, asked = asked_the_base(run, overrides=elsewhere)
    assert asked
    _, asked = asked_the_base(run, overrides=elsewhere)
    assert not asked
    weights = copy / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))  # written anew, with samples that are the same
    _, asked = asked_the_base(run, overrides=elsewhere)
    assert asked
    model = AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1.1)
    model.save_pretrained(copy)
    other, asked = asked_the_base(run, overrides=elsewhere)
    assert asked
    assert other.comparison.loss.base != result.comparison.loss.base


def test_a_cache_that_cant_be_written_costs_nothing(run, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "evaluated").write_text("in the way")
    result, asked = asked_the_base(run)
    assert asked and result.rows == 6


def test_the_page_reads_the_rows_that_changed_most(run, labelled):
    evaluate(run, data=str(labelled), generate=True, max_new_tokens=4)
    page = (run / "eval" / "labelled" / "report.html").read_text()
    found = table(run)
    changes = sorted(
        (after - before, place)
        for before, after, place in zip(found["base_loss"], found["adapter_loss"], found["place"], strict=True)
    )
    extremes = [place for change, place in changes[:5] if change < 0] + [p for change, p in changes[-5:] if change > 0]
    for place in extremes:
        assert f"<span>{place}</span>" in page
    assert page.count('class="row-head"') == len(extremes)
    assert 'class="d' in page or 'class="u' in page
