"""`lora estimate-vram` on a folder that holds a config.json alone: no weights, no tokenizer, no data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_cli.cli import main
from tests.unit.estimate.models import tiny_architecture


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tiny_architecture("llama").save_pretrained(tmp_path / "model")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{name_or_path: {tmp_path / 'model'}}}\n"
        "data: {train: nowhere.jsonl, max_length: 64}\n"
        "train: {micro_batch_tokens: 256}\n"
        f"output_dir: {tmp_path / 'run'}\n",
        encoding="utf-8",
    )
    return path


def lora(*arguments: str) -> int:
    import sys
    from unittest import mock

    with mock.patch.object(sys, "argv", ["lora", *arguments]):
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def test_json_on_stdout_and_nothing_is_written(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert lora("estimate-vram", str(config), "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    assert sum(printed["components"].values()) == printed["process_bytes"]
    assert printed["micro_batch_tokens"] == 256
    assert not (config.parent / "run").exists()


def test_a_card_without_room_exits_3_and_says_so_first(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert lora("estimate-vram", str(config), "--vram", "0.3") == 3
    assert capfd.readouterr().out.lstrip().startswith("no ")


def test_an_unknown_card_exits_2_with_an_empty_stdout(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert lora("estimate-vram", str(config), "--gpu", "rtx-9999") == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Did you mean" in captured.err or "Known:" in captured.err


def refused(config: Path, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What stderr says of a mistake that exits 2, with nothing on stdout and no traceback."""
    assert lora("estimate-vram", str(config), *arguments) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert captured.err.startswith("error: ")
    return " ".join(captured.err.split())


def with_architecture(config: Path, **changes: object) -> Path:
    """The same config on a model whose config.json has been changed by hand."""
    file = config.parent / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    return config


def test_a_model_folder_without_config_json(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (config.parent / "model" / "config.json").unlink()
    said = refused(config, capfd)
    assert "no config.json" in said
    assert str(config.parent / "model") in said


def test_an_unknown_architecture(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = refused(with_architecture(config, model_type="novel", architectures=["NovelForCausalLM"]), capfd)
    assert "novel" in said


@pytest.mark.parametrize(
    "lie",
    [
        {"num_attention_heads": 5, "head_dim": None},
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        {"hidden_size": 65, "head_dim": None},
        {"hidden_size": "wide"},
        {"num_hidden_layers": -1},
        {"vocab_size": 0},
    ],
    ids=lambda lie: "-".join(lie),
)
def test_a_config_json_that_lies(config: Path, capfd: pytest.CaptureFixture[str], lie: dict[str, object]) -> None:
    refused(with_architecture(config, **lie), capfd)


def test_a_config_json_that_is_no_json(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (config.parent / "model" / "config.json").write_text("{", encoding="utf-8")
    assert "config.json" in refused(config, capfd)


def test_a_hub_id_without_network_says_how_to_do_it_offline(
    config: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    said = refused(config, capfd, "--set", "model.name_or_path=nobody-here/no-such-model")
    assert "machine that has network" in said
    assert "give its path" in said


def test_remote_code_is_refused_unless_allowed(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    novel = {"model_type": "novel", "auto_map": {"AutoConfig": "novel.NovelConfig", "AutoModelForCausalLM": "novel.N"}}
    assert "trust_remote_code" in refused(with_architecture(config, **novel), capfd)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--gpu", "a100"), "a100-40gb, a100-80gb"),
        (("--gpu", "rtx-4091"), "Did you mean"),
        (("--gpu", ""), "Known:"),
        (("--gpu", "t4", "--vram", "16"), "both"),
        (("--vram", "0"), "not an amount"),
        (("--vram", "inf"), "not an amount"),
        (("--fit",), "needs a card"),
        (("--tflops", "0"), "not a speed"),
        (("--tflops", "inf"), "not a speed"),
    ],
)
def test_cards_that_nobody_has(
    config: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    assert says in refused(config, capfd, *arguments)


def test_what_cannot_be_traced_is_said_with_the_reason(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = refused(config, capfd, "--set", "model.quantization={type: int8}")
    assert "cannot trace int8: which values" in said
    assert "depends on the data" in said


def test_a_suggestion_applied_with_set_fits(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What `--fit` prints is what `--set` takes: exit 3 becomes 0."""
    heavy = ["--set", "train.micro_batch_tokens=8192", "--set", "data.max_length=512", "--json"]
    assert lora("estimate-vram", str(config), *heavy) == 0
    needs = json.loads(capfd.readouterr().out)
    context = needs["process_bytes"] - needs["peak_reserved_bytes"]
    heavy += ["--vram", f"{(context + 0.8 * needs['peak_allocated_bytes']) / 2**30:.4f}"]
    assert lora("estimate-vram", str(config), "--fit", *heavy) == 3
    changes = json.loads(capfd.readouterr().out)["changes"]
    assert changes[-1]["fits"]
    settings = [part for setting in changes[-1]["settings"] for part in ("--set", setting)]
    assert lora("estimate-vram", str(config), *heavy, *settings) == 0


def test_tflops_say_how_long_a_million_tokens_take(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert lora("estimate-vram", str(config), "--tflops", "2", "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 128 * 64
    assert printed["flops_per_token"] > 6 * weights  # forward, recomputed, and back to the inputs
    assert printed["seconds_per_million_tokens"] == pytest.approx(printed["flops_per_token"] * 1e6 / 2e12)


def test_expandable_segments_come_from_the_environment_unless_said(
    config: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def printed(*arguments: str) -> dict[str, object]:
        large = (
            "train.micro_batch_tokens=21000",
            "train.batch_size=64",
            "train.gradient_checkpointing=false",
            "data.max_length=700",
            "train.fused=false",
        )
        heavy = [part for setting in large for part in ("--set", setting)]
        assert lora("estimate-vram", str(config), "--json", *heavy, *arguments) == 0
        found: dict[str, object] = json.loads(capfd.readouterr().out)
        return found

    fixed, expandable = printed(), printed("--expandable")
    assert (fixed["expandable"], expandable["expandable"]) == (False, True)
    assert expandable["peak_allocated_bytes"] <= fixed["peak_allocated_bytes"]  # blocks are split more finely
    assert expandable["peak_reserved_bytes"] < fixed["peak_reserved_bytes"]
    assert expandable["process_bytes"] == fixed["expandable_process_bytes"]
    assert any("expandable" in str(line) for line in expandable["assumptions"])
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert printed() == expandable
    assert printed("--no-expandable") == fixed
