from __future__ import annotations

import json

import pytest

from lora_cli.config import dump_config, load_config, load_grid
from lora_cli.errors import ConfigError

BASE = """\
model: {name_or_path: some/model}
data: {train: rows.jsonl, validation: 0.1}
sweep:
  grid:
    adapter.r: [4, 8]
    train.learning_rate: [1.0e-4, 2.0e-3]
output_dir: runs/all
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(BASE)
    return path


def problems(file, *grid, overrides=()):
    with pytest.raises(ConfigError) as error:
        load_grid(file, overrides, grid)
    return error.value.problems


def test_every_combination_is_a_member_with_a_config_and_a_folder_of_its_own(file):
    members = load_grid(file).members
    assert [member.name for member in members] == ["01-r4-lr1e-4", "02-r4-lr2e-3", "03-r8-lr1e-4", "04-r8-lr2e-3"]
    assert [member.config.adapter.r for member in members] == [4, 4, 8, 8]
    assert [member.config.train.learning_rate for member in members] == [1e-4, 2e-3, 1e-4, 2e-3]
    assert {member.config.output_dir for member in members} == {f"runs/all/{member.name}" for member in members}
    assert all(member.config.sweep is None for member in members)


def test_alpha_follows_each_rank_as_it_does_in_a_run(file):
    assert [m.config.adapter.lora_alpha for m in load_grid(file).members] == [8, 8, 16, 16]


def test_a_member_is_the_config_that_set_would_make(file, tmp_path):
    member = load_grid(file).members[3]
    plain = tmp_path / "plain.yaml"
    plain.write_text(BASE[: BASE.index("sweep:")] + "output_dir: runs/all/04-r8-lr2e-3\n")
    assert member.config == load_config(plain, ["adapter.r=8", "train.learning_rate=2.0e-3"])


def test_the_grid_of_the_command_line_comes_on_top(file):
    grid = load_grid(file, (), ["adapter.r=[16]", "train.seed=[1, 2]"])
    assert [m.name for m in grid.members] == [
        "01-lr1e-4-seed1",
        "02-lr1e-4-seed2",
        "03-lr2e-3-seed1",
        "04-lr2e-3-seed2",
    ]
    assert {m.config.adapter.r for m in grid.members} == {16}


def test_a_grid_survives_its_own_dump(file, tmp_path):
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(load_grid(file).config))
    assert [m.changes for m in load_grid(again).members] == [m.changes for m in load_grid(file).members]


def test_a_bad_value_is_shown_where_the_grid_has_it(file):
    file.write_text(BASE.replace("[4, 8]", "[4, -8]").replace("2.0e-3]", "fast]"))
    found = problems(file)
    assert [(p.place.line, p.place.column, p.key) for p in found] == [
        (6, 35, "train.learning_rate"),
        (5, 20, "adapter.r"),
    ]


@pytest.mark.parametrize(
    ("option", "message", "hint"),
    [
        ("model.name_or_path=[a, b]", "all members train on one base", "set it once"),
        ("model.quantization=[null]", "all members train on one base", "set it once"),
        ("data.max_length=[64, 128]", "tokenized alike", "set it once"),
        ("output_dir=[a, b]", "has a folder in it", "set it once"),
        ("adapter.use_dora=[true, false]", "low-rank part", "set it once"),
        ("train.micro_batch_tokens=[1, 2]", "memory and speed alone", "set it once"),
        ("adapter.lora_r=[1]", "unknown key", "`adapter.r`"),
        ("lr=[1]", "unknown key", "`train.learning_rate`"),
        ("adapter.r=[]", "is empty", ""),
        ("adapter.r=8", "is not a list", ""),
        ("adapter.r=[8, 8]", "8 is given twice", "keep one"),
        ("adapter.r=[", "", ""),
    ],
)
def test_what_a_grid_cannot_have(file, option, message, hint):
    found = problems(file, option)
    assert len(found) == 1
    assert message in found[0].message and hint in found[0].hint


def test_a_huge_grid_is_refused_before_it_is_made(file):
    (found,) = problems(
        file, f"train.seed={json.dumps(list(range(1000)))}", f"train.batch_size={json.dumps(list(range(1, 1000)))}"
    )
    assert "3,996,000 combinations" in found.message and "max_members" in found.hint


def test_members_that_would_be_the_same_run_are_refused(file):
    found = problems(file, "adapter.r=[8]", "adapter.lora_alpha=[null, 16]")
    assert len(found) == 2 and all("are the same run" in problem.message for problem in found)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("adapter=null", "sweep"),
        ("adapter.use_dora=true", "adapter.use_dora"),
        ("adapter.modules_to_save=[lm_head]", "adapter.modules_to_save"),
        ("train.report_to=[tensorboard]", "train.report_to"),
        ("sweep.halving={every: 0}", "sweep.halving.every"),
        ("sweep.halvin={every: 5}", "sweep.halvin"),
    ],
)
def test_what_a_sweep_cannot_share(file, override, key):
    assert key in [problem.key for problem in problems(file, overrides=[override])]


def test_halving_needs_rows_to_rank_by(file):
    (found,) = problems(file, overrides=["data.validation=null", "sweep.halving={every: 5}"])
    assert found.key == "sweep.halving"


def test_without_a_grid_there_is_no_sweep(file):
    (found,) = problems(file, overrides=["sweep=null"])
    assert found.key == "sweep.grid" and "--grid" in found.hint


def test_values_without_a_plain_spelling_are_numbered(file):
    targets = 'adapter.target_modules=[all-linear, [q_proj, v_proj], ".*attn.*(q|v)_proj"]'
    names = [m.name for m in load_grid(file, (), ["adapter.r=[8]", "train.learning_rate=[1e-3]", targets]).members]
    assert names == ["01-targets-1", "02-targets-2", "03-targets-3"]
