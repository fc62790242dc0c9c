"""A whole model as one GGUF file, written a tensor at a time.

Knows nothing about chat templates but that the tokenizer has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_cli.errors import ModelError, UserError
from lora_cli.export.architectures import Architecture, Piece, find_architecture
from lora_cli.export.vocabulary import read_vocabulary
from lora_cli.merge.base import Base
from lora_cli.merge.layout import Group
from lora_cli.report.events import Emit, Working

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
_OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


@dataclass(frozen=True)
class Written:
    """What is in a file."""

    architecture: str
    type: str
    tensors: int


def import_gguf() -> Any:
    """The `gguf` package.

    Raises:
        UserError: it isn't installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF needs the gguf package", remedy="pip install 'lora-cli[gguf]'") from error
    return gguf


def write_model(
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: frozenset[int],
    path: Path,
    *,
    name: str,
    type_name: str,
    add_bos: bool | None,
    emit: Emit,
) -> Written:
    """The model `base` at `path`. `add_bos`: whether text begins with a BOS; None leaves that to the tokenizer.

    Raises:
        UserError: an architecture or a tokenizer that GGUF has no words for here.
    """
    gguf = import_gguf()
    architecture = find_architecture(base.config)
    vocabulary = read_vocabulary(tokenizer, base.config.vocab_size)
    if add_bos is not None:
        vocabulary = replace(vocabulary, add_bos=add_bos)
    pieces = list(_pieces(base, architecture))
    chosen = _of_dtype(pieces, base) if type_name == "auto" else type_name
    with writing(gguf, path, architecture.name) as writer:
        writer.add_name(name)
        writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[chosen]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        architecture.describe(writer)
        vocabulary.describe(writer)
        _describe_special(writer, tokenizer, stop_token_ids)
        factors = architecture.rope_factors()
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.numpy().dtype, factors.numel() * 4)
        for _, parts in pieces:
            for piece in parts:
                _announce(gguf, writer, piece, chosen)
        begin(writer)
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for done, (group, parts) in enumerate(pieces, start=1):
            values = base.read(group, as_quantized=False)
            for parameter, piece in _with_parameter(group, parts):
                writer.write_tensor_data(encoded(gguf, piece.make(values[parameter]), _type(piece, chosen)))
            emit(Working("writing", done, len(pieces), "tensors"))
    count = sum(len(parts) for _, parts in pieces) + (factors is not None)
    return Written(architecture.name, chosen, count)


@contextmanager
def writing(gguf: Any, path: Path, architecture: str) -> Iterator[Any]:
    writer = gguf.GGUFWriter(path, architecture)
    try:
        yield writer
    finally:
        writer.close()


def begin(writer: Any) -> None:
    """Header, keys and the list of tensors; their numbers follow."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def encoded(gguf: Any, value: Tensor, type_name: str) -> Any:
    """A tensor's numbers as they lie in the file."""
    if type_name == "f16" and not bool(torch.isfinite(value.half()).all()):
        raise ModelError("a weight doesn't fit float16", remedy="Give --type bf16 or f32.")
    return gguf.quants.quantize(value.float().contiguous().numpy(), _quantization(gguf, type_name))


def _quantization(gguf: Any, type_name: str) -> Any:
    return getattr(gguf.GGMLQuantizationType, type_name.upper())


def _pieces(base: Base, architecture: Architecture) -> Iterator[tuple[Group, list[Piece]]]:
    """The tensors of the file, by the group of the model that they come from. Tied weights are written once."""
    wanted = base.model.state_dict()
    for group in base.layout.groups:
        found = [piece for name in group.parameters for piece in architecture.pieces(name, tuple(wanted[name].shape))]
        yield group, found


def _with_parameter(group: Group, pieces: list[Piece]) -> list[tuple[str, Piece]]:
    """Each piece with the parameter that it is made from: all of one, where a group holds one parameter."""
    if len(group.parameters) == 1:
        return [(group.parameters[0], piece) for piece in pieces]
    assert len(group.parameters) == len(pieces), f"{group.parameters} have no order in the file"
    return list(zip(group.parameters, pieces, strict=True))


def _announce(gguf: Any, writer: Any, piece: Piece, type_name: str) -> None:
    import numpy as np

    kind = _quantization(gguf, _type(piece, type_name))
    try:
        shape = gguf.quants.quant_shape_to_byte_shape(piece.shape, kind)
    except ValueError as error:
        raise ModelError(f"{piece.name}: {error}", remedy="Give --type f16 or bf16.") from error
    num_bytes = 1
    for size in shape:
        num_bytes *= size
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        plain = np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16
        writer.add_tensor_info(piece.name, piece.shape, np.dtype(plain), num_bytes)
    else:
        writer.add_tensor_info(piece.name, shape, np.dtype(np.uint8), num_bytes, kind)


def _type(piece: Piece, type_name: str) -> str:
    return "f32" if piece.float32 else type_name


def _of_dtype(pieces: list[tuple[Group, list[Piece]]], base: Base) -> str:
    """The type that loses nothing."""
    sizes: dict[torch.dtype, int] = {}
    for group, _ in pieces:
        for one in group.stored:
            sizes[one.dtype] = sizes.get(one.dtype, 0) + one.num_bytes
    largest = max(sizes, key=lambda dtype: sizes[dtype])
    if largest not in _OF_DTYPE:
        raise ModelError(f"{base.folder.absolute()}: its weights are {largest}", remedy="Give --type.")
    return _OF_DTYPE[largest]


def _describe_special(writer: Any, tokenizer: PreTrainedTokenizerBase, stop_token_ids: frozenset[int]) -> None:
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    others = sorted(stop_token_ids - {tokenizer.eos_token_id})
    if others:
        writer.add_eot_token_id(others[0])  # llama.cpp stops at either
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
