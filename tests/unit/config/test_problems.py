"""What the messages say: other tools' names, near matches, what is allowed."""

from __future__ import annotations

import pytest

from lora_cli.config.allowed import Allowed, near, number
from lora_cli.config.json_schema import config_schema
from lora_cli.config.rivals import ADVICE, KEYS

MINIMAL = "model: {name_or_path: gpt2}\ndata: {train: a.jsonl}\noutput_dir: out\n"
ALLOWED = Allowed(config_schema())


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("lr: 1e-4", "train.learning_rate"),
        ("learning_rate: 1e-4", "train.learning_rate"),
        ("epochs: 3", "train.num_train_epochs"),
        ("lora_r: 8", "adapter.r"),
        ("lora_rank: 8", "adapter.r"),
        ("per_device_train_batch_size: 4", "train.batch_size"),
        ("gradient_accumulation_steps: 4", "train.batch_size"),
        ("max_seq_length: 512", "data.max_length"),
        ("cutoff_len: 512", "data.max_length"),
        ("load_in_4bit: true", "model.quantization: {type: nf4}"),
        ("base_model: x", "model.name_or_path"),
        ("sample_packing: true", "always packed"),
        ("adapter: {lora_rank: 8}", "`r`"),
        ("adapter: {R: 8}", "`r`"),
        ("adapter: {dropuot: 0.1}", "`lora_dropout`"),
        ("train: {lr: 1e-4}", "`learning_rate`"),
        ("train: {learning-rate: 1e-4}", "`learning_rate`"),
        ("train: {max_length: 5}", "`data.max_length`"),
        ("train: {xyzzy: 5}", "the keys here are num_train_epochs"),
    ],
)
def test_an_unknown_key_is_answered_with_ours(problems, line, ours):
    (problem,) = problems(MINIMAL + line + "\n")
    assert problem.message == "unknown key"
    assert ours in problem.hint


def test_every_name_in_the_table_leads_to_a_key_that_exists():
    assert len(KEYS) > 40
    for ours, theirs in KEYS.items():
        assert ALLOWED.at(ours.split(".")), ours
        assert theirs.split()
    names = [name for theirs in KEYS.values() for name in theirs.split()]
    assert len(names) == len(set(names)), "a name that leads to two keys"
    assert not set(names) & set(ADVICE)


def test_no_name_in_the_table_is_a_key_of_ours_at_the_same_place():
    for ours, theirs in KEYS.items():
        section = ours.split(".")[:-1]
        assert not set(theirs.split()) & set(ALLOWED.keys(section)), ours


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("train.learning_rate", "a number above 0, such as 2.0e-4"),
        ("train.micro_batch_tokens", "auto or a whole number of 1 or more"),
        ("adapter.lora_dropout", "a number of 0 or more and below 1"),
        ("adapter.use_dora", "true or false"),
        ("data.overlong", "truncate, drop or error"),
        (
            "data.validation",
            "a number above 0 and below 1, text, {path, split, revision, ...}, a list of them or null",
        ),
        ("train.report_to", "a list of tensorboard, wandb, mlflow or trackio"),
    ],
)
def test_what_is_allowed_in_words(path, words):
    assert ALLOWED.words(tuple(path.split("."))) == words


def test_near_matches_ignore_case_and_dashes_and_have_a_limit():
    assert near("Learning-Rate", ["learning_rate", "loss"]) == "learning_rate"
    assert near("zebra", ["learning_rate", "loss"]) is None


@pytest.mark.parametrize(
    ("value", "written"),
    [(2e-4, "2.0e-4"), (1e-8, "1.0e-8"), (0.03, "0.03"), (1.0, "1.0"), (0.0, "0.0"), (0.00125, "1.25e-3")],
)
def test_numbers_are_written_as_in_examples(value, written):
    assert number(value) == written
    assert float(written) == value
