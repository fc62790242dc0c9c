"""Who answers a prompt: the base, an adapter on it, several adapters at once, or a whole model.

The base is loaded once, quantized as in training; voices are put on and taken off. Knows nothing about prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_cli.engine.assembly import leave_out_side_outputs
from lora_cli.engine.computation import Computation
from lora_cli.engine.trained import Target, adapter_folder, check_same_base, split_weight
from lora_cli.engine.wearing import Piece, worn
from lora_cli.errors import UserError
from lora_cli.evaluate.models import Loaded, Reader
from lora_cli.model.architecture import read_architecture
from lora_cli.model.dtypes import resolve_dtype
from lora_cli.model.weights import load_base
from lora_cli.report.events import Emit, Working

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OWN_CHOICE = ("auto", "documents")


@dataclass(frozen=True)
class Voice:
    """One that answers."""

    name: str | None
    """As it is shown: a folder, or a stack as `docs:0.7+chat`. None for the base."""
    pieces: tuple[Piece, ...] = ()
    whole: Path | None = None
    """The folder of a whole model, in place of adapters on the base."""


BASE = Voice(None)


def find_voices(target: Target, adapters: Sequence[str], *, base: bool) -> list[Voice]:
    """The base if asked for, what the target names, and `adapters`, each a folder or a stack of them.

    Raises:
        UserError: an adapter that isn't there, or nobody at all.
    """
    voices = [BASE] if base or target.whole else []
    if not target.whole:
        if target.config.adapter is None:
            voices.append(Voice(str(target.result), whole=target.result))
        else:
            voices.append(Voice(str(target.result), (Piece(target.result),)))
    return [*voices, *map(_voice, adapters)]


def _voice(text: str) -> Voice:
    if Path(text).expanduser().exists():
        folder = adapter_folder(text)
        return Voice(str(folder), (Piece(folder),))
    pieces = []
    for part in text.split("+"):
        path, weight = split_weight(part)
        if not Path(path).expanduser().is_dir():
            raise UserError(
                f"--adapter {text}: there is no folder {Path(path).expanduser().absolute()}",
                remedy="Give a run or adapter folder, or several of them as A:0.7+B:0.3.",
            )
        pieces.append(Piece(adapter_folder(path), weight))
    return Voice(text, tuple(pieces))


@dataclass(frozen=True)
class Voices:
    """A loaded base that speaks with any voice."""

    loaded: Loaded
    reader: Reader

    @contextmanager
    def speaking(self, voice: Voice) -> Iterator[PreTrainedModel]:
        """The model that answers with this voice. One at a time; afterwards the base is as it was."""
        if voice.whole is not None:
            named = {"name_or_path": str(voice.whole), "revision": None, "quantization": None}
            model = self.loaded.config.model.model_copy(update=named)
            architecture = read_architecture(model)
            attention = self.loaded.computation.attention
            whole = load_base(
                model,
                architecture,
                device=self.loaded.device,
                dtype=self.loaded.computation.dtype,
                attention=attention,
            )
            leave_out_side_outputs(whole)
            yield whole
        elif voice.pieces:
            with worn(self.loaded.base, voice.pieces, self.loaded.computation.dtype) as model_with_adapter:
                yield model_with_adapter
        else:
            yield self.loaded.base


def load_voices(target: Target, reader: Reader, emit: Emit) -> Voices:
    """The base with its weights, on the GPU where there is one.

    Raises:
        ModelError: the weights can't be loaded, or aren't those that the adapter was trained on.
    """
    config = target.config
    check_same_base(target, Path(target.model.name_or_path).expanduser())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    architecture = read_architecture(config.model)
    dtype = resolve_dtype(config.model.dtype, device)
    asked = config.model.attn_implementation
    emit(Working("loading weights"))
    base = load_base(
        config.model, architecture, device=device, dtype=dtype, attention=None if asked in _OWN_CHOICE else asked
    )
    leave_out_side_outputs(base)
    if config.model.resize_embeddings and len(reader.tokenizer) > architecture.get_text_config().vocab_size:
        base.resize_token_embeddings(len(reader.tokenizer))
    # Answers are generated one document to a row, so there is nothing to prove about packing.
    computation = Computation("single", "full", dtype, str(base.config._attn_implementation))
    return Voices(Loaded(config, base, computation, device, micro_batch_tokens=0), reader)
