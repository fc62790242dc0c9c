"""A tokenizer in GGUF's words: its tokens, their kinds, its merges, and how it cuts text before it merges.

llama.cpp has its own tokenizers and knows how a text is cut by a name alone. A tokenizer whose way of cutting has no
name here is refused: it would read other tokens than it was trained on, without a word. Knows nothing about weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_cli.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BY_PATTERN = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
}
"""llama.cpp's names for how text is cut, by the regular expression."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, ready to be written."""

    model: str
    """`gpt2` for byte-level merges, `llama` for SentencePiece's."""
    pre: str
    """llama.cpp's name for how text is cut; `default` for SentencePiece, which doesn't."""
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float] | None
    add_bos: bool
    add_space_prefix: bool

    def describe(self, writer: Any) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        else:
            writer.add_token_merges(self.merges)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_space_prefix(self.add_space_prefix)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer, filled up to the model's `rows` of embeddings.

    Raises:
        ModelError: a kind of tokenizer, or of cutting text, that llama.cpp has no name for here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("its tokenizer has no tokenizer.json, which alone says how it works")
    found: dict[str, Any] = json.loads(backend.to_str())
    model = found["model"]
    if model["type"] != "BPE":
        raise ModelError(f"its tokenizer is of type {model['type']}; only BPE is written as GGUF here")
    tokens, kinds = _tokens(model["vocab"], found["added_tokens"], rows)
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    bos = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
    add_bos = tokenizer.bos_token_id is not None and bos == [tokenizer.bos_token_id]
    if _is_sentencepiece(found):
        kinds = [
            _BYTE if kind == _NORMAL and _is_byte(token) else kind for token, kind in zip(tokens, kinds, strict=True)
        ]
        if model.get("unk_token") in tokens:
            kinds[tokens.index(model["unk_token"])] = _UNKNOWN
        prefix = "prepend" in json.dumps([found["normalizer"], found["pre_tokenizer"]]).lower()
        prefix = prefix and '"never"' not in json.dumps(found["pre_tokenizer"])
        return Vocabulary("llama", "default", tokens, kinds, merges, _scores(tokens, kinds, merges), add_bos, prefix)
    return Vocabulary("gpt2", _cutting(found), tokens, kinds, merges, None, add_bos, False)


def _tokens(vocab: dict[str, int], added: list[dict[str, Any]], rows: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{number}]" for number in range(rows)]
    kinds = [_UNUSED] * rows
    for token, number in vocab.items():
        if number < rows:
            tokens[number], kinds[number] = token, _NORMAL
    for one in added:
        if one["id"] < rows:
            tokens[one["id"]] = one["content"]
            kinds[one["id"]] = _CONTROL if one["special"] else _USER_DEFINED
    return tokens, kinds


def _is_sentencepiece(found: dict[str, Any]) -> bool:
    """Merges of characters with `▁` for a space, and bytes for what is unknown."""
    spelled = json.dumps([found["normalizer"], found["pre_tokenizer"]], ensure_ascii=False)
    return "▁" in spelled and "ByteLevel" not in spelled


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: list[str], kinds: list[int], merges: list[str]) -> list[float]:
    """SentencePiece merges what scores highest: the earlier a merge was learned, the higher."""
    rank = {merge.replace(" ", ""): -float(number) for number, merge in reversed(list(enumerate(merges)))}
    return [
        rank.get(token, -float(len(merges))) if kind == _NORMAL else 0.0
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _cutting(found: dict[str, Any]) -> str:
    """llama.cpp's name for how text is cut."""
    steps = found["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    unprefixed = all(not step.get("add_prefix_space") for step in steps)
    normalizer = (found["normalizer"] or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise ModelError(f"its tokenizer changes text first ({normalizer}), which llama.cpp wouldn't")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex") and unprefixed and normalizer is None:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex"):
        pattern = steps[0]["pattern"].get("Regex", "")
        if steps[0]["behavior"] == "Isolated" and not steps[0]["invert"] and pattern in _BY_PATTERN:
            return _BY_PATTERN[pattern]
    raise ModelError(
        f"its tokenizer cuts text in a way ({', '.join(map(str, kinds)) or 'not at all'}) that llama.cpp has no name "
        "for here: it would read other tokens",
        remedy="llama.cpp's own converter knows more: put its convert_hf_to_gguf.py on the PATH, or its folder into "
        "LLAMA_CPP_DIR.",
    )
