"""What a user can get wrong: each a clear error that names the culprit, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_cli.errors import RunFolderError


@pytest.fixture
def refused(lora, tmp_path):
    """Run a command that must be refused: exit 2, one clear message, no traceback, nothing written; the message."""

    def run(*arguments):
        before = contents(tmp_path)
        code, out, err = lora(*arguments)
        assert (code, out) == (2, ""), err
        message = err[err.index("error:") :]
        assert err.startswith(("error:", "  ")), "progress, if any, then the error"
        assert "Traceback" not in err and "bug in lora" not in err
        assert contents(tmp_path) == before, "nothing was written"
        return message

    return run


def contents(folder):
    """Every file in it and what it holds; the cache of tokenized rows is no output."""
    files = (path for path in folder.rglob("*") if "cache" not in path.relative_to(folder).parts)
    return {path: path.read_bytes() if path.is_file() else None for path in files}


# The config file

BAD_FILES = {
    "empty": ("", ["the file is empty", "lora init"]),
    "only a comment": ("# nothing\n", ["the file is empty"]),
    "not YAML": ("model: {name_or_path: [\n", ["bad.yaml:2:1"]),
    "a list at the top": ("- model\n- data\n", ["a list at the top", "bad.yaml:1:1"]),
    "a word at the top": ("model\n", ["no mapping at the top"]),
    "a tab": ("model:\n\tname_or_path: x\n", ["bad.yaml:2:1"]),
    "a key twice": ("model: {name_or_path: a}\nmodel: {name_or_path: b}\n", ["bad.yaml:2:1", "model"]),
}


@pytest.mark.parametrize(("text", "named"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_config(refused, tmp_path, text, named):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = refused("train", path)
    assert message.startswith("error:")
    assert all(part in message for part in named), message


BAD_SETTINGS = {
    "unknown section": ("trian={seed: 1}", ["trian", "unknown key", "`train`"]),
    "unknown key": ("train.learning_rat=1e-4", ["train.learning_rat", "`learning_rate`"]),
    "another tool's name": ("train.lr=1e-4", ["train.lr", "learning_rate"]),
    "a word for a number": ("train.learning_rate=fast", ["train.learning_rate", '"fast" is not a number']),
    "a number for a word": ("model.name_or_path=3", ["model.name_or_path", "3"]),
    "a fraction of a step": ("train.max_steps=2.5", ["train.max_steps", "2.5"]),
    "a list for a number": ("adapter.r=[8]", ["adapter.r", "8"]),
    "NaN": ("train.learning_rate=.nan", ["train.learning_rate", "nan"]),
    "infinity": ("train.max_grad_norm=.inf", ["train.max_grad_norm", "inf"]),
    "negative": ("train.learning_rate=-1e-4", ["train.learning_rate", "-1e-4"]),
    "zero": ("adapter.r=0", ["adapter.r", "0"]),
    "dropout of 1": ("adapter.lora_dropout=1.0", ["adapter.lora_dropout", "1.0"]),
    "a seed too large": ("train.seed=4294967296", ["train.seed", "4294967296"]),
    "all rows held out": ("data.validation=1.0", ["data.validation", "1.0"]),
    "unknown optimizer": ("train.optim=adamw_torhc", ["train.optim", "adamw_torch"]),
    "nothing": ("train.batch_size=", ["train.batch_size"]),
    "evaluations of nothing": ("train.eval_steps=2", ["train.eval_steps", "validation"]),
    "quantized and trained in full": ("adapter=null", ["model.quantization"]),
    "int8 with double quant": ("model.quantization={type: int8, double_quant: true}", ["double_quant"]),
}


@pytest.mark.parametrize(("override", "named"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_a_setting_that_cannot_be(refused, write_config, tmp_path, override, named):
    quantization = {"model": {"quantization": {"type": "nf4"}}} if override == "adapter=null" else {}
    message = refused("train", write_config(tmp_path, **quantization), "--set", override)
    assert all(part in message for part in named), message
    assert "Nothing was loaded or written." in message


def test_all_mistakes_at_once_in_the_order_of_the_file(refused, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "model: {name_or_path: x}\n"
        "adapter: {lora_rank: 16}\n"
        "data: {train: a.jsonl}\n"
        "train: {learning_rate: fast, eval_steps: 3}\n"
        "output_dir: out\n"
    )
    began = time.perf_counter()
    message = refused("train", path)
    assert time.perf_counter() - began < 1
    places = ["bad.yaml:2:11", "bad.yaml:4:24", "bad.yaml:4:30"]
    assert "3 mistakes" in message
    assert sorted(map(message.index, places)) == list(map(message.index, places))


def test_config_and_data_that_are_not_there_are_named_by_their_absolute_paths(
    refused, write_config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert f"no config at {tmp_path / 'no.yaml'}" in refused("train", "no.yaml")
    message = refused("train", write_config(tmp_path, data={"train": "no.jsonl"}))
    assert str(tmp_path / "no.jsonl") in message


# The model folder


@pytest.fixture
def broken(tiny, tmp_path, write_config):
    """A copy of the tiny model to break, and a config that trains it."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    return folder, write_config(tmp_path, model={"name_or_path": str(folder)})


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_model_folder_that_is_not_there(refused, write_config, tmp_path):
    path = write_config(tmp_path, model={"name_or_path": str(tmp_path / "none")})
    message = refused("train", path)
    assert f"no folder {tmp_path / 'none'}" in message and "config.json" in message


def test_a_model_folder_without_config_json(refused, broken):
    folder, config = broken
    (folder / "config.json").unlink()
    assert f"{folder} has no config.json" in refused("train", config)


@pytest.mark.parametrize("content", ["{", "[1]", '{"model_type": "nonsense"}', "{}"])
def test_a_config_json_that_says_nothing(refused, broken, content):
    folder, config = broken
    (folder / "config.json").write_text(content)
    assert str(folder) in refused("params", config)


def test_pickled_weights_are_refused_with_a_remedy_that_is_a_command(refused, broken):
    folder, config = broken
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for command in ("check", "train"):
        message = refused(command, config)
        assert "pytorch_model.bin" in message and "pickle" in message
        assert "safetensors" in message and "save_pretrained" in message


def test_no_weights_at_all(refused, broken):
    folder, config = broken
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors" in refused("train", config)


def test_a_missing_shard_is_named(refused, broken):
    folder, config = broken
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    shards = {name: f"model-0000{1 + (number > 10)}-of-00002.safetensors" for number, name in enumerate(names)}
    for shard in set(shards.values()):
        save_file({n: weights[n] for n in names if shards[n] == shard}, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = refused("train", config)
    assert "shard model-00002-of-00002.safetensors is missing" in message


def test_weights_that_end_in_the_middle(refused, broken):
    folder, config = broken
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(folder) in refused("train", config)


@pytest.mark.parametrize(
    "lie",
    [{"n_head": 5}, {"n_embd": 48, "n_head": 3}, {"n_layer": 3}, {"vocab_size": 600}, {"n_embd": 0}, {"n_head": 0}],
    ids=json.dumps,
)
def test_a_config_json_that_lies_about_the_weights(refused, broken, lie):
    folder, config = broken
    change_config(folder, **lie)
    message = refused("train", config)
    assert "config.json" in message, message


def test_a_folder_without_tokenizer(refused, broken):
    folder, config = broken
    for path in folder.glob("token*"):
        path.unlink()
    assert "tokenizer" in refused("train", config)


def test_rows_longer_than_learned_positions(refused, write_config, tmp_path):
    message = refused("check", write_config(tmp_path, data={"max_length": 129}))
    assert "data.max_length 129" in message and "data.max_length: 128" in message


def test_a_hub_id_without_network_is_answered_at_once(refused, write_config, tmp_path):
    path = write_config(tmp_path, model={"name_or_path": "some-org/some-model"})
    for command in ("params", "check", "train"):
        began = time.perf_counter()
        message = refused(command, path)
        assert time.perf_counter() - began < 5
        assert "some-org/some-model" in message and "Without network" in message and "hf download" in message


# The adapter


@pytest.mark.parametrize(
    "adapter",
    [{"target_modules": ["q_proj", "c_attn"]}, {"target_modules": ".*q_proj"}, {"modules_to_save": ["lm_haed"]}],
    ids=json.dumps,
)
def test_targets_that_match_nothing_list_what_there_is(refused, write_config, tmp_path, adapter):
    (wrong,) = [name for name in ("q_proj", "lm_haed") if name in json.dumps(adapter)]
    for command in ("params", "check", "train"):
        message = refused(command, write_config(tmp_path, adapter=adapter))
        assert wrong in message
        if wrong == "q_proj":
            assert "c_attn, c_proj, c_fc" in message


def test_an_adapter_folder_that_is_none(refused, write_config, tmp_path):
    missing = tmp_path / "nothing"
    assert str(missing) in refused("train", write_config(tmp_path, adapter={"path": str(missing)}))
    missing.mkdir()
    assert "adapter_config.json" in refused("train", write_config(tmp_path, adapter={"path": str(missing)}))


def test_a_paged_optimizer_needs_a_gpu(refused, config_file):
    message = refused("train", config_file, "--set", "train.optim=paged_adamw_8bit")
    assert "train.optim: adamw_8bit" in message


# The run folder


def test_an_output_dir_that_holds_another_run(refused, lora, config_file, tmp_path):
    code, _, err = lora("train", config_file, "--set", "train.max_steps=1")
    assert code == 0, err
    message = refused("train", config_file)
    assert str(tmp_path / "run") in message and "--resume" in message and "--output-dir" in message


def test_an_output_dir_that_is_a_file(refused, config_file, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert str(tmp_path / "run") in refused("train", config_file)


def test_two_runs_cannot_write_to_one_folder(trained, settings):
    """The second one starts while the first is at step 2."""
    from lora_cli.report.events import Stepped
    from lora_cli.train import train

    refusals = []

    def start_another(event):
        if isinstance(event, Stepped) and event.step == 2:
            with pytest.raises(RunFolderError) as error:
                train(settings(), resume=True)
            refusals.append(error.value.message)

    run = trained(emit=start_another)
    assert run.summary.steps == 8
    (message,) = refusals
    assert "is writing to" in message and str(Path(settings().output_dir)) in message
