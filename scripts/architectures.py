"""Write docs/architectures.md: which architectures train on packed rows, which don't, and why.

    python scripts/architectures.py            write the page
    python scripts/architectures.py --check    compare its verdicts with what is proven now; exit 1 if they differ

Every verdict is `engine.selftest.prove` at work, as at the start of each run, on the architecture's own config. A
config stands here with its numbers where transformers' defaults leave out a kind of layer that the released models
have, or can't be built. Weights are random and small; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_cli.engine.selftest import Proof

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"


@dataclass(frozen=True)
class Architecture:
    """An architecture as its released models are configured; `settings` are what differs from the defaults."""

    name: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict, hash=False)


_LFM2_LAYERS = ["conv", "conv", "full_attention", "conv", "conv", "full_attention", "conv", "full_attention"]
_BAMBA_LAYERS = {"num_hidden_layers": 4, "attn_layer_indices": [1]}
_GRANITE_LAYERS = {"num_hidden_layers": 4, "layer_types": ["mamba", "mamba", "attention", "mamba"]}
_SLIDING_LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
_DEEPSEEK_V2_EXPERTS = {
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "topk_method": "greedy",
    "first_k_dense_replace": 1,
}
_DOTS1 = {
    "n_routed_experts": 128,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "num_hidden_layers": 4,
}
_XLSTM = {"hidden_size": 256, "embedding_dim": 256, "num_heads": 4, "num_blocks": 2, "num_hidden_layers": 2}

ARCHITECTURES = (
    Architecture("AFMoE", "afmoe"),
    Architecture("Apertus", "apertus"),
    Architecture("Arcee", "arcee"),
    Architecture("Aria (text)", "aria_text"),
    Architecture("Bamba", "bamba", _BAMBA_LAYERS),
    Architecture("BioGPT", "biogpt"),
    Architecture("BitNet", "bitnet"),
    Architecture("BLOOM", "bloom"),
    Architecture("CodeGen", "codegen"),
    Architecture("Cohere (Command R)", "cohere"),
    Architecture("Cohere 2", "cohere2"),
    Architecture("CTRL", "ctrl"),
    Architecture("CWM", "cwm"),
    Architecture("DeepSeek V2", "deepseek_v2", _DEEPSEEK_V2_EXPERTS),
    Architecture("DeepSeek V3", "deepseek_v3"),
    Architecture("DiffLlama", "diffllama"),
    Architecture("Doge", "doge"),
    Architecture("dots.llm1", "dots1", _DOTS1),
    Architecture("Emu3 (text)", "emu3"),
    Architecture("ERNIE 4.5", "ernie4_5"),
    Architecture("ERNIE 4.5 MoE", "ernie4_5_moe"),
    Architecture("EXAONE 4", "exaone4"),
    Architecture("Falcon (7B)", "falcon"),
    Architecture(
        "Falcon (40B, 180B)",
        "falcon",
        {"new_decoder_architecture": True, "hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8},
    ),
    Architecture("Falcon H1", "falcon_h1"),
    Architecture("Falcon Mamba", "falcon_mamba"),
    Architecture("FlexOLMo", "flex_olmo"),
    Architecture("Fuyu", "fuyu"),
    Architecture("Gemma", "gemma"),
    Architecture("Gemma 2", "gemma2"),
    Architecture("Gemma 3 (text)", "gemma3_text"),
    Architecture("Gemma 3 (multimodal)", "gemma3"),
    Architecture("Gemma 4 (text)", "gemma4_text"),
    Architecture("GLM", "glm"),
    Architecture("GLM 4", "glm4"),
    Architecture("GLM 4 MoE", "glm4_moe"),
    Architecture("GPT-2", "gpt2"),
    Architecture("GPT-BigCode (StarCoder)", "gpt_bigcode"),
    Architecture("GPT-J", "gptj"),
    Architecture("GPT-Neo", "gpt_neo"),
    Architecture("GPT-NeoX (Pythia)", "gpt_neox"),
    Architecture("GPT-NeoX Japanese", "gpt_neox_japanese"),
    Architecture("gpt-oss", "gpt_oss"),
    Architecture("Granite", "granite"),
    Architecture("Granite 4 (hybrid)", "granitemoehybrid", _GRANITE_LAYERS),
    Architecture("Granite MoE", "granitemoe"),
    Architecture("Granite MoE, shared experts", "granitemoeshared"),
    Architecture("Helium", "helium"),
    Architecture("Hunyuan, dense", "hunyuan_v1_dense", {"head_dim": 128}),
    Architecture("Hunyuan MoE", "hunyuan_v1_moe", {"head_dim": 128, "num_experts": 8, "moe_topk": 2}),
    Architecture("HyperCLOVA X", "hyperclovax"),
    Architecture("Jamba", "jamba"),
    Architecture("JetMoE", "jetmoe"),
    Architecture("LFM2", "lfm2", {"num_hidden_layers": 8, "layer_types": _LFM2_LAYERS}),
    Architecture("Llama", "llama", {"num_key_value_heads": 8}),
    Architecture("Llama 4 (text)", "llama4_text"),
    Architecture("Mamba", "mamba"),
    Architecture("Mamba 2", "mamba2"),
    Architecture("MiniCPM 3", "minicpm3"),
    Architecture("MiniMax", "minimax"),
    Architecture("Ministral", "ministral", {"head_dim": 128, **_SLIDING_LAYERS}),
    Architecture("Ministral 3", "ministral3"),
    Architecture("Mistral", "mistral"),
    Architecture("Mixtral", "mixtral"),
    Architecture("ModernBERT decoder", "modernbert-decoder"),
    Architecture("MPT", "mpt"),
    Architecture("nanochat", "nanochat"),
    Architecture("Nemotron", "nemotron", {"head_dim": 128, "num_key_value_heads": 8}),
    Architecture("Nemotron H", "nemotron_h"),
    Architecture("OLMo", "olmo"),
    Architecture("OLMo 2", "olmo2"),
    Architecture("OLMo 3", "olmo3"),
    Architecture("OLMo hybrid", "olmo_hybrid"),
    Architecture("OLMoE", "olmoe"),
    Architecture("OpenAI GPT", "openai-gpt"),
    Architecture("OPT", "opt"),
    Architecture("Persimmon", "persimmon"),
    Architecture("Phi", "phi"),
    Architecture("Phi 3, Phi 4", "phi3"),
    Architecture("Phi 3.5 MoE", "phimoe"),
    Architecture("Qwen 2, Qwen 2.5", "qwen2"),
    Architecture("Qwen 2 MoE", "qwen2_moe"),
    Architecture("Qwen 3", "qwen3"),
    Architecture("Qwen 3 MoE", "qwen3_moe"),
    Architecture("Qwen 3 Next", "qwen3_next"),
    Architecture("Qwen 3.5 (text)", "qwen3_5_text"),
    Architecture("Qwen 3.5 MoE (text)", "qwen3_5_moe_text"),
    Architecture("RecurrentGemma", "recurrent_gemma"),
    Architecture("RWKV", "rwkv"),
    Architecture("Seed-OSS", "seed_oss"),
    Architecture("SmolLM 3", "smollm3"),
    Architecture("StableLM", "stablelm"),
    Architecture("Starcoder 2", "starcoder2"),
    Architecture("VaultGemma", "vaultgemma"),
    Architecture("XGLM", "xglm"),
    Architecture("xLSTM", "xlstm", _XLSTM),
    Architecture("Zamba 2", "zamba2"),
)

_HEADER = """# Architectures

<!-- Written by scripts/architectures.py. Don't edit: `make docs` writes it anew. -->

Which architectures train on packed rows, and which run the slower way. Nothing here has to be looked up or set: the
same proof is made at the start of every run, on a small random copy of the model in float32 that holds each kind of
its layers once, and the run says which way it goes. All ways give the same losses.

**Packing.** `documents`: attention document by document, the fastest way. `mask`: the model's own attention under a
block-diagonal mask. `single`: one document per row, because the documents of a row would see each other.
**Loss.** `chunked`: at trained positions only, and never all logits at once. `full`: transformers' own loss.
**Leak** is the largest relative change of a document's logits when the document before it in the row is replaced by
other tokens; **packed against alone** the largest relative difference from the document by itself; **loss error** the
larger of the relative differences of loss and gradients, with a LoRA on all linear layers, from transformers' own.
All three must be at most {tolerance:.0e}; for `single` they show what packing would have done.
"""


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="compare the page's verdicts with the proofs; write nothing"
    )
    parser.add_argument("--only", metavar="TYPES", help="with --check: these model types, with commas between them")
    arguments = parser.parse_args()
    if arguments.only and not arguments.check:
        parser.error("--only goes with --check; the page is always written whole")
    chosen = select(arguments.only.split(",") if arguments.only else None)
    proofs = {architecture: prove_architecture(architecture) for architecture in chosen}
    if arguments.check:
        differences = outdated(PAGE.read_text(encoding="utf-8"), proofs)
        print("\n".join(differences) or f"{PAGE.name} is current: {len(proofs)} architectures", file=sys.stderr)
        return 1 if differences else 0
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(proofs), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
    return 0


def select(model_types: list[str] | None) -> list[Architecture]:
    """All architectures, or those of these model types."""
    known = {architecture.model_type for architecture in ARCHITECTURES}
    if unknown := sorted(set(model_types or ()) - known):
        raise SystemExit(f"no such model type here: {', '.join(unknown)}")
    return [one for one in ARCHITECTURES if model_types is None or one.model_type in model_types]


def prove_architecture(architecture: Architecture) -> Proof:
    """How this architecture runs with the default adapter."""
    from transformers import AutoConfig

    from lora_cli.config import AdapterConfig
    from lora_cli.engine.selftest import prove

    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(f"  {architecture.name}", file=sys.stderr)
    config = AutoConfig.for_model(architecture.model_type, **architecture.settings)
    return prove(config, AdapterConfig())


def page(proofs: dict[Architecture, Proof]) -> str:
    """The whole page, in Markdown."""
    import torch
    import transformers

    from lora_cli.engine.selftest import TOLERANCE

    ways = [proof.packing for proof in proofs.values()]
    chunked = sum(proof.loss == "chunked" for proof in proofs.values())
    lines = [
        _HEADER.format(tolerance=TOLERANCE),
        f"{len(proofs)} architectures: {ways.count('documents')} pack by document, {ways.count('mask')} under a mask,",
        f"{ways.count('single')} run one document per row; {chunked} have the chunked loss.",
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, CPU.",
        "",
        "| architecture | model_type | packing | loss | leak | packed against alone | loss error | why slower |",
        "|---|---|---|---|---|---|---|---|",
        *(row(architecture, proof) for architecture, proof in proofs.items()),
        "",
    ]
    return "\n".join(lines)


def row(architecture: Architecture, proof: Proof) -> str:
    """One line of the table."""
    figures = [figure(value) for value in (proof.leak, proof.difference, proof.loss_error)]
    why = "; ".join(proof.notes).replace("|", "\\|").replace("\n", " ")
    cells = [architecture.name, architecture.model_type, proof.packing, proof.loss, *figures, why]
    return f"| {' | '.join(cells)} |"


def figure(value: float) -> str:
    """`0`, `2e-07`, or nothing where it wasn't measured."""
    return "" if math.isnan(value) else "0" if value == 0 else f"{value:.0e}"


def outdated(text: str, proofs: dict[Architecture, Proof]) -> list[str]:
    """Verdicts that the page doesn't hold. Figures aren't compared: their last bits depend on the processor."""
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in text.splitlines() if line.startswith("| ")]
    return [
        f"{architecture.name}: {proof.packing}, {proof.loss} now; not what the page says"
        for architecture, proof in proofs.items()
        if [architecture.name, architecture.model_type, proof.packing, proof.loss] not in rows
    ]


if __name__ == "__main__":
    raise SystemExit(main())
