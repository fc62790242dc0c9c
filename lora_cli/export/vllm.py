"""The command line that serves with vLLM: a whole model, or an adapter unmerged on its base.

The rules are those of vLLM's vllm/lora/peft_helper.py and vllm/config: no DoRA, no modules_to_save, one scale for all
layers, ranks in steps. They are documented rules: nothing is loaded into vLLM here.
"""

from __future__ import annotations

from pathlib import Path

from lora_cli.engine.trained import Target
from lora_cli.errors import ModelError
from lora_cli.merge.placing import read_adapter

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_DEFAULT_RANK = 16


def serve_whole(folder: str, name: str, target: Target) -> list[str]:
    words = ["vllm", "serve", folder]
    if Path(folder).expanduser().is_dir():
        words += ["--served-model-name", name]
    if target.model.trust_remote_code:
        words.append("--trust-remote-code")
    return words


def serve_adapter(target: Target, name: str) -> list[str]:
    """The command for an adapter on its base.

    Raises:
        ModelError: an adapter that vLLM refuses, or would get wrong.
    """
    config, _ = read_adapter(target.result)
    refused = {
        "use_dora": config.use_dora,
        "modules_to_save": config.modules_to_save,
        f"bias {config.bias!r}": config.bias != "none",
        "lora_bias": config.lora_bias,
        "trainable_token_indices": config.trainable_token_indices,
        "target_parameters": config.target_parameters,
        "rank_pattern or alpha_pattern (vLLM scales all layers by lora_alpha / r)": config.rank_pattern
        or config.alpha_pattern,
    }
    found = [what for what, there in refused.items() if there]
    if config.r > RANKS[-1]:
        found.append(f"rank {config.r} (the most is {RANKS[-1]})")
    if found:
        raise ModelError(
            f"vLLM can't serve it unmerged: it was trained with {', '.join(found)}",
            remedy="Merge it, and serve the merged model: lora merge TARGET --output DIR.",
        )
    model = target.model
    words = ["vllm", "serve", model.name_or_path]
    if model.revision is not None:
        words += ["--revision", model.revision]
    if model.quantization is not None:
        words += ["--quantization", "bitsandbytes"]
    if model.trust_remote_code:
        words.append("--trust-remote-code")
    words += ["--enable-lora", "--lora-modules", f"{name}={target.result.absolute()}"]
    rank = next(rank for rank in RANKS if rank >= config.r)
    if rank > _DEFAULT_RANK:
        words += ["--max-lora-rank", str(rank)]
    template = target.result / "chat_template.jinja"
    if template.is_file():
        words += ["--chat-template", str(template.absolute())]
    return words
