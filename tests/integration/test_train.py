"""`lora train` from config to result: the run folder, the losses, and everything that must not change them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import lora_cli
from lora_cli.config import load_config
from lora_cli.data.order import step_examples
from lora_cli.engine import step
from lora_cli.engine.computation import Computation
from lora_cli.errors import TrainingError, UserError
from lora_cli.report.events import Evaluated, Saved, Stepped, Stopped
from lora_cli.train import run as run_module
from lora_cli.train import train
from lora_cli.train.trackers import Trackers

ROOT = Path(lora_cli.__file__).parents[1]
TRAINING_KEYS = {"step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens", "num_supervised_tokens"} | {
    "tokens_per_second",
    "peak_memory_bytes",
}
SUMMARY_KEYS = {"steps", "num_tokens", "num_supervised_tokens", "train_seconds", "tokens_per_second"} | {
    "final_loss",
    "peak_memory_bytes",
    "parameters",
}


def validation(rows):
    return f"data.validation={rows / 'heldout.jsonl'}"


def assert_close(one, other, tolerance=1e-6):
    assert len(one) == len(other) > 0
    assert one == pytest.approx(other, rel=tolerance, abs=0)


def tensors(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_adapter(one, other, tolerance=2e-4):
    """Adam divides a gradient by its own size, so that rounding of 1e-7 can grow a thousandfold in a weight."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=tolerance, rtol=tolerance), name


# The run folder


def test_run_folder_holds_what_the_contract_says_and_nothing_else(trained, rows):
    run = trained(validation(rows), "train.eval_steps=4", "train.save_steps=3")
    names = {path.name for path in run.folder.iterdir()} - {".lock"}
    assert names == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "summary.json",
        "report.html",
    }
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    assert {path.name for path in (run.folder / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
    }
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".yaml", ".json", ".jsonl", ".safetensors", ".html", ".md", ".jinja", ""}
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~current_umask() for path in files)


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_manifest_names_every_file_of_a_checkpoint(trained):
    run = trained("train.max_steps=2")
    (checkpoint,) = (run.folder / "checkpoints").iterdir()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest.keys() | {"manifest.json"} == {path.name for path in checkpoint.iterdir()}
    for name, facts in manifest.items():
        content = (checkpoint / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_metrics_mean_what_the_contract_says(trained):
    run = trained()
    lines, steps = run.training_lines, [event for event in run.events if isinstance(event, Stepped)]
    assert run.metrics == lines
    assert [line["step"] for line in lines] == [3, 6, 8]
    assert all(set(line) == TRAINING_KEYS for line in lines)
    first = 0
    for line in lines:
        since = steps[first : line["step"]]
        supervised = [event.num_supervised_tokens for event in since]
        loss = sum(event.loss * count for event, count in zip(since, supervised, strict=True)) / sum(supervised)
        assert line["loss"] == pytest.approx(loss, rel=1e-12)
        assert line["num_supervised_tokens"] == sum(supervised)
        assert line["num_tokens"] == sum(event.num_tokens for event in since)
        assert line["grad_norm"] == since[-1].grad_norm
        assert line["epoch"] == pytest.approx(line["step"] / 6, abs=1e-6)
        first = line["step"]
    for key in ("num_tokens", "num_supervised_tokens"):
        assert sum(line[key] for line in lines) == getattr(run.summary, key)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup", "polynomial"])
def test_learning_rate_is_the_one_that_transformers_would_use(trained, schedule):
    run = trained(f"train.lr_scheduler_type={schedule}", "train.warmup_steps=3", "train.logging_steps=1")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=3, num_training_steps=8)
    expected = []
    for _ in range(8):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert [line["learning_rate"] for line in run.training_lines] == expected
    assert expected[0] == 0 and max(expected) == 1e-2


def test_summary_holds_the_final_figures(trained, lora, config_file):
    run = trained("train.max_steps=5")
    written = json.loads((run.folder / "summary.json").read_text())
    assert written.keys() >= SUMMARY_KEYS
    assert written == json.loads(json.dumps(run.summary.as_json()))
    assert (written["steps"], written["loss_span"]) == (5, 2)
    steps = [event for event in run.events if isinstance(event, Stepped)]
    last = steps[-2:]
    weights = [event.num_supervised_tokens for event in last]
    mean = sum(event.loss * weight for event, weight in zip(last, weights, strict=True)) / sum(weights)
    assert written["final_loss"] == pytest.approx(mean, rel=1e-12)
    assert written["peak_memory_bytes"] > 1e8 and written["train_seconds"] > 0
    code, out, _ = lora("params", config_file, "--json")
    assert (code, json.loads(out)) == (0, written["parameters"])


def test_environment_says_where_the_run_was_made(trained, rows):
    run = trained("train.max_steps=1", validation(rows))
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["packages"].keys() >= {"torch", "transformers", "peft", "bitsandbytes"}
    assert environment["device"] == "cpu" and environment["threads"] == 1
    assert "git" in environment
    assert all(environment["fingerprints"][name] for name in ("base", "train", "validation", "tokenizer"))
    assert str(Path.home()) not in json.dumps(environment)


def test_the_resolved_config_repeats_the_run_to_the_bit(trained, tmp_path):
    run = trained("data.validation=0.2", "train.eval_steps=0.3", "adapter.r=4")
    again = load_config(run.folder / "config.yaml", [f"output_dir={tmp_path / 'again'}"])
    assert again.model_fields_set == {"model", "adapter", "data", "train", "sweep", "output_dir"}
    for section in (again.model, again.adapter, again.data, again.train):
        assert section.model_fields_set == type(section).model_fields.keys(), "every key is written"
    assert "auto" not in [*again.model.model_dump().values(), *again.train.model_dump().values()]
    train(again)
    assert (tmp_path / "again" / "adapter" / "adapter_model.safetensors").read_bytes() == run.adapter_bytes
    ours, theirs = ((folder / "metrics.jsonl").read_text().count("\n") for folder in (run.folder, tmp_path / "again"))
    assert ours == theirs


def test_another_seed_is_another_run(trained, tmp_path):
    one = trained("train.max_steps=2")
    other = trained("train.max_steps=2", "train.seed=43", f"output_dir={tmp_path / 'other'}")
    assert one.losses != other.losses and one.adapter_bytes != other.adapter_bytes


# What changes memory and speed, and never the result


@pytest.fixture
def plain(trained, tmp_path):
    """The run that the others are compared with."""
    return trained(f"output_dir={tmp_path / 'plain'}")


@pytest.mark.parametrize(
    "override",
    [
        "train.micro_batch_tokens=1",
        "train.micro_batch_tokens=100",
        "train.micro_batch_tokens=1000000",
        "train.loss=full",
        "train.gradient_checkpointing=true",
        "model.attn_implementation=eager",
    ],
)
def test_how_it_is_computed_does_not_change_the_losses(trained, plain, override):
    run = trained(override)
    assert_close(run.losses, plain.losses)
    assert_same_adapter(run.folder, plain.folder)


def test_losses_are_those_of_a_plain_padded_loop(trained, tiny, rows):
    """transformers, PEFT and PyTorch alone: padded rows, the mean over labels, AdamW, clipping, cosine."""
    run = trained("train.max_grad_norm=0.3")
    assert_close(run.losses, padded_loop(tiny, rows, 0.3))
    assert max(line["grad_norm"] for line in run.training_lines) > 0.3, "it is clipped"


def padded_loop(tiny, rows, max_grad_norm):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    encoded = [encode(tokenizer, json.loads(line)) for line in (rows / "train.jsonl").read_text().splitlines()]
    fresh = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    torch.manual_seed(42)
    ours = get_peft_model(
        fresh,
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=True),
    )
    trainable = [p for p in ours.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=8)
    losses = []
    for number in range(1, 9):
        chosen = [encoded[i] for i in step_examples(number, seed=42, count=len(encoded), batch_size=8)]
        longest = max(len(ids) for ids, _ in chosen)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in chosen])
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in chosen])
        attended = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in chosen])
        logits = ours(input_ids=ids, attention_mask=attended).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def encode(tokenizer, row):
    """Token ids and labels of a conversation, by rendering it turn by turn."""
    ids, labels = [], []
    for number, message in enumerate(row["messages"], 1):
        text = tokenizer.apply_chat_template(row["messages"][:number], tokenize=False)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        new = whole[len(ids) :]
        trained = [-100] * len(new)
        if message["role"] == "assistant":
            header = len(tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"])
            trained[header:-1] = new[header:-1]  # all but the newline after the turn
        ids, labels = whole, labels + trained
    return ids, labels


def test_two_processes_take_the_steps_of_one(plain, config_file, tmp_path):
    """The last batch of an epoch has one example: a process without a micro-batch takes part all the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command += ["-m", "lora_cli", "train", str(config_file), "--json"]
    command += ["--output-dir", str(tmp_path / "two"), "--set", "train.logging_steps=1"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert_close([line["loss"] for line in lines], plain.losses)
    assert_same_adapter(tmp_path / "two", plain.folder)
    for key in ("num_tokens", "num_supervised_tokens", "steps"):
        assert summary[key] == getattr(plain.summary, key)


# Quantized bases


@pytest.mark.parametrize(("kind", "layer"), [("nf4", "Linear4bit"), ("fp4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_quantized_bases_train_through_bitsandbytes(trained, plain, rows, kind, layer):
    run = trained(f"model.quantization={{type: {kind}}}", validation(rows))
    layers = [module for name, module in run.model.named_modules() if name.endswith("base_layer")]
    assert len(layers) == 8 and {type(module).__name__ for module in layers} == {layer}
    assert run.losses[0] == pytest.approx(plain.losses[0], rel=0.02) and run.losses[0] != plain.losses[0]
    assert run.summary.final_eval_loss < run.summary.first_eval_loss
    assert all(torch.isfinite(tensor).all() for tensor in tensors(run.folder).values())


@pytest.mark.parametrize("quantization", ["null", "{type: nf4}", "{type: int8}"])
def test_an_evaluation_in_between_changes_no_bit(trained, rows, tmp_path, quantization):
    quantized = f"model.quantization={quantization}"
    without = trained(quantized, "train.max_steps=5")
    between = trained(
        quantized, "train.max_steps=5", validation(rows), "train.eval_steps=2", f"output_dir={tmp_path / 'evaluated'}"
    )
    assert [line["step"] for line in between.evaluations] == [0, 2, 4, 5]
    assert between.losses == without.losses
    assert between.adapter_bytes == without.adapter_bytes


# The result


def logits_of(model, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = torch.tensor([tokenizer("when we met it rained all over town")["input_ids"]])
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_the_adapter_loads_in_plain_peft_with_the_same_logits(trained, tiny):
    run = trained()
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    before = logits_of(base, tiny)
    loaded = PeftModel.from_pretrained(base, run.folder / "adapter")
    run.model.get_base_model().set_attn_implementation("sdpa")
    live, plain = logits_of(run.model, tiny), logits_of(loaded, tiny)
    assert torch.allclose(live, plain, atol=1e-5)
    assert (plain - before).abs().max() > 0.1, "the adapter does something"
    config = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny) and config["inference_mode"]


def test_full_fine_tuning_trains_everything_and_loads_in_transformers(trained, tiny):
    run = trained("adapter=null", "train.learning_rate=1e-3")
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    saved = AutoModelForCausalLM.from_pretrained(run.folder / "adapter", dtype=torch.float32)
    before = dict(base.named_parameters())
    assert all(not torch.equal(parameter, before[name]) for name, parameter in saved.named_parameters())
    run.model.set_attn_implementation("sdpa")
    assert torch.allclose(logits_of(run.model, tiny), logits_of(saved, tiny), atol=1e-5)
    assert run.summary.parameters.trainable == sum(p.numel() for p in base.parameters())
    theirs, ours = (json.loads((f / "config.json").read_text()) for f in (tiny, run.folder / "adapter"))
    assert ours == theirs, "nothing of how it was trained is left in the model's own config"


def test_an_existing_adapter_is_gone_on_from(trained, rows, tmp_path):
    first = trained(validation(rows), "adapter.r=4")
    second = trained(validation(rows), f"adapter.path={first.folder / 'adapter'}", f"output_dir={tmp_path / 'second'}")
    assert second.evaluations[0]["eval_loss"] == pytest.approx(first.summary.final_eval_loss, rel=1e-6)
    assert second.summary.parameters == first.summary.parameters, "its own rank, not the default one"
    assert tensors(second.folder).keys() == tensors(first.folder).keys()


# Evaluation


def test_evaluation_losses_equal_a_direct_computation(trained, tiny, rows):
    run = trained(validation(rows))
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    heldout = [encode(tokenizer, json.loads(line)) for line in (rows / "heldout.jsonl").read_text().splitlines()]

    def direct(model):
        losses = [cross_entropy(model(torch.tensor([i])).logits[0, :-1], torch.tensor(t[1:])) for i, t in heldout]
        counts = [sum(label >= 0 for label in labels) for _, labels in heldout]
        return sum(float(loss) * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)

    with torch.no_grad():
        before = direct(base)
        after = direct(PeftModel.from_pretrained(base, run.folder / "adapter"))
    assert run.evaluations[0] == {"step": 0, "eval_loss": pytest.approx(before, rel=1e-6)}
    assert run.evaluations[-1] == {"step": 8, "eval_loss": pytest.approx(after, rel=1e-6)}
    assert (run.summary.first_eval_loss, run.summary.final_eval_loss) == (
        run.evaluations[0]["eval_loss"],
        run.evaluations[-1]["eval_loss"],
    )


def test_early_stopping_and_the_best_state(trained, rows):
    """A wild learning rate makes the loss rise again: the run stops, and the result is the best state, not the last."""
    run = trained(
        validation(rows),
        "train.learning_rate=0.1",
        "train.lr_scheduler_type=constant",
        "train.max_steps=60",
        "train.eval_steps=2",
        "train.early_stopping_patience=3",
        "train.load_best_model_at_end=true",
        "train.save_total_limit=1",
    )
    losses = {line["step"]: line["eval_loss"] for line in run.evaluations if line["step"]}
    best = min(losses, key=losses.__getitem__)
    assert run.summary.best_step == best and run.summary.best_eval_loss == losses[best]
    assert run.summary.steps == best + 2 * 3 < 60, "three evaluations without a lower loss"
    assert run.summary.stopped and any(isinstance(event, Stopped) for event in run.events)
    kept = {int(path.name.removeprefix("step-")) for path in (run.folder / "checkpoints").iterdir()}
    assert kept == {best, run.summary.steps}
    at_best = load_file(run.folder / "checkpoints" / f"step-{best:08}" / "trainable.safetensors")
    at_end = tensors(run.folder)
    assert len(at_best) == len(at_end)
    for name, tensor in at_best.items():
        assert torch.equal(tensor, at_end[name.replace(".default", "")]), name


def test_a_share_of_the_steps_is_rounded_up_as_in_transformers(trained, rows):
    run = trained(validation(rows), "train.max_steps=5", "train.eval_steps=0.3")
    assert [line["step"] for line in run.evaluations] == [0, 2, 4, 5]


# When things go wrong on the way


def test_out_of_memory_halves_the_micro_batches_and_changes_nothing_else(trained, plain, monkeypatch):
    accumulate = step.accumulate
    calls = 0

    def short_of_memory(*arguments):
        nonlocal calls
        calls += 1
        if calls in (4, 9):
            raise torch.OutOfMemoryError
        return accumulate(*arguments)

    monkeypatch.setattr(step, "accumulate", short_of_memory)
    run = trained("train.micro_batch_tokens=256")
    assert_close(run.losses, plain.losses)
    halvings = [line for line in run.metrics if line.get("out_of_memory")]
    assert [line["micro_batch_tokens"] for line in halvings] == [128, 64]
    assert len(run.warnings) == 2
    for line, text in zip(halvings, run.warnings, strict=True):
        assert f"step {line['step']}" in text and f"{line['micro_batch_tokens']} tokens" in text
    assert [line["step"] for line in run.training_lines] == [3, 6, 8]


def test_out_of_memory_in_an_evaluation_halves_as_well(trained, rows, monkeypatch, tmp_path):
    undisturbed = trained(validation(rows), f"output_dir={tmp_path / 'undisturbed'}")
    token_losses = Computation.token_losses
    calls = 0

    def short_of_memory(self, model, batch):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError
        return token_losses(self, model, batch)

    monkeypatch.setattr(Computation, "token_losses", short_of_memory)
    run = trained(validation(rows))
    losses, expected = ([line["eval_loss"] for line in each.evaluations] for each in (run, undisturbed))
    assert_close(losses, expected)
    assert [line["micro_batch_tokens"] for line in run.metrics if line.get("out_of_memory")] == [2048]


def test_out_of_memory_with_one_row_at_a_time_ends_the_run_and_keeps_its_steps(trained, plain, monkeypatch, settings):
    accumulate = step.accumulate
    full = False

    def short_of_memory(*arguments):
        if full:
            raise torch.OutOfMemoryError
        return accumulate(*arguments)

    def fill(event):
        nonlocal full
        full = full or (isinstance(event, Stepped) and event.step == 4)

    monkeypatch.setattr(step, "accumulate", short_of_memory)
    with pytest.raises(TrainingError, match="out of memory at step 5, with one row at a time") as error:
        trained(emit=fill)
    assert error.value.exit_code == 2
    assert "data.max_length" in (error.value.remedy or "") and "step-00000004" in (error.value.remedy or "")
    full = False
    monkeypatch.setattr(step, "accumulate", accumulate)
    run = trained("train.micro_batch_tokens=4096", resume=True)
    assert_close(run.losses, plain.losses[4:])


@pytest.fixture
def not_finite(monkeypatch):
    """Spoil the loss of chosen steps; each step is one micro-batch here."""
    bad: set[int] = set()
    calls = 0
    accumulate = step.accumulate

    def spoiled(*arguments):
        nonlocal calls
        calls += 1
        return accumulate(*arguments) * (float("nan") if calls in bad else 1.0)

    monkeypatch.setattr(step, "accumulate", spoiled)
    return bad


def test_a_non_finite_step_is_skipped_and_its_rows_are_named(trained, not_finite):
    not_finite.add(4)
    run = trained()
    assert run.summary.steps == 8
    (warning,) = run.warnings
    assert "step 4: the loss is not finite" in warning and warning.count("train.jsonl:") == 8
    assert all(torch.isfinite(tensor).all() for tensor in tensors(run.folder).values())
    lines = run.training_lines
    assert [line["step"] for line in lines] == [3, 6, 8]
    assert all(isinstance(line["loss"], float) for line in lines), "one bad step doesn't hide the others' loss"
    steps = {event.step: event for event in run.events if isinstance(event, Stepped)}
    good = [steps[5], steps[6]]
    count = sum(event.num_supervised_tokens for event in good)
    assert lines[1]["loss"] == pytest.approx(sum(e.loss * e.num_supervised_tokens for e in good) / count, rel=1e-12)
    assert lines[1]["num_supervised_tokens"] == count
    assert isinstance(run.summary.final_loss, float) and run.summary.final_loss == run.summary.final_loss
    assert any(line.get("skipped") for line in run.metrics if line["step"] == 4)


def test_a_skipped_step_leaves_parameters_as_they_were(trained, not_finite, tmp_path):
    shorter = trained("train.max_steps=4", "train.lr_scheduler_type=constant", f"output_dir={tmp_path / 'shorter'}")
    not_finite.update({4 + 5})
    run = trained("train.max_steps=5", "train.lr_scheduler_type=constant")
    assert run.adapter_bytes == shorter.adapter_bytes


def test_three_bad_steps_in_a_row_end_the_run(trained, not_finite):
    not_finite.update({2, 4, 5, 6})
    with pytest.raises(TrainingError, match=r"3 steps in a row.* the last at step 6") as error:
        trained()
    assert "train.jsonl:" in (error.value.remedy or "")


# Nothing is being learned


def test_a_learning_rate_that_vanishes_in_float32_is_an_error(trained):
    """B starts at zero, and an update of 1e-60 leaves it there."""
    with pytest.raises(TrainingError, match="nothing is being learned: after 3 steps") as error:
        trained("train.learning_rate=1e-60", "train.warmup_steps=0")
    assert "train.learning_rate" in (error.value.remedy or "")


@pytest.fixture
def cut_off(monkeypatch):
    """Take the gradient from some parameters, as where a layer's output isn't used."""

    def cut_off(part):
        make_trainable = run_module.make_trainable

        def cut(*arguments):
            model = make_trainable(*arguments)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and part in name:
                    parameter.register_hook(torch.zeros_like)
            return model

        monkeypatch.setattr(run_module, "make_trainable", cut)

    return cut_off


def test_gradients_that_are_all_zero_are_an_error(trained, cut_off):
    cut_off("lora_")
    with pytest.raises(TrainingError, match="every gradient is zero"):
        trained("adapter.init_lora_weights=false")


def test_targets_without_a_gradient_are_named(trained, cut_off):
    """The run learns, and one of its targets doesn't."""
    cut_off(".h.1.attn.c_attn.")
    (warning,) = trained("train.max_steps=4").warnings
    assert "1 of 8 targets" in warning and "transformer.h.1.attn.c_attn" in warning


def test_warming_up_from_zero_is_not_held_against_a_run(trained):
    assert trained("train.warmup_steps=6").summary.steps == 8


def test_float16_scaler_skips_are_not_counted(trained):
    """The scaler starts too high on purpose, and skips until the gradients fit."""
    run = trained("model.dtype=float16", "train.max_steps=6")
    assert run.summary.steps == 6 and not any("not finite" in text for text in run.warnings)


# Trackers


def test_tensorboard_gets_every_line(trained, rows):
    run = trained(validation(rows), "train.report_to=[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = run.folder.rglob("events.out.tfevents.*")
    scalars = EventAccumulator(str(min(files, key=lambda path: len(path.parts)).parent))  # deeper ones hold settings
    scalars.Reload()
    for name, lines in (("loss", run.training_lines), ("eval_loss", run.evaluations)):
        logged = [(event.step, event.value) for event in scalars.Scalars(name)]
        assert logged == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(trained, settings, monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "mlflow" else find_spec(name, *a))
    with pytest.raises(UserError, match="report_to: mlflow is not installed") as error:
        trained("train.report_to=[mlflow]")
    assert "pip install" in (error.value.remedy or "")
    assert not Path(settings().output_dir).exists()


def test_checkpoints_are_kept_up_to_the_limit(trained):
    run = trained("train.save_steps=1", "train.save_total_limit=3", "train.max_steps=6")
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == [f"step-{n:08}" for n in (4, 5, 6)]
    assert [event.step for event in run.events if isinstance(event, Saved)] == [1, 2, 3, 4, 5, 6]
    assert not any(isinstance(event, Evaluated) for event in run.events)
    shutil.rmtree(run.folder)


def test_what_a_tracker_prints_never_reaches_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    """trackio says good-bye on stdout, where `--json` promises one document."""

    class Chatty:
        def log(self, values: dict[str, Any], step: int) -> None:
            print(f"logged {values} at {step}")

        def finish(self) -> None:
            print("good-bye")

    trackers = Trackers((Chatty(),))
    trackers.log({"step": 1, "loss": 0.5})
    trackers.finish()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "logged {'loss': 0.5} at 1\ngood-bye\n"
