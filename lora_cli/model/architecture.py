"""A model's config.json, and the model built from it on the `meta` device: no weights, no memory.

Knows where a model may come from (a folder or the hub) and says what is missing there. Never opens a weight file.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.config import ModelConfig
from lora_cli.errors import ModelError
from lora_cli.model.trust import refuse_config_settings, refuse_special_files

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def looks_like_folder(name: str) -> bool:
    """Whether a model name can only mean a folder: it exists, or no hub id is written so."""
    return Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def read_architecture(model: ModelConfig) -> PretrainedConfig:
    """The transformers config of the model that `model.name_or_path` names.

    Raises:
        ModelError: no such folder, no config.json in it, an unknown architecture, a hub that can't be
            reached, or remote code that the config doesn't allow.
    """
    from transformers import AutoConfig

    name = model.name_or_path
    if looks_like_folder(name):
        _check_folder(Path(name).expanduser())
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # what an architecture's own code raises for numbers it can't have is its choice
        raise _explain(error, model) from error
    if getattr(config.get_text_config(), "vocab_size", 1) in (0, None):
        raise ModelError(f"model.name_or_path {name}: its config.json has no vocabulary (vocab_size 0)")
    _check_heads(name, config.get_text_config())
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model.name_or_path {name}: {config.model_type} is an encoder-decoder, not a causal LM")
    return config


def _check_heads(name: str, text: PretrainedConfig) -> None:
    """Grouped heads that don't divide: transformers builds such a model, and some kernels run it as something else."""
    heads, groups = (getattr(text, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(groups, int) and (groups < 1 or heads % groups):
        raise ModelError(
            f"model.name_or_path {name}: its config.json has {heads} attention heads and {groups} heads of keys and "
            "values (num_key_value_heads), which don't divide them",
            remedy="Take config.json anew from where the model comes from; as it is, it can't be this model's.",
        )


def code_left_out(model: ModelConfig, config: PretrainedConfig) -> list[str]:
    """A warning, where a model brings code of its own and transformers' own classes are used instead."""
    folder = Path(model.name_or_path).expanduser()
    files = sorted(path.name for path in folder.glob("*.py")) if folder.is_dir() else []
    if model.trust_remote_code or not (files or getattr(config, "auto_map", None)):
        return []
    named = f" ({', '.join(files[:3])})" if files else ""
    return [f"{model.name_or_path} brings code of its own{named}, which is not run: transformers' classes are used"]


def build_on_meta(
    config: PretrainedConfig,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """The model of `config` on the `meta` device: every shape and dtype, no storage.

    Raises:
        ModelError: transformers has no causal language model of this type, or refuses its numbers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),  # building resolves settings in it, which loading should resolve anew
                trust_remote_code=trust_remote_code,
                **({"dtype": dtype} if dtype is not None else {}),
                **({"attn_implementation": attention} if attention is not None else {}),
            )
    except Exception as error:  # as above
        raise ModelError(
            f"can't build a {config.model_type} from its config.json: {_first_line(error)}",
            remedy="The numbers in config.json don't fit together, or no causal language model has this type.",
        ) from error
    return model


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise ModelError(
            f"model.name_or_path: no folder {folder.absolute()}",
            remedy="Give the folder that holds config.json, or a hub id such as Qwen/Qwen2.5-1.5B-Instruct.",
        )
    if not folder.is_dir():
        raise ModelError(f"model.name_or_path: {folder.absolute()} is a file; give the folder that holds it")
    refuse_special_files(folder)
    path = folder / "config.json"
    if not path.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise ModelError(
            f"model.name_or_path: {folder.absolute()} has no config.json",
            remedy="It is an adapter: give its base here, and the adapter as adapter.path."
            if adapter
            else "It is not a model that transformers can read.",
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path.absolute()} is not JSON: {error}") from error
    except RecursionError as error:
        raise ModelError(f"{path.absolute()} is nested too deeply to be a config") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.absolute()} is not a JSON object")
    refuse_config_settings(content, path)


def _explain(error: Exception, model: ModelConfig) -> ModelError:
    """What a failure of AutoConfig means to the user."""
    name, text = model.name_or_path, str(error)
    if "trust_remote_code" in text:
        return ModelError(
            f"{name} needs code from its own repository",
            remedy="Read that code; if you trust it, set model.trust_remote_code: true.",
        )
    if "model type" in text or "model_type" in text or isinstance(error, KeyError):
        return ModelError(
            f"{name}: transformers doesn't know this architecture: {_first_line(error)}",
            remedy="A newer transformers may know it: pip install --upgrade transformers",
        )
    if looks_like_folder(name):
        return ModelError(f"{name}: config.json can't be used: {_first_line(error)}")
    return ModelError(
        f"{name}: no such folder at {Path(name).absolute()}, and the hub gave no such model: {_first_line(error)}",
        remedy="Without network: copy the model's folder here (hf download, on a machine that has network) and\n"
        "give its path. For a gated model: accept its licence on the hub and run `hf auth login`.",
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    # transformers' own checks name the field in one line and what is wrong with it in the next.
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text.rstrip(".: ")
