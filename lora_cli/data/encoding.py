"""Marked text to token ids, with one flag per token.

A token is trained when it holds a non-space character of a trained span and none of another role's content,
or when it is white space wholly inside a trained span. The first token never is: nothing predicts it.

Control tokens spelled in the data stay text. Rows that spell one are cut at the template's own control tokens
and the pieces encoded as plain text, after a check that cutting there changes nothing for this tokenizer;
where it would, that is an error.

Knows fast tokenizers, which run many texts at once in their own threads; knows nothing about templates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.controls import Controls
from lora_cli.data.examples import Example
from lora_cli.data.marked import MarkedText, Span
from lora_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LAST_SPACE = 0x3000
_IS_SPACE = np.array([chr(code).isspace() for code in range(_LAST_SPACE + 1)] + [False])


@dataclass(frozen=True)
class _Tokens:
    ids: list[int]
    offsets: list[Span]


class Encoder:
    """A tokenizer at work on marked texts.

    Raises:
        DataError: the tokenizer can't say which characters its tokens stand for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, controls: Controls) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} can't say which characters its tokens stand for: no exact mask",
                remedy="Use a model with a fast tokenizer (one with a tokenizer.json).",
            )
        self._backend: Any = tokenizer.backend_tokenizer
        self._controls = controls
        self._control_ids = frozenset(controls.ids.values())

    def encode(self, texts: Sequence[MarkedText]) -> list[Example | DataError]:
        """The tokens of each text. A text that can't be encoded gives its error, for the caller to place."""
        # A tokenizer.json may ask for truncation and padding; transformers sets both anew at each of its
        # calls.
        self._backend.no_truncation()
        self._backend.no_padding()
        errors = {index: error for index, text in enumerate(texts) if (error := _unencodable(text)) is not None}
        good = [text for index, text in enumerate(texts) if index not in errors]
        tokens: list[_Tokens | DataError] = []
        spelled = [self._spelled_controls(text) for text in good]
        plain = iter(self._plain([text.text for text, found in zip(good, spelled, strict=True) if not found]))
        for text, found in zip(good, spelled, strict=True):
            tokens.append(self._as_text(text, found) if found else next(plain))
        encoded = [(text, one) for text, one in zip(good, tokens, strict=True) if isinstance(one, _Tokens)]
        examples = iter(_flagged(encoded))
        results: list[Example | DataError] = []
        remaining = iter(tokens)
        for index in range(len(texts)):
            error = errors.get(index)
            one = error if error is not None else next(remaining)
            results.append(one if isinstance(one, DataError) else next(examples))
        return results

    def spells_controls(self, text: MarkedText) -> bool:
        return bool(self._spelled_controls(text))

    def _plain(self, texts: list[str]) -> Iterator[_Tokens]:
        for encoding in self._backend.encode_batch(texts, add_special_tokens=False):
            yield _Tokens(encoding.ids, encoding.offsets)

    def _spelled_controls(self, text: MarkedText) -> list[str]:
        return [found for start, end in text.data if (found := self._controls.first_in(text.text[start:end]))]

    def _as_text(self, text: MarkedText, spelled: list[str]) -> _Tokens | DataError:
        """The tokens of a text whose data spells control tokens."""
        whole = next(self._plain([text.text]))
        cut, own = self._pieces(text)
        if cut.ids == whole.ids:
            with _plain_controls(self._backend):
                kept, _ = self._pieces(text)
            if sum(number in self._control_ids for number in kept.ids) == own:
                return kept
        return DataError(
            f"the text {spelled[0]!r} is a control token of this tokenizer and can't be kept as text here",
            remedy="Take it out of the row, or spell it otherwise.",
        )

    def _pieces(self, text: MarkedText) -> tuple[_Tokens, int]:
        """The tokens, cut at the template's own control tokens, which go by their ids; and how many of these."""
        ids: list[int] = []
        offsets: list[Span] = []
        position = 0
        own = self._template_controls(text)
        for start, end in [*own, (len(text.text), len(text.text))]:
            if position < start:
                piece = next(self._plain([text.text[position:start]]))
                ids += piece.ids
                offsets += [(position + left, position + right) for left, right in piece.offsets]
            if start < end:
                ids.append(self._controls.ids[text.text[start:end]])
                offsets.append((start, end))
            position = end
        return _Tokens(ids, offsets), len(own)

    def _template_controls(self, text: MarkedText) -> list[Span]:
        """Control tokens outside the data."""
        edges = [0, *chain.from_iterable(text.data), len(text.text)]
        found = []
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            for match in self._controls.find(text.text[start:end]):
                found.append((start + match.start(), start + match.end()))
        return found


@contextmanager
def _plain_controls(backend: Any) -> Iterator[None]:
    """Within it, the tokenizer reads no control tokens."""
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        yield
    finally:
        backend.encode_special_tokens = before


def _unencodable(text: MarkedText) -> DataError | None:
    try:
        text.text.encode()
    except UnicodeEncodeError as error:
        return DataError(
            f"the text holds half of a surrogate pair, \\u{ord(text.text[error.start]):04x}, no character",
            remedy="The row's JSON was cut inside an escape such as \\ud83d\\ude00; write it anew.",
        )
    return None


def _flagged(encoded: Sequence[tuple[MarkedText, _Tokens]]) -> Iterator[Example]:
    """The examples of many texts, whose characters are looked at all at once."""
    if not encoded:
        return
    flags = _token_flags(encoded)
    # One array for all texts: a row's own are views of it, as making small arrays costs more than filling them.
    flat = np.fromiter(chain.from_iterable(tokens.ids for _, tokens in encoded), dtype=np.int32, count=len(flags))
    position = 0
    for text, tokens in encoded:
        piece = slice(position, position + len(tokens.ids))
        position = piece.stop
        ids, trained = flat[piece], flags[piece]
        if text.before or text.append is not None:
            everything = text.trained == ((0, len(text.text)),)
            tail = [] if text.append is None else [text.append]
            ids = np.concatenate([np.array(text.before, dtype=np.int32), ids, np.array(tail, dtype=np.int32)])
            trained = np.concatenate([np.full(len(text.before), everything), trained, np.ones(len(tail), np.bool_)])
        trained[:1] = False
        yield Example(ids, trained)


def _token_flags(encoded: Sequence[tuple[MarkedText, _Tokens]]) -> NDArray[np.bool_]:
    """One flag per token, over all texts laid end to end."""
    joined = "".join(text.text for text, _ in encoded)
    codes = np.frombuffer(joined.encode("utf-32-le"), dtype="<u4")
    space = _IS_SPACE[np.minimum(codes, _LAST_SPACE + 1)]
    base = np.cumsum([0, *(len(text.text) for text, _ in encoded)])[:-1]
    trained = _covered(len(joined), base, [text.trained for text, _ in encoded])
    others = _covered(len(joined), base, [text.others for text, _ in encoded])

    sizes = [len(tokens.ids) for _, tokens in encoded]
    flat = chain.from_iterable(chain.from_iterable(tokens.offsets for _, tokens in encoded))
    offsets = np.fromiter(flat, dtype=np.int64, count=2 * sum(sizes)).reshape(-1, 2)
    start, end = (offsets + np.repeat(base, sizes)[:, None]).T

    words = _counts(trained & ~space)
    inside = _counts(trained)
    foreign = _counts(others & ~space)
    holds_words = (words[end] > words[start]) & (foreign[end] == foreign[start])
    inner_space = (end > start) & (inside[end] - inside[start] == end - start)
    # Byte-level tokenizers may trim a token of spaces down to an empty range at its end.
    before_end = np.maximum(end - 1, 0)
    trimmed_space = (end == start) & (offsets[:, 1] > 0) & trained[before_end] & space[before_end]
    flags: NDArray[np.bool_] = holds_words | (inner_space & (foreign[end] == foreign[start])) | trimmed_space
    return flags


def _covered(size: int, base: NDArray[np.int64], spans: Sequence[Sequence[Span]]) -> NDArray[np.bool_]:
    covered = np.zeros(size, dtype=np.bool_)
    for shift, one in zip(base, spans, strict=True):
        for start, end in one:
            covered[shift + start : shift + end] = True
    return covered


def _counts(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """counts[i]: how many are set before i."""
    counts = np.zeros(len(flags) + 1, dtype=np.int64)
    np.cumsum(flags, out=counts[1:])
    return counts
