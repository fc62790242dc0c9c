"""GGUF files, read back by the `gguf` package; and, where llama-cpp-python is installed, by llama.cpp itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from lora_cli.errors import UserError
from lora_cli.export import export
from tests.unit.data.conftest import byte_level, metaspace, wrapped
from tests.unit.merge.tiny import save_adapter

gguf = pytest.importorskip("gguf")

ROWS = 760
"""More than either tokenizer has tokens."""
TEXT = "The user's question: what does 3.14 look like, naïve or 東京 🙂?  def add(a, b):\n    return a + b\n"
SPECIALS = ("<s>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SMALL: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=ROWS, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=2
    ),
    "llama": LlamaConfig(**_SMALL, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "llama3": LlamaConfig(**_SMALL, tie_word_embeddings=False, rope_parameters=_LLAMA3),
    "mistral": MistralConfig(**_SMALL, sliding_window=None, tie_word_embeddings=False),
    "mixtral": MixtralConfig(**_SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2": Qwen2Config(**_SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_SMALL, head_dim=32, tie_word_embeddings=False),
    "gemma": GemmaConfig(**_SMALL, head_dim=16),
    "gemma2": Gemma2Config(**_SMALL, head_dim=16, sliding_window=64, query_pre_attn_scalar=16),
}


def save_model(folder: Path, name: str, dtype: torch.dtype = torch.float32, *, tokenizer: Any = None) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15 if parameter.dim() > 1 else 0.1).add_(1.0 if parameter.dim() == 1 else 0.0)
    model.to(dtype).save_pretrained(folder)
    (tokenizer or bytes_tokenizer()).save_pretrained(folder)
    return folder


def bytes_tokenizer() -> Any:
    content = byte_level(SPECIALS, (), None, "<|im_end|>")
    return wrapped(content, bos_token="<s>", eos_token="<|im_end|>", chat_template=TEMPLATE)


def pieces_tokenizer() -> Any:
    content = metaspace(SPECIALS)
    return wrapped(content, bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>", chat_template=TEMPLATE)


def read(path: Path) -> Any:
    return gguf.GGUFReader(path)


def values(reader: Any) -> dict[str, Tensor]:
    """Every tensor of a file in float32, in the model's order of dimensions."""
    return {
        one.name: torch.from_numpy(np.array(gguf.quants.dequantize(one.data, one.tensor_type), dtype=np.float32))
        for one in reader.tensors
    }


def paired(value: Tensor, heads: int) -> Tensor:
    """Rows of each head as llama.cpp rotates them, written out one by one."""
    half = value.shape[0] // heads // 2
    order = [head * 2 * half + side * half + pair for head in range(heads) for pair in range(half) for side in (0, 1)]
    return value[order]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_of_a_llama_is_there(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    folder = save_model(tmp_path / "model", name, dtype)
    exported = export(str(folder), "gguf", tmp_path / "model.gguf")
    assert exported.type == {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    found, saved = values(read(tmp_path / "model.gguf")), load_file(folder / "model.safetensors")
    expected = {
        "token_embd.weight": saved["model.embed_tokens.weight"],
        "output_norm.weight": saved["model.norm.weight"],
    }
    if "lm_head.weight" in saved:
        expected["output.weight"] = saved["lm_head.weight"]
    theirs = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(2):
        for ours, name_ in theirs.items():
            value = saved[f"model.layers.{layer}.{name_}.weight"]
            heads = {"attn_q": 4, "attn_k": 2}.get(ours)
            expected[f"blk.{layer}.{ours}.weight"] = value if heads is None else paired(value, heads)
    assert found.keys() - {"rope_freqs.weight"} == expected.keys()
    assert ("rope_freqs.weight" in found) == (name == "llama3")
    for key, value in expected.items():
        assert torch.equal(found[key], value.float()), key
    assert exported.tensors == len(found)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_keys_say_what_config_and_tokenizer_say(tmp_path: Path, name: str) -> None:
    folder = save_model(tmp_path / "model", name)
    export(str(folder), "gguf", tmp_path / "model.gguf")
    reader, config, tokenizer = read(tmp_path / "model.gguf"), CONFIGS[name], AutoTokenizer.from_pretrained(folder)

    def key(text: str) -> Any:
        return reader.fields[text].contents()

    architecture = key("general.architecture")
    assert key(f"{architecture}.block_count") == 2
    assert key(f"{architecture}.context_length") == 256
    assert key(f"{architecture}.embedding_length") == config.hidden_size
    assert key("tokenizer.ggml.model") == "gpt2"
    # transformers puts Qwen's own way of cutting text back when it loads the files.
    assert key("tokenizer.ggml.pre") == ("qwen2" if name == "qwen2" else "gpt-2")
    assert key("tokenizer.chat_template") == TEMPLATE
    assert key("tokenizer.ggml.add_bos_token") is True  # as the template has it
    assert (key("tokenizer.ggml.bos_token_id"), key("tokenizer.ggml.eos_token_id")) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    tokens = key("tokenizer.ggml.tokens")
    assert len(tokens) == ROWS
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = key("tokenizer.ggml.token_type")
    assert {tokens[i] for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL} == set(
        tokenizer.all_special_tokens
    ) | set(SPECIALS)
    assert all(kind == gguf.TokenType.UNUSED for kind in kinds[len(tokenizer) :])
    # Every parameter once.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = sum(value.numel() for key, value in values(reader).items() if key != "rope_freqs.weight")
    assert ours == sum(parameter.numel() for parameter in model.parameters())


def test_gemma_has_the_one_that_its_norms_add_and_gpt2_is_turned(tmp_path: Path) -> None:
    for name in ("gemma", "gpt2", "mixtral"):
        export(str(save_model(tmp_path / name, name)), "gguf", tmp_path / f"{name}.gguf")
    saved, found = load_file(tmp_path / "gemma" / "model.safetensors"), values(read(tmp_path / "gemma.gguf"))
    assert torch.equal(found["output_norm.weight"], saved["model.norm.weight"] + 1)
    assert torch.equal(found["blk.1.attn_q.weight"], saved["model.layers.1.self_attn.q_proj.weight"])
    saved, found = load_file(tmp_path / "gpt2" / "model.safetensors"), values(read(tmp_path / "gpt2.gguf"))
    assert torch.equal(found["blk.0.attn_qkv.weight"], saved["transformer.h.0.attn.c_attn.weight"].T)
    assert torch.equal(found["position_embd.weight"], saved["transformer.wpe.weight"])
    saved, found = load_file(tmp_path / "mixtral" / "model.safetensors"), values(read(tmp_path / "mixtral.gguf"))
    for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        experts = [saved[f"model.layers.1.block_sparse_moe.experts.{i}.{theirs}.weight"] for i in range(4)]
        assert torch.equal(found[f"blk.1.ffn_{ours}_exps.weight"], torch.stack(experts))


def test_eight_bits_are_near_and_small(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    large = export(str(folder), "gguf", tmp_path / "f32.gguf")
    small = export(str(folder), "gguf", tmp_path / "q8.gguf", type_name="q8_0")
    assert small.num_bytes is not None and large.num_bytes is not None
    assert small.num_bytes < 0.35 * large.num_bytes
    exact, found = values(read(tmp_path / "f32.gguf")), values(read(tmp_path / "q8.gguf"))
    for key, value in exact.items():
        assert float((found[key] - value).abs().max()) <= float(value.abs().max()) * (1 / 254 + 2**-11), (
            key
        )  # and the scale in f16


def test_what_has_no_place_in_gguf_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    output = tmp_path / "model.gguf"
    folder = save_model(tmp_path / "model", "llama")
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace("LlamaForCausalLM", "FalconForCausalLM"))
    with pytest.raises(UserError, match="FalconForCausalLM can't be written as GGUF here"):
        export(str(folder), "gguf", output)
    config.write_text(text)
    tokenizer = folder / "tokenizer.json"
    spelled = tokenizer.read_text()
    tokenizer.write_text(
        spelled.replace('"use_regex": true', '"use_regex": false').replace('"use_regex":true', '"use_regex":false')
    )
    with pytest.raises(UserError, match="cuts text in a way"):
        export(str(folder), "gguf", output)
    tokenizer.write_text(spelled)
    output.write_text("mine")
    with pytest.raises(UserError, match="is taken"):
        export(str(folder), "gguf", output)
    with pytest.raises(UserError, match="needs --output"):
        export(str(folder), "gguf")
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_llama_cpps_converter_takes_what_is_not_known_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interface, played by a script that writes down how it was called."""
    folder = save_model(tmp_path / "model", "llama")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "FalconForCausalLM"))
    (tmp_path / "llama.cpp").mkdir()
    converter = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    converter.write_text("import sys\nopen(sys.argv[3], 'w').write(' '.join(sys.argv[1:]))\n")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "llama.cpp"))
    exported = export(str(folder), "gguf", tmp_path / "model.gguf", type_name="q8_0")
    assert "FalconForCausalLM" in exported.notes[0]
    said = (tmp_path / "model.gguf").read_text().split()
    assert said[0] == str(folder) and said[1] == "--outfile" and said[3:] == ["--outtype", "q8_0"]
    converter.write_text("import sys\nsys.exit('no such model')\n")
    with pytest.raises(UserError, match="no such model"):
        export(str(folder), "gguf", tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists()


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_llama_cpp_reads_the_same_tokens_and_says_the_same(tmp_path: Path, name: str, kind: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = bytes_tokenizer() if kind == "bytes" else pieces_tokenizer()
    folder = save_model(tmp_path / "model", name, tokenizer=tokenizer)
    export(str(folder), "gguf", tmp_path / "model.gguf")
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = llama_cpp_logits(llama_cpp, tmp_path / "model.gguf", ids, TEXT)
    # llama.cpp looks GELU up in a table of 16 bits.
    tolerance = 1e-2 if name in ("gpt2", "gemma", "gemma2") else 1e-4
    assert float(np.abs(found - expected).max()) < tolerance


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "c_attn": 2}},
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma"])
def test_llama_cpp_applies_an_adapter_as_peft_does(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = save_model(tmp_path / "model", name)
    adapter = save_adapter(tmp_path / "adapter", folder, scale=0.2, **settings)
    export(str(folder), "gguf", tmp_path / "model.gguf")
    export(str(adapter), "gguf", tmp_path / "adapter.gguf")
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False)["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    bare = plain(torch.tensor([ids])).logits[0].detach().numpy()
    with torch.no_grad():
        expected = PeftModel.from_pretrained(plain, str(adapter)).eval()(torch.tensor([ids])).logits[0].numpy()
    found = llama_cpp_logits(llama_cpp, tmp_path / "model.gguf", ids, TEXT, lora_path=str(tmp_path / "adapter.gguf"))
    assert float(np.abs(expected - bare).max()) > 1
    assert float(np.abs(found - expected).max()) < (5e-2 if name in ("gpt2", "gemma") else 1e-3)


def llama_cpp_logits(llama_cpp: Any, path: Path, ids: list[int], text: str, **options: Any) -> Any:
    """[T, V], with a cache in float32."""
    model = llama_cpp.Llama(
        str(path), logits_all=True, verbose=False, n_ctx=256, n_threads=1, type_k=0, type_v=0, **options
    )
    assert model.tokenize(text.encode(), add_bos=False, special=True) == ids
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "adapted embeddings"),
        ({"bias": "all"}, "bias 'all'"),
    ],
)
def test_an_adapter_that_is_more_than_products_says_why(tmp_path: Path, settings: dict[str, Any], word: str) -> None:
    folder = save_model(tmp_path / "model", "qwen2")
    adapter = save_adapter(tmp_path / "adapter", folder, **{"target_modules": ["q_proj"], **settings})
    with pytest.raises(UserError, match=word):
        export(str(adapter), "gguf", tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_an_adapter_in_gguf_is_the_same_product(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Scaled as llama.cpp scales it: by alpha / rank, or not at all."""
    folder = save_model(tmp_path / "model", "qwen2")
    adapter = save_adapter(tmp_path / "adapter", folder, target_modules=["q_proj", "down_proj"], **settings)
    export(str(adapter), "gguf", tmp_path / "adapter.gguf")
    reader = read(tmp_path / "adapter.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    alpha, found = reader.fields["adapter.lora.alpha"].contents(), values(reader)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, str(adapter))
    for layer in range(2):
        for ours, theirs in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj")):
            a, b = (found[f"blk.{layer}.{ours}.weight.lora_{one}"] for one in "ab")
            scale = alpha / a.shape[0] if alpha else 1.0
            module: Any = model.get_submodule(f"base_model.model.model.layers.{layer}.{theirs}")
            torch.testing.assert_close(b @ a * scale, module.get_delta_weight("default"), atol=1e-6, rtol=1e-5)
    assert len(found) == 8
