from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
from rich.cells import cell_len

from lora_cli.plan import Memory, ParameterReport, Plan
from lora_cli.report.closing import render_summary
from lora_cli.report.events import Summary
from lora_cli.report.screens import render_cache, render_check, render_parameters, render_plan, render_ranks

WIDTHS = [60, 80, 140]


def flat(text: str) -> str:
    """The screen without its line breaks and columns."""
    return " ".join(text.split())


@pytest.mark.parametrize("width", WIDTHS)
def test_no_screen_is_wider_than_the_terminal(plan: Plan, summary: Summary, width: int) -> None:
    screens = [
        render_plan(plan, width),
        render_check(plan, width),
        render_parameters(plan.parameters, plan.model, width),
        render_ranks({4: plan.parameters, 16: plan.parameters}, width),
        render_summary(summary, plan, width),
    ]
    for screen in screens:
        assert max(cell_len(line) for line in screen.split("\n")) <= width
        assert "…" not in screen


@pytest.mark.parametrize("width", WIDTHS)
def test_screens_agree_digit_for_digit(plan: Plan, width: int) -> None:
    parameters = flat(render_parameters(plan.parameters, plan.model, width))
    for screen in (flat(render_plan(plan, width)), flat(render_check(plan, width)), parameters):
        assert "8,030,261,248 parameters" in screen
        assert "41,943,040" in screen
        assert "0.5196 %" in screen
    ranks = render_ranks({16: plan.parameters}, width)
    assert "41,943,040   0.5196 %" in ranks
    assert "160.0 MiB" in ranks


def test_the_plan_shows_its_arithmetic(plan: Plan) -> None:
    screen = flat(render_plan(plan, 140))
    assert "12,467 of 12,480 rows, 13 dropped, 41 truncated; 5,214,880 tokens, 34.5 % trained" in screen
    assert "2,340 = 3 epochs x 780, 16 examples each; lr 2e-04, cosine, 70 warm-up" in screen
    assert "11.5 of 23.6 GiB at 8,192 tokens a micro-batch: fits, 12.1 spare" in screen
    assert "! 41 rows lose their end" in screen


def test_max_steps_is_not_shown_as_whole_epochs(plan: Plan) -> None:
    plan = replace(plan, steps=replace(plan.steps, total=100, epochs=100 / 780))
    assert "100, 0.13 epochs of 780" in flat(render_plan(plan, 140))


def test_memory_that_does_not_fit_says_how_much_is_missing(plan: Plan) -> None:
    plan = replace(plan, memory=Memory(int(25.7 * 2**30), int(25.0 * 2**30), int(23.6 * 2**30)))
    assert "does not fit, 2.1 too much" in flat(render_plan(plan, 140))
    check = render_check(plan, 140)
    assert "  no  memory" in check
    assert check.endswith("not ready: memory")


def test_without_a_gpu_no_memory_is_promised(plan: Plan) -> None:
    plan = replace(plan, memory=None)
    assert "GiB at" not in render_plan(plan, 140)
    assert "GiB at" not in render_check(plan, 140)


def test_check_names_dropped_rows_and_counts_each_warning_once(plan: Plan) -> None:
    data = replace(plan.data, warnings=plan.warnings)  # the planner passes the data's warnings on
    check = flat(render_check(replace(plan, data=data), 140))
    assert (
        "13 dropped, answer empty: data/train.jsonl:88, data/train.jsonl:410, data/train.jsonl:1207 and 10 more"
        in check
    )
    assert check.endswith("ready, 1 warning")
    assert flat(render_check(replace(plan, warnings=()), 140)).endswith("ready")


def test_a_value_in_brackets_appears_verbatim(plan: Plan) -> None:
    plan = replace(plan, warnings=("[q_proj] matches nothing",))
    assert "[q_proj] matches nothing" in render_plan(plan, 80)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_module_shows_all_its_digits(parameters: ParameterReport, width: int) -> None:
    screen = render_parameters(parameters, None, width)
    for kind in parameters.by_module:
        assert f"{kind.base_parameters:,}" in screen
    assert len(screen.split("\n")) == len(parameters.by_module) + 3  # a line each, at 60 columns, too


def test_losses_name_their_span(plan: Plan, summary: Summary) -> None:
    screen = flat(render_summary(summary, plan, 140))
    assert "train 1.4127 -> 1.0219 (means of first and last 50 steps)" in screen
    assert "valid 1.3981 -> 1.0346 (first and last evaluation), best 1.0341 at step 2,200" in screen


def test_measured_memory_is_compared_with_what_was_to_be_allocated(plan: Plan, summary: Summary) -> None:
    """Peak allocated against allocated, 11.4 of 11.0 GiB: not against the whole process, which takes more."""
    on_card = replace(plan, engine=replace(plan.engine, device="cuda"))
    assert "peak 11.4 GiB of tensors, 3.6 % over the estimate" in flat(render_summary(summary, on_card, 140))
    assert "estimate" not in render_summary(summary, replace(plan, memory=None), 140)


def test_next_commands_survive_a_folder_with_spaces(plan: Plan, summary: Summary) -> None:
    screen = render_summary(replace(summary, output_dir="runs/my docs"), plan, 60)
    commands = screen[screen.index("lora eval") :].replace("\\\n", " ").split("\n")
    assert [shlex.split(line) for line in commands] == [
        ["lora", "eval", "runs/my docs"],
        ["lora", "merge", "runs/my docs", "--output", "merged/my docs"],
    ]


def test_full_fine_tuning_offers_nothing_to_merge(plan: Plan, summary: Summary) -> None:
    plan = replace(plan, model=replace(plan.model, adapter=None))
    screen = render_summary(summary, plan, 80)
    assert "lora merge" not in screen
    assert "  model    runs/docs/adapter" in screen


def test_a_run_that_stopped_early_says_why(plan: Plan, summary: Summary) -> None:
    screen = render_summary(replace(summary, steps=900, stopped="early stopping"), plan, 80)
    assert screen.startswith("  stopped  900 steps in 1 h 48 min (early stopping)")


def test_check_shows_lengths_repeats_and_the_cache(plan: Plan) -> None:
    data = replace(
        plan.data,
        longest_place="train.jsonl:77",
        truncated_places=tuple(f"train.jsonl:{line}" for line in range(1, 21)),
        duplicates=2,
        duplicate_places=("train.jsonl:5", "train.jsonl:6"),
        lengths=((128, 1204), (256, 10_000), (512, 0), (2048, 1263)),
    )
    cache = render_cache("/var/cache/lora", 5 * 2**20, 3, 2**20)
    screen = render_check(replace(plan, data=data), 100, cache=cache)
    assert "  !   length   the longest row has 3,011 tokens: train.jsonl:77" in screen
    assert "41 truncated at 2,048 tokens: train.jsonl:1, train.jsonl:2, train.jsonl:3 and 38 more" in screen
    assert "               to   256  10,000  " + "█" * 24 + "\n" in screen
    assert "               to   512       0  \n" in screen + "\n"
    assert "2 exact duplicates: train.jsonl:5, train.jsonl:6\n" in screen
    assert "5.0 MiB of tokenized data, 3 sources, in /var/cache/lora; 1.0 MiB deleted before" in screen
    assert all(len(line) <= 100 for line in screen.split("\n"))
