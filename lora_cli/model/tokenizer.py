"""The tokenizer, and the tokens that end a turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.config import ModelConfig
from lora_cli.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with the model.

    Raises:
        ModelError: the folder or repository holds no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(
            f"{model.name_or_path}: no tokenizer can be read: {str(error).strip().splitlines()[0]}",
            remedy="The folder needs tokenizer.json (or the older vocabulary files) and tokenizer_config.json.",
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes where there are no files
        raise ModelError(
            f"{model.name_or_path}: there is no tokenizer, or it has no tokens",
            remedy="The folder needs tokenizer.json (or the older vocabulary files) and tokenizer_config.json.",
        )
    return tokenizer


def stop_tokens(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, model: ModelConfig) -> frozenset[int]:
    """Ids that end a turn: those of the tokenizer, of config.json and of generation_config.json together.

    Llama 3 ends an assistant's turn with `<|eot_id|>` while its EOS is another token; only the generation
    config says so.
    """
    found: set[int] = set()
    for value in (tokenizer.eos_token_id, config.get_text_config().eos_token_id, _generation_eos(model)):
        found.update([value] if isinstance(value, int) else value or [])
    return frozenset(found)


def _generation_eos(model: ModelConfig) -> int | list[int] | None:
    folder = Path(model.name_or_path).expanduser()
    if folder.is_dir():
        path = folder / "generation_config.json"
        if not path.is_file():
            return None
        try:
            value: int | list[int] | None = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError, RecursionError) as error:
            raise ModelError(f"{path.absolute()} is not a JSON object: {error}") from error
        if not all(isinstance(each, int) for each in (value if isinstance(value, list) else [value or 0])):
            raise ModelError(f"{path.absolute()}: eos_token_id {value!r} is neither a number nor a list of numbers")
        return value
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(model.name_or_path, revision=model.revision or "main")
    except OSError:  # a model without the file is complete
        return None
    found: int | list[int] | None = config.eos_token_id
    return found


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, model: ModelConfig) -> None:
    """Refuse a tokenizer whose ids reach past the model's embeddings.

    Raises:
        ModelError: it does, and `model.resize_embeddings` is false.
    """
    rows = config.get_text_config().vocab_size
    if len(tokenizer) > rows and not model.resize_embeddings:
        raise ModelError(
            f"{model.name_or_path}: the tokenizer has {len(tokenizer):,} tokens, the model {rows:,} embeddings",
            remedy="Set model.resize_embeddings: true to add rows (and train them: adapter.modules_to_save), or\n"
            "take the tokenizer that belongs to the model.",
        )
