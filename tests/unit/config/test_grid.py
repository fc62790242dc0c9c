"""A grid of settings: its members, and everything that can be wrong with it, each with its place."""

from __future__ import annotations

import pytest

from lora_cli.config import dump_config, load_config, load_grid
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


def test_a_member_is_the_config_that_set_would_make(file, tmp_path):
    member = load_grid(file("{grid: {adapter.r: [4, 8], train.learning_rate: [1e-4, 2e-3]}}")).members[3]
    plain = tmp_path / "plain.yaml"
    plain.write_text(CONFIG.replace("output_dir: out", f"output_dir: out/{member.name}"))
    assert member.config == load_config(plain, ["adapter.r=8", "train.learning_rate=2.0e-3"])


def test_a_grid_survives_its_own_dump_and_alpha_still_follows_the_rank(file, tmp_path):
    again = tmp_path / "again.yaml"
    grid = load_grid(file("{grid: {adapter.r: [4, 8]}}"))
    again.write_text(dump_config(grid.config, given_only=True))
    found = load_grid(again).members
    assert [m.changes for m in found] == [m.changes for m in grid.members]
    assert [m.config.adapter.lora_alpha for m in found] == [8, 16]


def test_a_bad_value_is_shown_where_the_grid_has_it(file):
    with pytest.raises(ConfigError) as error:
        load_grid(file("\n  grid:\n    adapter.r: [4, -8]\n    train.learning_rate: [1.0e-4, fast]"))
    places = [(each.place.line, each.place.column, each.key) for each in error.value.problems]
    assert sorted(places) == [(6, 20, "adapter.r"), (7, 35, "train.learning_rate")]


def test_a_huge_grid_is_refused_before_it_is_made(file):
    seeds, sizes = list(range(1000)), list(range(1, 1000))
    with pytest.raises(ConfigError) as error:
        load_grid(file(""), grid=[f"train.seed={seeds}", f"train.batch_size={sizes}"])
    (found,) = error.value.problems
    assert "999,000 combinations" in found.message and "max_members" in found.hint


def test_values_without_a_plain_spelling_are_numbered(file):
    targets = 'adapter.target_modules=[all-linear, [q_proj, v_proj], ".*attn.*(q|v)_proj"]'
    names = [member.name for member in load_grid(file(""), grid=[targets]).members]
    assert names == ["01-targets-1", "02-targets-2", "03-targets-3"]
