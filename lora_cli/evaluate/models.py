"""The base, loaded once and quantized as trained, and adapters put on it and taken off again.

Knows how a target becomes a model on a device; knows nothing about rows or figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_cli.config import Config
from lora_cli.engine.assembly import load_model, make_computation
from lora_cli.engine.computation import Computation
from lora_cli.engine.generation import Sampling
from lora_cli.engine.planning import AUTO_MICRO_BATCH_TOKENS
from lora_cli.engine.selftest import prove_run
from lora_cli.engine.trained import Target, adapter_folder, check_same_base, is_adapter
from lora_cli.engine.wearing import Piece, read_names, worn
from lora_cli.model.architecture import read_architecture
from lora_cli.model.dtypes import dtype_name
from lora_cli.model.tokenizer import check_vocabulary, load_tokenizer, stop_tokens
from lora_cli.model.weights import check_weight_files, describe_quantization
from lora_cli.report.events import Emit, Warned, Working
from lora_cli.runs.folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


CPU_TOKENS = 1024
"""At most so many at once on a CPU: near its caches, scoring takes a fifth less time than at 4,096."""


@dataclass(frozen=True)
class Reader:
    """What turns rows into tokens for a target: known before any weight is read."""

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: frozenset[int]
    position_limit: int | None
    """Tokens that the model has positions for, where config.json says."""

    def fitting(self, sampling: Sampling, prompt_tokens: int) -> Sampling:
        """`sampling`, with an answer that ends where the model's positions do."""
        if self.position_limit is None:
            return sampling
        room = max(1, min(sampling.max_new_tokens, self.position_limit - prompt_tokens))
        return replace(sampling, max_new_tokens=room)


@dataclass(frozen=True)
class Loaded:
    """A base on its device, and how it is run."""

    config: Config
    base: PreTrainedModel
    computation: Computation
    device: torch.device
    micro_batch_tokens: int

    @property
    def precision(self) -> str:
        return describe_quantization(self.config.model.quantization) or dtype_name(self.computation.dtype)

    def precision_of(self, result: Path) -> str:
        """At what precision base and result are compared: a merged model runs in the weights that it has."""
        if self.config.model.quantization is None or is_adapter(result):
            return self.precision
        return f"{self.precision}; the model in {dtype_name(self.computation.dtype)}"

    @contextmanager
    def trained(self, result: Path) -> Iterator[PreTrainedModel]:
        """The base with the adapter in `result` on it, or the whole model there, if it was trained in full.

        Afterwards the base is as it was.
        """
        if not is_adapter(result):
            yield self._whole(result)
            return
        with worn(self.base, [Piece(result)], self.computation.dtype) as model:
            yield model

    def _whole(self, folder: Path) -> PreTrainedModel:
        named = {"name_or_path": str(folder), "revision": None, "quantization": None}
        config = self.config.model_copy(update={"model": self.config.model.model_copy(update=named)})
        model = load_model(config, read_architecture(config.model), self.computation, self.device)
        self.computation.prepare(model)
        return model


def trained_folder(path: str) -> Path:
    """What is judged beside the target: a run's result, an adapter, or a whole model such as a merged one.

    Raises:
        ModelError: nothing there can be used.
    """
    folder = Path(path).expanduser()
    inner = RunFolder(folder).adapter_dir
    whole = inner if inner.is_dir() else folder
    if is_adapter(whole) or not (whole / "config.json").is_file():
        return adapter_folder(path)
    check_weight_files(whole)
    return whole


def check_results(results: Sequence[Path]) -> None:
    """Look at every adapter's tensors, before weights of a base are read.

    Raises:
        ModelError: one is damaged, or not finite.
    """
    for folder in results:
        if is_adapter(folder):
            read_names(folder)


def read_target(target: Target) -> Reader:
    """The tokenizer that the adapter was trained with, and the tokens that end a turn.

    Raises:
        ModelError: no tokenizer, or one that reaches past the model's embeddings.
    """
    model = target.config.model
    architecture = read_architecture(model)
    own = target.bare and (target.result / "tokenizer_config.json").is_file()
    from_adapter = model.model_copy(update={"name_or_path": str(target.result), "revision": None})
    tokenizer = load_tokenizer(from_adapter if own else model)
    check_vocabulary(tokenizer, architecture, model)
    limit = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    return Reader(tokenizer, stop_tokens(tokenizer, architecture, model), limit if isinstance(limit, int) else None)


def load_target(target: Target, reader: Reader, emit: Emit, *, quantized: bool = True) -> Loaded:
    """The base with its weights, on the GPU where there is one, quantized as it was in training or not at all.

    Raises:
        ModelError: the weights can't be loaded, or aren't those that the adapter was trained on.
    """
    config = target.config
    if not quantized:
        model = config.model.model_copy(update={"quantization": None})
        config = config.model_copy(update={"model": model})
    check_same_base(target, Path(target.model.name_or_path).expanduser())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    architecture = read_architecture(config.model)
    emit(Working("proving packing and loss"))
    proof = prove_run(config, architecture)
    for note in proof.notes:
        emit(Warned(note))
    computation = make_computation(config, proof, device)
    emit(Working("loading weights"))
    base = load_model(config, architecture, computation, device)
    if config.model.resize_embeddings and len(reader.tokenizer) > architecture.get_text_config().vocab_size:
        base.resize_token_embeddings(len(reader.tokenizer))
    computation.prepare(base)
    asked = config.train.micro_batch_tokens
    tokens = AUTO_MICRO_BATCH_TOKENS[device.type] if asked == "auto" else asked
    if device.type == "cpu":
        tokens = min(tokens, CPU_TOKENS)
    return Loaded(config, base, computation, device, tokens)
