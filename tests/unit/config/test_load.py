from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_cli.config import load_config
from lora_cli.config.document import read_document
from lora_cli.errors import ConfigError, UserError

JSON = '{"model": {"name_or_path": "gpt2"}, "data": {"train": "a.jsonl"}, "output_dir": "out"}'
MINIMAL = "model: {name_or_path: gpt2}\ndata: {train: a.jsonl}\noutput_dir: out\n"


def at(problem) -> tuple[int, int] | None:
    return (problem.place.line, problem.place.column) if problem.place is not None else None


def test_all_mistakes_come_at_once_in_file_order(problems):
    found = problems(
        "output_dir: out\n"
        "train:\n"
        "  learning_rate: fast\n"
        "  load_best_model_at_end: true\n"
        "data: {train: a.jsonl}\n"
        "adapter:\n"
        "  lora_rank: 16\n"
        "model: {name_or_path: gpt2}\n"
    )
    assert [(each.key, at(each)) for each in found] == [
        ("train.learning_rate", (3, 18)),
        ("train.load_best_model_at_end", (4, 3)),
        ("adapter.lora_rank", (7, 3)),
    ]
    assert found[0].message == '"fast" is not a number'
    assert found[0].hint == "a number above 0, such as 2.0e-4"
    assert found[0].place.text == "  learning_rate: fast" and found[0].place.length == 4
    assert found[2].message == "unknown key" and found[2].hint == "did you mean `r`?"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train: {learning_rate: true}", "true is not a number"),
        ('train: {batch_size: "3"}', '"3" is not a whole number'),
        ("train: {batch_size: 3.0}", "3.0 is not a whole number"),
        ("train: {learning_rate: .nan}", ".nan is not a finite number"),
        ("train: {learning_rate: -.inf}", "-.inf is not a finite number"),
        ("train: {learning_rate: -1e-4}", "-1e-4 is out of range"),
        ("train: {learning_rate: [q_proj]}", "[q_proj] is not a number"),
        ("train: 3", "3 is not a mapping"),
        ("train: {cache: no, report_to: wandb}", "unknown key"),
        ("adapter: {r: 0}", "0 is out of range"),
        ("adapter: {bias: lora}", '"lora" is not allowed here'),
        ("adapter: {target_modules: []}", "[] is empty"),
        ("adapter: {r: 3, r: 4}", "given twice"),
        ('adapter: {"\\ud800": 4}', "half a character"),
        ('adapter: {target_modules: ["a\\udc00b"]}', "half a character"),
        ("adapter:", "is empty"),
        ("adapter: {1: 2}", "a key must be text"),
        ("adapter: {r: !!python/object:os.system 3}", "no type of a config"),
        ("adapter: {r: &a [*a]}", "contains itself"),
        ("train: {lr_scheduler_kwargs: {power: 2}}", "cosine takes no power"),
        ("train: {lr_scheduler_type: cosine_with_min_lr}", "needs min_lr or min_lr_rate"),
        ("train: {lr_scheduler_type: constant, warmup_steps: 5}", "constant has no warm-up"),
        ("train: {gradient_checkpointing: false, activation_offloading: true}", "only checkpointed layers"),
        ("train: {eval_steps: 5}", "no validation data"),
        ("train: {early_stopping_patience: 5}", "no validation data"),
        ("train: {report_to: [wandb, wandb]}", "given twice"),
        ("adapter: {target_modules: '['}", "not a regular expression"),
        ("adapter: {layers_to_transform: [0]}", "needs target_modules as a list"),
        ("adapter: {target_modules: null}", "nothing to adapt"),
        ("adapter: {r: 3, init_lora_weights: orthogonal}", "even rank"),
        ("adapter: {target_parameters: [w], use_dora: true}", "DoRA"),
        ("adapter: {target_parameters: [w], lora_dropout: 0.1}", "dropout"),
    ],
)
def test_a_mistake_is_named_with_its_place(problems, line, message):
    found = problems(MINIMAL + line + "\n")
    assert any(message in each.message for each in found), found
    assert all(each.place is not None and each.place.line == 4 for each in found)


def test_json_may_escape_a_character_as_a_pair(write):
    assert load_config(write(json.dumps({**json.loads(JSON), "output_dir": "\U0001f600"}))).output_dir == "\U0001f600"


def test_two_mistakes_in_one_list_are_both_named(problems):
    found = problems(MINIMAL.replace("a.jsonl", "[{path: a, weigth: 2}, {path: 3}]"))
    assert [each.key for each in found] == ["data.train.0.weigth", "data.train.1.path"]


def test_yaml_is_1_2(write):
    text = MINIMAL.replace("gpt2", "no") + "train: {learning_rate: 2e-4}\n"
    config = load_config(write(text))
    assert config.model.name_or_path == "no"
    assert config.train.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("content", "message", "place"),
    [
        (b"", "the file is empty", (1, 1)),
        (b"# nothing\n", "the file is empty", (1, 1)),
        (b"- a\n- b\n", "a list at the top", (1, 1)),
        (b"hello\n", "no mapping at the top", (1, 1)),
        (b"model:\n\tname_or_path: x\n", "not YAML", (2, 1)),
        (b"model: {name_or_path: x\ndata: 3\n", "not YAML", None),
        (b"model: \xff\xfe\n", "not UTF-8: byte 0xFF", (1, 8)),
        (b"model: \x01\n", "not YAML: the character U+0001", (1, 8)),
        (b"a: 1\n---\nb: 2\n", "not YAML", None),
    ],
)
def test_files_that_are_no_config(problems, content, message, place):
    (problem,) = problems(content)
    assert problem.message.startswith(message)
    assert problem.place is not None and problem.hint
    assert place is None or at(problem) == place


def test_a_byte_order_mark_is_no_mistake_and_takes_no_column(write, problems):
    assert load_config(write(b"\xef\xbb\xbf" + MINIMAL.encode())).output_dir == "out"
    (problem,) = problems(b"\xef\xbb\xbftrain: 33\n" + MINIMAL.encode())
    assert (problem.message, at(problem), problem.place.text) == ("33 is not a mapping", (1, 8), "train: 33")


def test_missing_file_folder_and_huge_file(tmp_path):
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "no.yaml"))):
        load_config(tmp_path / "no.yaml")
    (tmp_path / "config.yaml").write_text(MINIMAL)
    with pytest.raises(UserError, match="is a folder") as raised:
        load_config(tmp_path)
    assert str(tmp_path / "config.yaml") in (raised.value.remedy or "")
    (tmp_path / "weights.bin").write_bytes(b"a" * (1 << 21))
    with pytest.raises(UserError, match="too large"):
        load_config(tmp_path / "weights.bin")


def test_missing_keys_are_placed_at_their_section(problems):
    found = problems("model: {}\ndata:\n  train: {split: a}\n")
    assert {(each.key, each.message, at(each)) for each in found} == {
        ("output_dir", "missing", (1, 1)),
        ("model.name_or_path", "missing", (1, 1)),
        ("data.train.path", "missing", (3, 3)),
    }
    assert all(each.hint for each in found)


def test_overrides_are_validated_in_the_same_pass_and_win(write, problems):
    config = load_config(
        write(MINIMAL),
        [
            "train.learning_rate=1e-4",
            "train.seed=1",
            "train.seed=7",
            "adapter.target_modules=[c_attn]",
            "output_dir=b",
        ],
    )
    assert (config.train.learning_rate, config.train.seed, config.output_dir) == (1e-4, 7, "b")
    assert config.adapter is not None and config.adapter.target_modules == ("c_attn",)
    found = problems(MINIMAL + "adapter: {rr: 3}\n", "train.learning_rate=fast", "train.lr=1", "seed", "data.train=")
    assert found[0].key == "adapter.rr"
    assert {(each.key, each.place) for each in found[1:]} == {
        ("train.learning_rate", None),
        ("train.lr", None),
        ("seed", None),
        ("data.train", None),
    }


def test_an_override_mends_a_mistake_in_the_file(write):
    assert load_config(write(MINIMAL + "train: {seed: x}\n"), ["train.seed=3"]).train.seed == 3


def test_overrides_reach_into_lists_and_open_null_sections(write):
    text = "model: {name_or_path: gpt2, quantization: null}\ndata: {train: [{path: a}, {path: b}]}\noutput_dir: out\n"
    config = load_config(
        write(text), ["data.train.1.path=c", "model.quantization.type=nf4", "adapter=null", "adapter.r=2"]
    )
    assert [source.path for source in config.data.train] == ["a", "c"]
    assert config.model.quantization is not None and config.model.quantization.type == "nf4"
    assert config.adapter is not None and config.adapter.r == 2


@pytest.mark.parametrize(
    "override", ["model.name_or_path.x=1", "data.train.5=a", "=3", "a..b=3", "train.seed=[", "train.seed"]
)
def test_broken_overrides_are_problems_without_a_place(problems, override):
    assert [each.place for each in problems(MINIMAL, override)] == [None]


def test_contradictions_wait_for_the_values_they_depend_on(problems):
    validated = MINIMAL.replace("a.jsonl", "a.jsonl, validation: 0.1")
    (only,) = problems(validated + "train: {load_best_model_at_end: true, eval_steps: often}\n")
    assert only.key == "train.eval_steps"
    (only,) = problems(MINIMAL.replace("a.jsonl", "a.jsonl, validation: 2") + "train: {eval_steps: 5}\n")
    assert only.key == "data.validation"


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "a1B2" * 8,
        "https://user:secret@host/data.jsonl",
        "https://host/a.jsonl?token=abcdef",
        "ghp_" + "x" * 36,
        "sk-proj-" + "a1B2" * 8,
        "AKIA" + "A1" * 8,
    ],
)
def test_a_secret_is_refused_and_never_shown(write, secret):
    with pytest.raises(ConfigError) as raised:
        load_config(write(MINIMAL.replace("a.jsonl", f'"{secret}"') + f"train: {{seed: {secret!r}}}\n"))
    assert any("token" in each.message for each in raised.value.problems)
    for part in (secret, secret.split("@")[0].split("//")[-1], secret.split("token=")[-1]):
        assert part not in str(raised.value.problems)


def test_what_stands_behind_a_name_that_says_secret_is_starred(problems):
    lines = "train:\n  wandb_api_key: abc123\n  password: two words  # not this\n"
    for each in problems(MINIMAL + lines):
        assert each.place is not None and "abc123" not in each.place.text and "two words" not in each.place.text


def test_null_weights_and_validation_weights(problems):
    text = MINIMAL.replace("a.jsonl", "[{path: a, weight: 2}, b], validation: [{path: c, weight: 1}]")
    assert [(each.key, each.message) for each in problems(text)] == [
        ("data.train.1", "has no weight, and others have one"),
        ("data.validation.0.weight", "weights are for training"),
    ]


def test_billion_laughs_are_refused_quickly(problems):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert any("far too many values" in each.message for each in problems("\n".join(lines)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.sampled_from("abr:-[]{}#&*!|>'\"%@` \n\t0123.,?~é\u2028"), max_size=60))
def test_any_text_is_read_or_refused_with_a_place_inside_it(text):
    document = read_document(text, "file")
    for problem in document.problems:
        assert problem.message and problem.place is not None
        assert problem.place.line <= len(re.split("\r\n|[\n\r\x85\u2028\u2029]", text)) + 1


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.text(max_size=40))
def test_any_value_of_a_key_ends_in_a_config_or_a_config_error(write, noise):
    with suppress(ConfigError):
        load_config(write(MINIMAL + f"adapter: {{r: {noise}\n"))


def test_loading_a_config_imports_nothing_heavy(write):
    code = (
        "import sys\nfrom lora_cli.config import load_config, dump_config\n"
        f"dump_config(load_config({str(write(MINIMAL))!r}))\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'bitsandbytes', 'datasets'}\n"
        "heavy |= {'numpy', 'rich', 'typer'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stdout.strip() == "[]"
