"""The README keeps its word: every command in it runs, and its picture of the house is the house."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from lora_cli.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

ELSEWHERE = {
    "make demo": "runs for minutes; its steps are those of scripts/demo.py",
    "make test": "is what runs this test",
    "pip install -e .": "is how this test's environment was made",
    "python scripts/make_tiny_gpt2.py .demo/tiny-gpt2": "pre-trains for most of a minute; a random model stands in",
}


def commands() -> list[str]:
    """Every line of the README's shell blocks, without its comment."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_runs(
    tiny: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("configs", "scripts", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").symlink_to(rows)
    shutil.copytree(tiny, tmp_path / ".demo" / "tiny-gpt2")
    monkeypatch.chdir(tmp_path)
    run = [line for line in commands() if line not in ELSEWHERE]
    assert len(run) >= 7
    for line in run:
        assert line.startswith("lora "), line
        # There is no hub here: the tiny model takes the place of the one that would come from it.
        arguments = shlex.split(line.replace("Qwen/Qwen2.5-1.5B-Instruct", ".demo/tiny-gpt2"))[1:]
        if arguments[0] in ("check", "train") and arguments[1] == "run.yaml":
            arguments += ["--set", "data.max_length=128", "--set", "train.max_steps=3"]
        monkeypatch.setattr(sys, "argv", ["lora", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, f"{line}\n{capsys.readouterr().err}"


def test_commands_that_run_elsewhere_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in set(commands()) & set(ELSEWHERE):
        program, *words = line.split()
        if program == "make":
            assert re.search(rf"^{words[0]}:", makefile, flags=re.MULTILINE)
        elif program == "python":
            assert (ROOT / words[0]).is_file()
    assert set(ELSEWHERE) <= set(commands()), "an exception that the README has no more use for"


def test_the_picture_of_the_house_is_the_house() -> None:
    tree = README.split("```\nlora_cli/\n")[1].split("```")[0]
    rooms = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")}
    package = ROOT / "lora_cli"
    private = {"__init__.py", "__main__.py", "__pycache__", "py.typed"}
    assert rooms == {path.name for path in package.iterdir()} - private
    for line in tree.splitlines():
        if not line.startswith("  "):
            assert (ROOT / line.split()[0].rstrip("/")).exists(), line


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link
