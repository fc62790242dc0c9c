"""Models, adapters, templates and rows as an attacker would make them: one for each known flaw.

Whatever could run says so by creating a file. Each case says which command meets it, and what must be named when it is
refused; one that is harmless in transformers' own classes has to work without the code that it brings.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proofs import tiny

CANARY = "EXECUTED"
_ENDLESS = r"((\w|\.)+)+((\w|\.)+)+!"


@dataclass(frozen=True)
class Case:
    """A hostile thing in a folder of its own."""

    name: str
    make: Callable[[Path, Path], list[str]]
    """Given a copy of a good model and the folder of the case: makes the thing; the command that meets it."""
    named: str
    """What the message must name."""
    code: int = 2


class _Payload:
    def __init__(self, folder: Path) -> None:
        self._canary = str(folder / CANARY)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._canary,)


def train(folder: Path, model: Path, **sections: dict[str, Any]) -> list[str]:
    """The command that trains `model`, or an adapter on it."""
    rows = tiny.make_rows(folder / "rows.jsonl", 9)
    settings = {"train": {"max_steps": 1}, **sections}
    return ["train", str(tiny.write_config(folder / "run.json", model, rows, folder / "run", **settings))]


def make_pickle(path: Path, *, zipped: bool = False) -> None:
    """A pickle that makes the canary two folders up when it is read."""
    raw = pickle.dumps(_Payload(path.parents[1]), protocol=2)
    if not zipped:
        path.write_bytes(raw)
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", raw)
        archive.writestr("archive/version", "3\n")


def make_code(path: Path) -> None:
    """Python that does so when it is run."""
    path.write_text(f"import os\nos.mkdir({str(path.parents[1] / CANARY)!r})\n", encoding="utf-8")


def _change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}), encoding="utf-8")


def _weights(change: Callable[[Path], None]) -> Callable[[Path, Path], list[str]]:
    """Something else in the place of model.safetensors."""

    def make(model: Path, folder: Path) -> list[str]:
        (model / "model.safetensors").unlink()
        change(model)
        return train(folder, model)

    return make


def _model(change: Callable[[Path], None]) -> Callable[[Path, Path], list[str]]:
    """A good model with something changed or added."""

    def make(model: Path, folder: Path) -> list[str]:
        change(model)
        return train(folder, model)

    return make


def _template(text: str) -> Callable[[Path, Path], list[str]]:
    return _model(lambda model: _write(model / "chat_template.jinja", text))


def _write(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def _pipe(name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return change


def _shards(*names: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        weight_map = {f"transformer.h.{number}.attn.c_attn.weight": name for number, name in enumerate(names)}
        _change(model / "model.safetensors.index.json", metadata={}, weight_map=weight_map)
        make_pickle(model / "evil.bin")
        shutil.copy(model / "evil.bin", model.parent / "outside.safetensors")

    return change


def _own_code(model: Path, *, model_type: str) -> None:
    _change(
        model / "config.json",
        model_type=model_type,
        auto_map={"AutoConfig": "evil_code.EvilConfig", "AutoModelForCausalLM": "evil_code.EvilModel"},
    )
    make_code(model / "evil_code.py")


def _tokenizer_code(model: Path) -> None:
    _change(
        model / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["evil_code.EvilTokenizer", "evil_code.EvilTokenizer"]},
    )
    make_code(model / "evil_code.py")


def _adapter(change: Callable[[Path], None], **settings: Any) -> Callable[[Path, Path], list[str]]:
    """An adapter to go on from."""

    def make(model: Path, folder: Path) -> list[str]:
        return train(folder, model, adapter={"path": str(_make_adapter(folder, model, change, settings))})

    return make


def _make_adapter(folder: Path, model: Path, change: Callable[[Path], None], settings: dict[str, Any]) -> Path:
    adapter = folder / "adapter"
    adapter.mkdir()
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]}
    _change(adapter / "adapter_config.json", **{**plain, "base_model_name_or_path": str(model), **settings})
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    (adapter / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    change(adapter)
    return adapter


def _pickled_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    make_pickle(adapter / "adapter_model.bin")


def _nothing(folder: Path) -> None:
    """No change."""


def _linked_base(command: str) -> Callable[[Path, Path], list[str]]:
    """A bare adapter whose base is a folder that links to a file outside of it."""

    def make(model: Path, folder: Path) -> list[str]:
        (folder / "secret").mkdir()
        shutil.move(model / "model.safetensors", folder / "secret" / "weights")
        (model / "model.safetensors").symlink_to("../secret/weights")
        adapter = _make_adapter(folder, model, _nothing, {})
        if command == "merge":
            return ["merge", str(adapter), "--output", str(folder / "run")]
        return ["generate", str(adapter), "--prompt", "a", "--max-new-tokens", "1"]

    return make


def _rows(change: Callable[[Path], Path]) -> Callable[[Path, Path], list[str]]:
    def make(model: Path, folder: Path) -> list[str]:
        return train(folder, model, data={"train": str(change(folder))})

    return make


def _pipe_of_rows(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.jsonl")
    return folder / "pipe.jsonl"


def _script_of_rows(folder: Path) -> Path:
    (folder / "dataset").mkdir()
    make_code(folder / "dataset" / "dataset.py")
    return folder / "dataset"


def _config(text: str) -> Callable[[Path, Path], list[str]]:
    def make(model: Path, folder: Path) -> list[str]:
        path = folder / "run.yaml"
        path.write_text(text.replace("CANARY", str(folder / CANARY)), encoding="utf-8")
        return ["train", str(path)]

    return make


_LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))

CASES = (
    Case(
        "a pickle named model.safetensors",
        _weights(lambda m: make_pickle(m / "model.safetensors")),
        "model.safetensors",
    ),
    Case(
        "a torch.save archive named model.safetensors",
        _weights(lambda m: make_pickle(m / "model.safetensors", zipped=True)),
        "model.safetensors",
    ),
    Case(
        "a pickle beside nothing",
        _weights(lambda m: make_pickle(m / "pytorch_model.bin", zipped=True)),
        "pytorch_model.bin",
    ),
    Case("an index of pickles", _weights(_shards("evil.bin")), "evil.bin"),
    Case("a shard above the folder", _weights(_shards("../outside.safetensors")), "../outside.safetensors"),
    Case("a shard at an absolute path", _weights(_shards("/etc/x.safetensors")), "/etc/x.safetensors"),
    Case("a shard that is no name", _weights(_shards({"a": 1})), "index.json"),
    Case(
        "weights named by config.json",
        _model(lambda m: _change(m / "config.json", transformers_weights="../w.bin")),
        "transformers_weights",
    ),
    Case(
        "attention code from the hub",
        _model(lambda m: _change(m / "config.json", attn_implementation="evil/kernel")),
        "attn_implementation",
    ),
    Case(
        "an adapter inside the model",
        _model(lambda m: _change(m / "adapter_config.json", peft_type="LORA", base_model_name_or_path="/etc")),
        "adapter",
    ),
    Case("code for an unknown architecture", _model(lambda m: _own_code(m, model_type="evil")), "trust_remote_code"),
    Case("code for a known architecture", _model(lambda m: _own_code(m, model_type="gpt2")), "is not run", code=0),
    Case("code in a tokenizer", _model(_tokenizer_code), "is not run", code=0),
    Case("config.json nested without end", _model(lambda m: _write(m / "config.json", "[" * 100_000)), "config.json"),
    Case(
        "a vocabulary elsewhere",
        _model(lambda m: _change(m / "tokenizer_config.json", vocab_file="/dev/zero", tokenizer_file="/dev/zero")),
        "",
        code=0,
    ),
    *(
        Case(f"a pipe named {name}", _model(_pipe(name)), name)
        for name in (
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "chat_template.jinja",
            "generation_config.json",
        )
    ),
    Case(
        "a template that never ends",
        _template(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
            "{% endfor %}{% endfor %}{% endfor %}"
        ),
        "chat template",
    ),
    Case(
        "a template that eats memory",
        _template("{% set n = namespace(s='x' * 9999) %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}"),
        "chat template",
    ),
    Case("a template that computes without end", _template("{{ 9 ** 9 ** 9 ** 9 }}"), "chat template"),
    Case(
        "a template that writes without end",
        _template("{{ messages[0]['content'] }}{{ 'x' * 99999999 }}"),
        "chat template",
    ),
    Case(
        "a template that leaves its sandbox",
        _template("{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}"),
        "chat template",
    ),
    Case("a template that includes files", _template("{% include '/etc/passwd' %}"), "chat template"),
    Case(
        "a pickled adapter",
        _adapter(_pickled_weights),
        "adapter_model.bin",
    ),
    Case(
        "a pickle named adapter_model.safetensors",
        _adapter(lambda a: make_pickle(a / "adapter_model.safetensors")),
        "adapter_model.safetensors",
    ),
    Case("a pipe for an adapter's weights", _adapter(_pipe("adapter_model.safetensors")), "adapter_model.safetensors"),
    Case(
        "an adapter that imports",
        _adapter(_nothing, megatron_config={"a": 1}, megatron_core="evil_code"),
        "megatron_config",
    ),
    Case(
        "an adapter of another library",
        _adapter(_nothing, auto_mapping={"base_model_class": "E", "parent_library": "evil_code"}),
        "evil_code",
    ),
    Case("an adapter that changes the base", _adapter(_nothing, init_lora_weights="pissa"), "init_lora_weights"),
    Case(
        "an adapter with a pickled cache",
        _adapter(_nothing, init_lora_weights="corda", corda_config={"cache_file": "x"}),
        "corda_config",
    ),
    Case("an adapter with an endless expression", _adapter(_nothing, target_modules=_ENDLESS), "takes longer"),
    Case("an adapter with an endless rank pattern", _adapter(_nothing, rank_pattern={_ENDLESS: 3}), "takes longer"),
    Case(
        "an adapter that is a list", _adapter(lambda a: _write(a / "adapter_config.json", "[]")), "adapter_config.json"
    ),
    Case("an adapter with a word for its rank", _adapter(_nothing, r="many"), "adapter"),
    Case("a link out of a base to merge", _linked_base("merge"), "secret/weights"),
    Case("a link out of a base to generate with", _linked_base("generate"), "secret/weights"),
    Case("a pipe of rows", _rows(_pipe_of_rows), "pipe.jsonl"),
    Case("a device of rows", _rows(lambda folder: Path("/dev/zero")), "/dev/zero"),
    Case("rows with a script", _rows(_script_of_rows), "dataset"),
    Case("a config that calls", _config("model: !!python/object/apply:os.mkdir [CANARY]\n"), "run.yaml"),
    Case("a config of a thousand million laughs", _config(_LAUGHS), "run.yaml"),
    Case("a config nested without end", _config("[" * 50_000), "run.yaml"),
)
