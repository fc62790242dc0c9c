"""`lora eval` and `lora generate`: base and adapter on the same rows, against plain transformers and PEFT."""

from __future__ import annotations

import json
import math
import shutil

import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.engine.generation import Sampling
from lora_cli.engine.trained import find_target
from lora_cli.errors import DataError, ModelError, RunFolderError, UserError
from lora_cli.evaluate import evaluate, generate
from lora_cli.evaluate.models import load_target, read_target
from lora_cli.evaluate.rows import load_rows
from lora_cli.report.events import Warned, ignore
from tests.integration.adapters import make_adapter, make_harmful_adapter


@pytest.fixture(scope="session")
def finished(tmp_path_factory, write_config, tiny, rows):
    """A run folder with an adapter of random weights, far from its base; copy it before changing it."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, data={"validation": str(rows / "heldout.jsonl")})
    run = folder / "run"
    make_adapter(run / "adapter", tiny, scale=0.3)
    shutil.copy(config, run / "config.yaml")
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copied")


def plain_losses(model, examples):
    """Summed loss and right tokens of each row, one at a time, the way that transformers does it."""
    losses, right = [], []
    for index in range(len(examples)):
        example = examples.example(index)
        ids = torch.tensor(example.input_ids, dtype=torch.long)[None]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
        trained = torch.tensor(example.trained)[1:]
        targets = ids[0, 1:][trained]
        losses.append(float(cross_entropy(logits[trained], targets, reduction="sum")))
        right.append(int((logits[trained].argmax(-1) == targets).sum()))
    return losses, right


@pytest.mark.parametrize(
    "overrides",
    [(), ("train.micro_batch_tokens=1",), ("train.loss=full",), ("model.attn_implementation=eager",)],
    ids=["packed", "alone", "full-loss", "masked"],
)
def test_every_row_is_scored_as_plain_transformers_does(run, tiny, overrides):
    target = find_target(run)
    reader = read_target(target)
    examples = load_rows(target, reader, None, limit=None, emit=ignore).examples
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    base_losses, base_right = plain_losses(base, examples)
    adapted = PeftModel.from_pretrained(base, run / "adapter").eval()
    adapter_losses, adapter_right = plain_losses(adapted, examples)

    result = evaluate(run, overrides=overrides)
    rows = pyarrow.parquet.read_table(run / "eval" / "validation" / "rows.parquet").to_pydict()
    tokens = rows["num_supervised_tokens"]
    assert [loss * n for loss, n in zip(rows["base_loss"], tokens, strict=True)] == pytest.approx(base_losses, rel=1e-6)
    assert [loss * n for loss, n in zip(rows["adapter_loss"], tokens, strict=True)] == pytest.approx(
        adapter_losses, rel=1e-6
    )
    assert (rows["base_correct_tokens"], rows["adapter_correct_tokens"]) == (base_right, adapter_right)
    measures = {measure.name: measure for measure in result.comparison.measures}
    assert measures["loss"].base == pytest.approx(sum(base_losses) / sum(tokens), rel=1e-6)
    assert measures["loss"].adapter == pytest.approx(sum(adapter_losses) / sum(tokens), rel=1e-6)
    assert measures["token_accuracy"].adapter == pytest.approx(sum(adapter_right) / sum(tokens))
    text = sum(rows["supervised_bytes"])
    assert measures["bits_per_byte"].base == pytest.approx(sum(base_losses) / math.log(2) / text, rel=1e-6)
    assert max(abs(a - b) for a, b in zip(base_losses, adapter_losses, strict=True)) > 0.1


def test_the_json_holds_what_is_promised(run, lora):
    code, out, _ = lora("eval", run, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["rows"] == 6
    for name in ("loss", "perplexity", "token_accuracy", "bits_per_byte"):
        assert found["difference"][name] == pytest.approx(found["adapter"][name] - found["base"][name])
    assert found["difference"]["low"] <= found["difference"]["loss"] <= found["difference"]["high"]
    assert json.loads((run / "eval" / "validation" / "summary.json").read_text()) == found


def test_zero_b_is_no_difference(run, tiny, lora):
    shutil.rmtree(run / "adapter")
    make_adapter(run / "adapter", tiny, scale=0)
    code, out, _ = lora("eval", run, "--json", "--generate", "--fail-if-worse")
    found = json.loads(out)
    assert code == 0
    assert found["outcome"] == "no difference"
    difference = found["difference"]
    assert {value for value in difference.values() if isinstance(value, float)} == {0.0}
    assert {bound for bounds in difference["intervals"].values() for bound in bounds} == {0.0}
    assert (found["rows_better"], found["rows_worse"]) == (0, 0)


@pytest.mark.parametrize("asked", [("--fail-if-worse",), ("--min-improvement", "0")])
def test_a_harmful_adapter_exits_3_after_saying_why(run, tiny, lora, asked):
    shutil.rmtree(run / "adapter")
    make_harmful_adapter(run / "adapter", tiny)
    assert lora("eval", run)[0] == 0
    code, out, err = lora("eval", run, *asked)
    assert code == 3
    assert "verdict  worse: loss +" in out
    assert "Traceback" not in err
    code, out, _ = lora("eval", run, "--json", *asked)
    assert code == 3
    assert json.loads(out)["demand"]["met"] is False


def test_nf4_is_judged_on_nf4_and_on_the_original_when_asked(run, tiny):
    nf4 = ("model.quantization={type: nf4, allow_partial: true}",)
    as_trained = evaluate(run, overrides=nf4)
    both = evaluate(run, overrides=nf4, base="both")
    plain = evaluate(run)
    assert as_trained.comparison.precision == "nf4, double quant"
    assert both.comparison.measures == as_trained.comparison.measures
    assert both.others[0].precision == "float32"
    assert both.others[0].measures == plain.comparison.measures
    assert as_trained.comparison.loss.base != plain.comparison.loss.base
    with pytest.raises(UserError, match="not quantized"):
        evaluate(run, base="both")


def test_zero_b_on_nf4_is_no_difference(run, tiny):
    shutil.rmtree(run / "adapter")
    make_adapter(run / "adapter", tiny, scale=0)
    nf4 = ("model.quantization={type: nf4, allow_partial: true}", "model.dtype=bfloat16")
    result = evaluate(run, overrides=nf4)
    assert result.comparison.outcome == "no difference"
    assert result.comparison.loss.difference == 0.0


def test_a_moved_run_an_adapter_and_a_config_are_the_same_target(run, rows, tmp_path):
    by_run = evaluate(run)
    by_adapter = evaluate(run / "adapter")
    by_config = evaluate(run / "config.yaml", overrides=[f"output_dir={run}"])
    assert by_run.comparison.measures == by_adapter.comparison.measures == by_config.comparison.measures
    bare = shutil.copytree(run / "adapter", tmp_path / "bare")
    alone = evaluate(bare, data=str(rows / "heldout.jsonl"), overrides=["model.dtype=float32", "data.max_length=96"])
    assert alone.comparison.loss.adapter == pytest.approx(by_run.comparison.loss.adapter, rel=1e-6)
    assert alone.folder is None
    assert by_run.warnings == by_adapter.warnings == by_config.warnings == ()
    [doubt] = alone.warnings
    assert "quantized" in doubt
    nf4 = ["model.dtype=float32", "data.max_length=96", "model.quantization={type: nf4, allow_partial: true}"]
    told = evaluate(bare, data=str(rows / "heldout.jsonl"), overrides=nf4)
    assert (told.warnings, told.comparison.precision) == ((), "nf4, double quant")
    assert not (bare / "eval").exists()


def test_the_base_is_as_it_was_after_an_adapter(run, tiny, tmp_path):
    make_adapter(tmp_path / "bias", tiny, scale=0.3, bias="all", modules_to_save=["wpe"])
    target = find_target(run)
    loaded = load_target(target, read_target(target), ignore)
    before = {name: value.clone() for name, value in loaded.base.state_dict().items()}
    with loaded.trained(run / "adapter") as model:
        assert any("lora_A" in name for name, _ in model.named_parameters())
    after = loaded.base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_several_adapters_are_judged_on_one_base(run, tiny, tmp_path):
    make_adapter(tmp_path / "other", tiny, scale=0.3, seed=1)
    result = evaluate(run, adapters=[str(tmp_path / "other"), str(run)])
    other, again = result.others
    assert again.measures == result.comparison.measures
    assert other.loss.base == result.comparison.loss.base
    assert other.loss.adapter != result.comparison.loss.adapter


def test_answers_are_those_of_transformers(run, tiny):
    result = evaluate(run, generate=True, max_new_tokens=7)
    rows = pyarrow.parquet.read_table(run / "eval" / "validation" / "rows.parquet").to_pydict()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), run / "adapter"
    )
    for who, model in (("base", base), ("adapter", adapted.eval())):
        for prompt, answer in zip(rows["prompt"], rows[f"{who}_answer"], strict=True):
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
            output = model.generate(**ids, max_new_tokens=7, do_sample=False)[0, ids["input_ids"].shape[1] :]
            assert tokenizer.decode(output, skip_special_tokens=True) == answer
    assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in rows["prompt"])
    measures = {measure.name: measure for measure in result.comparison.measures}
    ended = [reason == "stop" for reason in rows["adapter_stop_reason"]]
    assert measures["ended_by_itself"].adapter == pytest.approx(sum(ended) / len(ended))
    assert result.answers == 6


def test_rows_that_were_trained_on_are_named(run, rows):
    heard = []
    result = evaluate(run, data=str(rows / "train.jsonl"), emit=heard.append)
    assert result.warnings[0].startswith("41 of 41 rows were trained on")
    assert Warned(result.warnings[0]) in heard
    assert (run / "eval" / "train" / "summary.json").is_file()
    clean = evaluate(run, data=str(rows / "heldout.jsonl"))
    assert not any("trained on" in text for text in clean.warnings)


def test_held_out_rows_were_not_trained_on(run, rows):
    """The file is the training file, but the run left a share of it out: those rows, and only those, are new."""
    share = ["data.validation=0.25"]
    held = evaluate(run, overrides=share)
    assert held.rows == 10
    assert not any("trained on" in text for text in held.warnings)
    whole = evaluate(run, data=str(rows / "train.jsonl"), overrides=share)
    assert whole.warnings[0].startswith("31 of 41 rows were trained on")


def test_validation_rows_that_were_trained_on_are_named(run, rows, tmp_path):
    """Among six rows to validate on, two are copies of training rows, under other names and beside other columns."""
    copies = [json.loads(line) for line in (rows / "train.jsonl").read_text().splitlines()[3:5]]
    held = [json.loads(line) for line in (rows / "heldout.jsonl").read_text().splitlines()]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps({"id": n, **row}) + "\n" for n, row in enumerate([*held, *copies])))
    result = evaluate(run, overrides=[f"data.validation={mixed}"])
    assert result.warnings[0] == "2 of 8 rows were trained on; the first is mixed.jsonl:7"
    assert evaluate(run).warnings == ()
    few = evaluate(run, data=str(mixed), limit=5)  # the count is of those that are judged
    places = pyarrow.parquet.read_table(run / "eval" / "mixed" / "rows.parquet").to_pydict()["place"]
    seen = [place for place in places if place in ("mixed.jsonl:7", "mixed.jsonl:8")]
    assert seen
    assert few.warnings[0] == f"{len(seen)} of 5 rows were trained on; the first is {seen[0]}"


def test_a_run_that_held_nothing_out_says_so(run):
    result = evaluate(run, overrides=["data.validation=null"])
    assert (result.data, result.rows) == ("train", 41)
    assert "holds no rows out" in result.warnings[0]


def test_a_limit_draws_the_same_rows_each_time(run):
    one, same = (evaluate(run, limit=4) for _ in range(2))
    assert one.rows == 4
    assert one.comparison == same.comparison
    assert one.comparison.outcome == "can't tell"
    places = pyarrow.parquet.read_table(run / "eval" / "validation" / "rows.parquet").to_pydict()["place"]
    assert len(set(places)) == 4


def test_full_fine_tuning_is_judged_against_its_base(run, tiny):
    shutil.rmtree(run / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    model.save_pretrained(run / "adapter")
    result = evaluate(run, overrides=["adapter=null"], generate=True)
    assert result.comparison.loss.difference != 0
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).state_dict())
    model.save_pretrained(run / "adapter")
    assert evaluate(run, overrides=["adapter=null"]).comparison.outcome == "no difference"


def break_nothing_there(run):
    shutil.rmtree(run)


def break_no_adapter(run):
    shutil.rmtree(run / "adapter")


def break_no_config(run):
    (run / "config.yaml").unlink()


def break_pickle(run):
    (run / "adapter" / "adapter_model.safetensors").rename(run / "adapter" / "adapter_model.bin")


def break_other_names(run):
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name.replace(".h.1.", ".h.9."): tensor for name, tensor in tensors.items()}, path)


def break_other_shapes(run):
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.cat([tensor, tensor], 1) for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        (break_nothing_there, UserError, "nothing at"),
        (break_no_adapter, RunFolderError, "no result at"),
        (break_no_config, UserError, "neither config.yaml nor adapter_config.json"),
        (break_pickle, ModelError, "pickle"),
        (break_other_names, ModelError, "doesn't fit its base"),
        (break_other_shapes, ModelError, "doesn't fit its base"),
    ],
)
def test_what_cant_be_judged_is_refused_and_nothing_is_written(run, lora, how, error, says):
    how(run)
    with pytest.raises(error, match=says):
        evaluate(run)
    code, out, err = lora("eval", run, "--json")
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err
    assert not (run / "eval").exists()


def test_missing_data_is_refused_before_weights_are_read(run):
    heard = []
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        evaluate(run, data="nowhere.jsonl", emit=heard.append)
    assert not any(getattr(event, "what", "") == "loading weights" for event in heard)


def test_a_folder_that_cant_be_written_costs_no_figures(run, monkeypatch):
    (run / "eval").write_text("in the way")
    heard = []
    result = evaluate(run, emit=heard.append)
    assert result.folder is None
    assert result.rows == 6
    assert any("not kept" in event.text for event in heard if isinstance(event, Warned))


def test_an_evaluation_replaces_the_one_before(run):
    evaluate(run, limit=5)
    evaluate(run)
    assert json.loads((run / "eval" / "validation" / "summary.json").read_text())["rows"] == 6
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["validation"]


def test_generate_gives_base_and_adapters_for_each_prompt(run, tiny, tmp_path, lora):
    make_adapter(tmp_path / "other", tiny, scale=0.3, seed=1)
    (tmp_path / "prompts.txt").write_text("when it rained\n\nthe rent is due\n")
    prompted = ("--prompt", "noon", "--prompts-file", tmp_path / "prompts.txt", "--max-new-tokens", "6")
    code, out, _ = lora("generate", run, *prompted, "--adapter", tmp_path / "other", "--json")
    outputs = json.loads(out)["outputs"]
    assert code == 0
    who = [None, str(run / "adapter"), str(tmp_path / "other")]
    prompts = ["noon", "when it rained", "the rent is due"]
    assert [(one["prompt"], one["adapter"]) for one in outputs] == [(prompt, one) for prompt in prompts for one in who]
    assert {one["stop_reason"] for one in outputs} <= {"stop", "length"}
    assert lora("generate", run, "--prompt", "noon", "--max-new-tokens", "6")[0] == 0


def test_generation_stops_where_positions_end(run):
    sampling = Sampling(max_new_tokens=500)
    result = generate(run, prompts=["noon " * 15], sampling=sampling)
    assert len(result.outputs) == 2
    with pytest.raises(UserError, match="positions"):
        generate(run, prompts=["noon " * 400], sampling=sampling)


def test_a_prompt_is_needed(run, lora):
    code, out, err = lora("generate", run)
    assert (code, out) == (2, "")
    assert "--prompt" in err


def test_sampling_is_seeded(run):
    def texts(seed):
        sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=seed)
        return [output.text for output in generate(run, prompts=["noon"], sampling=sampling).outputs]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
