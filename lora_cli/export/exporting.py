"""`export`: from a target to what another program takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_cli.data.jinja import JinjaTemplate
from lora_cli.engine.trained import Target, check_same_base, find_target
from lora_cli.errors import LoraError, ModelError, UserError
from lora_cli.export.adapter import write_adapter
from lora_cli.export.converter import convert, find_converter
from lora_cli.export.gguf import TYPES, Written, import_gguf, write_model
from lora_cli.export.ollama import MODELFILE, generation_settings, modelfile
from lora_cli.export.turns import Turns, take_apart
from lora_cli.export.vllm import serve_adapter, serve_whole
from lora_cli.merge.base import Base, open_base
from lora_cli.merge.staging import check_free, commit, staged
from lora_cli.model.architecture import read_architecture
from lora_cli.model.hub import model_folder
from lora_cli.model.tokenizer import load_tokenizer, stop_tokens
from lora_cli.report.events import Emit, Warned, Working, ignore
from lora_cli.runs.atomic import sync, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Destination = Literal["gguf", "ollama", "vllm"]
_WEIGHTS = "model.gguf"


@dataclass(frozen=True)
class Exported:
    """What `lora export` did."""

    to: Destination
    what: Literal["model", "adapter"]
    output: str | None
    """None where there is nothing to write."""
    architecture: str | None
    type: str | None
    """Of the weights in the file."""
    tensors: int | None
    num_bytes: int | None
    command: tuple[str, ...]
    """What starts it."""
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Source:
    """What is exported."""

    target: Target
    whole: bool
    folder: Path
    """Of the whole model."""
    name: str


def export(
    target: str, to: Destination, output: Path | None = None, *, type_name: str = "auto", emit: Emit = ignore
) -> Exported:
    """A whole model (a merged one, say), or an adapter unmerged, for another program.

    Args:
        output: a .gguf file for `gguf`, a folder for `ollama`; nothing for `vllm`.
        type_name: of GGUF's weights; `auto` loses nothing.

    Raises:
        UserError: what can't be converted, and why; or an output that can't be written.
    """
    found = find_target(target, whole_models=True)
    whole = found.whole or found.config.adapter is None
    model = found.model if found.whole else found.model.model_copy(update={"name_or_path": str(found.result)})
    source = _Source(found, whole, model_folder(model) if whole else found.result, found.title)
    if to == "vllm":
        return _vllm(source, target, output)
    if type_name not in TYPES:
        raise UserError(f"--type {type_name} is not one of {', '.join(TYPES)}")
    if output is None:
        raise UserError(f"--to {to} needs --output", remedy="A .gguf file for gguf, a folder for ollama.")
    import_gguf()
    emit(Working("reading the headers of the model"))
    if to == "gguf":
        return _gguf(source, output, type_name, emit)
    return _ollama(source, target, output, type_name, emit)


def _vllm(source: _Source, target: str, output: Path | None) -> Exported:
    if output is not None:
        raise UserError("--to vllm writes nothing: leave --output away")
    if source.whole:
        served = target if source.target.whole else str(source.folder)
        command = serve_whole(served, source.name, source.target)
    else:
        command = serve_adapter(source.target, source.name)
    what: Literal["model", "adapter"] = "model" if source.whole else "adapter"
    return Exported("vllm", what, None, None, None, None, None, tuple(command), ())


def _gguf(source: _Source, output: Path, type_name: str, emit: Emit) -> Exported:
    with _new_file(output) as path:
        if source.whole:
            written, notes = _write_whole(source, path, type_name, emit)
        else:
            written, notes = _write_adapter(source, path), ()
    what: Literal["model", "adapter"] = "model" if source.whole else "adapter"
    run = ("llama-cli", "-m", str(output)) if source.whole else ("llama-cli", "-m", "BASE.gguf", "--lora", str(output))
    size = output.stat().st_size
    return Exported("gguf", what, str(output), written.architecture, written.type, written.tensors, size, run, notes)


def _ollama(source: _Source, target: str, output: Path, type_name: str, emit: Emit) -> Exported:
    if not source.whole:
        raise ModelError(
            f"{target} is an adapter; Ollama would need its base as it was trained on, and has its own copies",
            remedy=f"Merge it first: lora merge {target} --output DIR, then export DIR.",
        )
    check_free(output)
    model = _whole_model(source)
    tokenizer = load_tokenizer(model)
    config = read_architecture(model)
    turns = None
    if tokenizer.chat_template:
        turns = take_apart(tokenizer, adds_bos=_template_has_bos(tokenizer))
    else:
        emit(Warned("there is no chat template: Ollama will hand prompts to the model as they are"))
    stops = sorted({str(tokenizer.decode([number])) for number in stop_tokens(tokenizer, config, model)})
    with staged(output, _size(source.folder)) as stage:
        written, notes = _write_whole(source, stage / _WEIGHTS, type_name, emit)
        positions = int(getattr(config, "max_position_embeddings", 4096))
        text = modelfile(_WEIGHTS, turns, stops, generation_settings(source.folder), positions)
        write_text(stage / MODELFILE, text)
        sync(stage / _WEIGHTS)
        commit(stage, output)
    command = ("ollama", "create", source.name.lower(), "-f", str(output / MODELFILE))
    size = (output / _WEIGHTS).stat().st_size
    facts = (written.architecture, written.type, written.tensors, size)
    return Exported("ollama", "model", str(output), *facts, command, (*notes, *_said(turns, tokenizer)))


def _said(turns: Turns | None, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    if turns is None:
        return ()
    without = "; it has no system turn" if turns.system is None else ""
    notes = [f"the template was compared with the tokenizer's own on conversations{without}"]
    if "strftime_now" in str(tokenizer.chat_template):
        notes.append("the date in its opening stays today's: Ollama's language has no clock")
    return tuple(notes)


def _write_whole(source: _Source, path: Path, type_name: str, emit: Emit) -> tuple[Written, tuple[str, ...]]:
    """A whole model; by llama.cpp's own converter where it isn't known here."""
    model = _whole_model(source)
    try:
        base = _open(source)
        tokenizer = load_tokenizer(model)
        stops = stop_tokens(tokenizer, base.config, model)
        add_bos = _template_has_bos(tokenizer) if tokenizer.chat_template else None
        written = write_model(
            base, tokenizer, stops, path, name=source.name, type_name=type_name, add_bos=add_bos, emit=emit
        )
    except LoraError as error:
        converter = find_converter()
        if converter is None:
            raise
        path.unlink(missing_ok=True)
        emit(Working("running llama.cpp's converter"))
        convert(converter, source.folder, path, type_name)
        return Written("by llama.cpp's converter", type_name, 0), (f"{error.message}: {converter} wrote it",)
    return written, ()


def _write_adapter(source: _Source, path: Path) -> Written:
    model = source.target.model
    folder = model_folder(model)
    check_same_base(source.target, folder)
    base = open_base(model, folder, read_architecture(model), None)
    return write_adapter(base, source.folder, path, name=source.name)


def _open(source: _Source) -> Base:
    model = _whole_model(source)
    return open_base(model, source.folder, read_architecture(model), None)


def _whole_model(source: _Source) -> Any:
    return source.target.model.model_copy(
        update={"name_or_path": str(source.folder), "revision": None, "quantization": None}
    )


def _template_has_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a conversation begins with a BOS: then that's what the model was trained on, and else it isn't."""
    text = JinjaTemplate(tokenizer).render([{"role": "user", "content": "a"}], ())
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@contextmanager
def _new_file(output: Path) -> Iterator[Path]:
    """A name beside `output`, which it takes when all went well."""
    if output.exists():
        raise UserError(f"{output.absolute()} is taken", remedy="Give another --output; nothing is overwritten.")
    path = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield path
        sync(path)
        path.rename(output)
        sync(output.parent)
    except OSError as error:
        raise UserError(f"{output.absolute()} can't be written: {error.strerror}") from error
    finally:
        path.unlink(missing_ok=True)
