"""A grid of settings: its members, and everything that can be wrong with it, each with its place."""

from __future__ import annotations

import pytest

from lora_cli.config import load_grid
from lora_cli.errors import ConfigError

CONFIG = "model: {name_or_path: gpt2}\ndata: {train: a.jsonl}\noutput_dir: out\n"


@pytest.fixture
def file(tmp_path):
    def write(sweep, config=CONFIG):
        path = tmp_path / "sweep.yaml"
        path.write_text(f"{config}sweep: {sweep}\n" if sweep else config)
        return path

    return write


def test_members_are_all_combinations_with_names_and_folders_of_their_own(file):
    found = load_grid(file("{grid: {adapter.r: [8, 16], train.learning_rate: [1e-4, 2e-4]}}"))
    assert [member.name for member in found.members] == [
        "01-r8-lr1e-4",
        "02-r8-lr2e-4",
        "03-r16-lr1e-4",
        "04-r16-lr2e-4",
    ]
    last = found.members[-1].config
    assert (last.adapter.r, last.adapter.lora_alpha, last.train.learning_rate) == (16, 32, 2e-4)
    assert last.output_dir.endswith("out/04-r16-lr2e-4") and last.sweep is None


def test_options_add_to_the_grid_and_replace(file):
    path = file("{grid: {adapter.r: [8, 16]}}")
    found = load_grid(path, grid=["adapter.r=[4]", "train.seed=[1, 2, 3]"])
    assert [(m.config.adapter.r, m.config.train.seed) for m in found.members] == [(4, 1), (4, 2), (4, 3)]
    assert len(load_grid(file(""), grid=["train.seed=[1, 2]"]).members) == 2


@pytest.mark.parametrize(
    ("sweep", "named"),
    [
        ("", "missing"),
        ("{grid: {}}", "sweep.grid"),
        ("{grid: {adapter.r: []}}", "adapter.r"),
        ("{grid: {adapter.r: [8, 8]}}", "given twice"),
        ("{grid: {adapter.r: [8, fast]}}", "not a whole number"),
        ("{grid: {adapter.rank: [8, 16]}}", "unknown key"),
        ("{grid: {model.name_or_path: [a, b]}}", "all members train on one base"),
        ("{grid: {model.quantization: [null, {type: nf4}]}}", "all members train on one base"),
        ("{grid: {data.max_length: [8, 16]}}", "all members are tokenized alike"),
        ("{grid: {train.micro_batch_tokens: [8, 16]}}", "can't differ"),
        ("{grid: {adapter.use_dora: [true, false]}}", "can't differ"),
        ("{grid: {train.seed: [1, 2, 3, 4]}, max_members: 3}", "4 combinations; at most 3"),
        ("{grid: {adapter.r: [16], adapter.lora_alpha: [32, null]}}", "are the same run"),
        ("{grid: {train.seed: [1, 2]}, halving: {every: 5}}", "no validation data"),
        ("{grid: {train.seed: [1, 2]}, halving: {every: 0}}", "halving.every"),
        ("{grid: {train.seed: 1, x: 2}}", "is not a list"),
    ],
)
def test_a_mistake_is_named(file, sweep, named):
    with pytest.raises(ConfigError) as error:
        load_grid(file(sweep))
    assert any(named in f"{each.key} {each.message} {each.hint}" for each in error.value.problems), error.value.problems


@pytest.mark.parametrize("option", ["adapter.r", "=[1]", "adapter.r=[1", "adapter.r="])
def test_an_option_that_is_no_setting(file, option):
    with pytest.raises(ConfigError):
        load_grid(file("{grid: {train.seed: [1, 2]}}"), grid=[option])


def test_what_has_no_low_rank_part_of_its_own_is_refused(file):
    text = CONFIG + "adapter: {modules_to_save: [lm_head]}\n"
    with pytest.raises(ConfigError) as error:
        load_grid(file("{grid: {train.seed: [1, 2]}}", text))
    assert [each.key for each in error.value.problems] == ["adapter.modules_to_save"]
