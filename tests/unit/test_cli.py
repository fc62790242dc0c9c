"""The command line around the rooms: help, typos, errors and exit codes. Runs `main` in this process where it can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import lora_cli
from lora_cli.cli import main
from lora_cli.cli.app import COMMANDS
from lora_cli.cli.failures import as_text
from lora_cli.cli.help import GROUPS
from lora_cli.errors import ConfigError, DataError, NegativeAnswer, Place, Problem

ROOT = Path(lora_cli.__file__).parents[1]
MINIMAL = "model: {name_or_path: gpt2}\ndata: {train: a.jsonl}\noutput_dir: out\n"
HEAVY = "('torch', 'transformers', 'peft', 'accelerate', 'bitsandbytes', 'datasets', 'numpy')"

HELP = """\
Usage: lora COMMAND [OPTIONS]

Fine-tune language models with LoRA and QLoRA from one YAML file.

  lora init run.yaml && lora check run.yaml && lora train run.yaml

Before   init           write a commented starter config
         check          everything that can be known before the run
         preview        examples token by token, trained tokens marked
         params         parameter counts per module kind
         estimate-vram  peak memory, what fits, what would make it fit
Run      train          train; --resume continues
         sweep          train a grid of settings at the same time, on one frozen base
After    eval           base and adapter side by side
         generate       text from base and adapters
         merge          streaming, verified merge
         extract        an adapter from a fully fine-tuned model
         export         for llama.cpp, Ollama and vLLM
Editor   schema         JSON Schema of the config

Exit codes  0 done, 1 our bug, 2 yours to mend, 3 the answer is no, 130/143 interrupted
"""


@pytest.fixture
def lora(monkeypatch, capsys):
    """Run `lora ARGUMENTS`: the exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",)])
def test_help_is_the_grouped_page(lora, arguments):
    code, out, err = lora(*arguments)
    assert (code, err) == (0, "")
    assert out.startswith(HELP)


def test_help_names_every_command_once():
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)


def test_help_is_no_wider_than_the_terminal(lora, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, lora()[1].split("\n\n")[-1].splitlines())) <= 60


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help_that_starts_with_its_arguments(lora, command):
    code, out, err = lora(command, "-h")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: lora {command} ")
    assert out.splitlines()[0].endswith("[OPTIONS]") and "{" not in out.splitlines()[0]


def test_help_loads_nothing_heavy_and_is_quick():
    code = (
        "import sys; sys.argv = ['lora', '--help']\nfrom lora_cli.cli import main\ntry: main()\n"
        f"except SystemExit: print(sorted(set(sys.modules) & {{'rich', 'pydantic', 'ruamel.yaml', *{HEAVY}}}))"
    )
    started = time.perf_counter()
    done = run_python(code)
    print(f"lora --help: {time.perf_counter() - started:.2f} s")
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_broken_config_is_refused_without_loading_anything_heavy(config):
    config.write_text(MINIMAL + "lr: 3\n")
    code = (
        f"import sys; sys.argv = ['lora', 'train', {str(config)!r}]\nfrom lora_cli.cli import main\ntry: main()\n"
        f"except SystemExit as e: print(e.code, sorted(set(sys.modules) & {{'rich', *{HEAVY}}}))"
    )
    started = time.perf_counter()
    done = run_python(code)
    seconds = time.perf_counter() - started
    print(f"a broken config: {seconds:.2f} s")
    assert done.stdout == "2 []\n"
    assert "did you mean `train.learning_rate`?" in done.stderr
    assert seconds < 5, "ten times what it takes"


def test_a_typo_is_answered_on_stderr(lora):
    assert lora("trian") == (2, "", "error: there is no command 'trian'\n  Did you mean 'train'?\n")
    assert lora("xyzzy")[0] == 2


def test_unknown_options_and_missing_arguments_exit_2_with_empty_stdout(lora):
    for arguments in (("train", "--resum"), ("train",), ("--nope",), ("merge", "a")):
        code, out, err = lora(*arguments)
        assert (code, out) == (2, "") and err


def test_a_config_error_looks_like_this(config, lora, monkeypatch):
    monkeypatch.chdir(config.parent)
    Path("docs.yaml").write_text(
        MINIMAL + "adapter:\n  lora_rank: 16\ntrain:\n  learning_rate: fast\n", encoding="utf-8"
    )
    code, out, err = lora("check", "docs.yaml", "--set", "train.seed=x", "--json")
    assert (code, out) == (2, "")
    assert err == (
        "error: docs.yaml has 3 mistakes\n"
        "\n"
        "  docs.yaml:5:3  adapter.lora_rank  unknown key\n"
        "    5 |   lora_rank: 16\n"
        "      |   ^^^^^^^^^  did you mean `r`?\n"
        "\n"
        '  docs.yaml:7:18  train.learning_rate  "fast" is not a number\n'
        "    7 |   learning_rate: fast\n"
        "      |                  ^^^^  a number above 0, such as 2.0e-4\n"
        "\n"
        '  --set  train.seed  "x" is not a whole number\n'
        "    a whole number of 0 or more and below 2**32\n"
        "\n"
        "Nothing was loaded or written.\n"
    )


def test_long_hints_wrap_and_control_characters_are_dropped(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    place = Place("a.yaml", 3, 9, "lr: \x1b[31m\tx", 1)
    text = as_text(ConfigError("a.yaml", (Problem("train.lr", "unknown key", "word " * 40, place),)))
    assert max(map(len, text.splitlines())) <= 60
    assert "\x1b" not in text and "\t" not in text


def test_carets_stand_under_wide_characters():
    place = Place("a.yaml", 1, 4, "模型: x", 1)
    lines = as_text(ConfigError("a.yaml", (Problem("k", "m", "h", place),))).splitlines()
    assert lines[4].index("^") - lines[4].index("|") == 2 + 2 + 2 + 1


def test_colour_repeats_meaning_and_carries_none():
    error = ConfigError("a", (Problem("k", "m", "h", Place("a", 1, 1, "x: 1", 1)),))
    plain, coloured = as_text(error), as_text(error, colour=True)
    assert "\x1b[" in coloured
    for code in ("\x1b[31;1m", "\x1b[33m", "\x1b[0m"):
        coloured = coloured.replace(code, "")
    assert coloured == plain


def test_missing_config_gives_the_absolute_path_and_debug_the_traceback(lora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = lora("train", "no.yaml")
    assert (code, out) == (2, "")
    assert str(tmp_path / "no.yaml") in err and "Traceback" not in err
    code, out, err = lora("train", "no.yaml", "--debug")
    assert (code, out) == (2, "") and "Traceback" in err


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (
            DataError("train.jsonl:17: no messages", remedy="Add one.\nOr two."),
            2,
            "error: train.jsonl:17: no messages\n  Add one.\n  Or two.\n",
        ),
        (NegativeAnswer("it does not fit"), 3, "error: it does not fit\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_what_a_room_raises_becomes_an_exit_code(lora, config, monkeypatch, raised, code, said):
    def parameter_report(_):
        raise raised

    _stub(monkeypatch, "lora_cli.engine.planning", parameter_report=parameter_report, compare_ranks=None)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    got, out, err = lora("params", str(config))
    assert (got, out) == (code, "")
    assert err == said


def test_any_other_exception_is_our_bug(lora, config, monkeypatch):
    _stub(monkeypatch, "lora_cli.engine.planning", parameter_report=lambda _: 1 / 0, compare_ranks=None)
    code, out, err = lora("params", str(config))
    assert (code, out) == (1, "")
    assert "ZeroDivisionError" in err and "Please report it" in err


def test_train_gets_the_overridden_config_and_prints_its_summary_as_json(lora, config, monkeypatch):
    seen = {}

    def train(config, *, resume, emit):
        seen.update(config=config, resume=resume)
        return SimpleNamespace(as_json=lambda: {"steps": 3})

    _stub(monkeypatch, "lora_cli.train", train=train)
    code, out, _ = lora(
        "train", str(config), "--resume", "--set", "train.seed=7", "--output-dir", "3: #x", "--no-cache", "--json"
    )
    assert (code, json.loads(out)) == (0, {"steps": 3})
    assert seen["resume"] is True
    assert (seen["config"].train.seed, seen["config"].output_dir, seen["config"].data.cache) == (7, "3: #x", False)


def test_only_the_first_process_prints_json(lora, config, monkeypatch):
    _stub(monkeypatch, "lora_cli.train", train=lambda *_, **__: SimpleNamespace(as_json=dict))
    monkeypatch.setenv("RANK", "1")
    assert lora("train", str(config), "--json")[1] == ""


def test_ranks_are_parsed_or_refused(lora, config, monkeypatch):
    report = SimpleNamespace(as_json=lambda: {"trainable": 1})
    _stub(
        monkeypatch,
        "lora_cli.engine.planning",
        parameter_report=None,
        compare_ranks=lambda _, ranks: dict.fromkeys(ranks, report),
    )
    code, out, _ = lora("params", str(config), "--ranks", "4,8", "--json")
    assert (code, list(json.loads(out)["ranks"])) == (0, ["4", "8"])
    for ranks in ("4,x", "0", ""):
        assert lora("params", str(config), "--ranks", ranks)[0] == 2


def test_init_writes_a_config_that_loads_and_overwrites_nothing(lora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = lora("init", "docs.yaml", "--model", "gpt2", "--data", "a b.jsonl", "--quantization", "nf4")
    assert code == 0 and "lora check docs.yaml" in out
    written = Path("docs.yaml").read_text()
    assert written.startswith("# lora train docs.yaml\n") and '"a b.jsonl"' in written and "runs/docs" in written
    code, out, err = lora("init", "docs.yaml", "--model", "other", "--data", "x")
    assert (code, out) == (2, "") and str(tmp_path / "docs.yaml") in err
    assert Path("docs.yaml").read_text() == written


def test_init_asks_a_person_and_refuses_to_guess(lora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = iter(["\n", "gpt2\n", "rows.jsonl\n"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True, readline=lambda: next(answers)))
    code, _, err = lora("init")
    assert code == 0 and err.count("model (") == 2
    assert "name_or_path: gpt2" in Path("lora.yaml").read_text()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    code, out, err = lora("init", "other.yaml", "--model", "gpt2")
    assert (code, out) == (2, "") and "--data" in err and not Path("other.yaml").exists()


def test_init_into_a_missing_folder_is_refused(lora, tmp_path):
    code, _, err = lora("init", str(tmp_path / "no" / "a.yaml"), "--model", "a", "--data", "b")
    assert code == 2 and str(tmp_path / "no" / "a.yaml") in err


def test_schema_is_one_json_document(lora):
    code, out, err = lora("schema")
    assert (code, err) == (0, "")
    assert json.loads(out)["properties"].keys() == {"model", "adapter", "data", "train", "sweep", "output_dir"}


def test_version(lora):
    assert lora("--version") == (0, f"lora {lora_cli.__version__}\n", "")


def test_the_library_loads_lazily_and_keeps_its_functions():
    code = (
        "import sys, lora_cli\n"
        "assert not [m for m in sys.modules if m.startswith('lora_cli.')]\n"
        "from lora_cli import load_config\n"
        "import lora_cli.train as room\n"
        "first = lora_cli.train\n"
        "import importlib; importlib.import_module('lora_cli.train')\n"
        "print(callable(load_config), callable(first), first is lora_cli.train, hasattr(lora_cli, 'nothing'))"
    )
    stub = ROOT / "lora_cli" / "train" / "__init__.py"
    assert stub.is_file()
    done = run_python(code)
    assert done.stdout == "True True True False\n", done.stderr


def _stub(monkeypatch, name: str, **contents: object) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
