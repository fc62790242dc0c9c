"""The fused arithmetic on CUDA: kernels against PyTorch's operations, whole layers against the modules' own code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lora_cli.engine.attention import NAME, use_attention
from lora_cli.engine.fused import card, gated
from lora_cli.engine.fused.fitting import fuse
from lora_cli.engine.loss import _cross_entropy_and_gradient
from lora_cli.engine.offloading import offload

TOKENS, LENGTHS = 300, (130, 1, 105, 64)


def draw(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return torch.randn(*shape, device="cuda", dtype=torch.float32, generator=generator).to(dtype)


def far(found, expected):
    assert torch.isfinite(found).all()
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("width", [64, 1000, 4096, 8192])
def test_norms(dtype, width):
    x, residual, weight, grad, more = (draw(TOKENS, width, dtype=dtype, seed=s) for s in range(5))
    weight = weight[0].clone()
    hidden = x + residual
    added = x.clone()
    normed, scale = card.rms_norm(added, weight, 1e-5, residual)
    assert torch.equal(added, hidden)
    exact = hidden.double().requires_grad_()
    expected = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    assert far(normed, expected.detach()) < 5e-3
    assert torch.equal(card.rms_norm_again(hidden, scale, weight), normed)
    (back,) = torch.autograd.grad(expected, exact, grad.double())
    assert far(card.rms_norm_back(grad.clone(), hidden, scale, weight, more), back + more.double()) < 5e-3


@pytest.mark.parametrize(("heads", "size"), [(1, 64), (5, 96), (32, 128)])
def test_rotation(dtype, heads, size):
    x, angles = draw(TOKENS, heads, size, dtype=dtype), draw(TOKENS, size // 2, dtype=torch.float32)
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(dtype) for f in (torch.cos, torch.sin))
    turned = x.clone()
    card.rotate(turned, cos, sin)
    half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1).double()
    assert far(turned, x.double() * cos[:, None].double() + half * sin[:, None].double()) < 5e-3
    card.rotate(turned, cos, sin, back=True)
    assert far(turned, x) < 1e-2


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_gated_activation(dtype, name):
    gate, up, grad = (draw(TOKENS, 1001, dtype=dtype, seed=s) for s in range(3))
    exact = [t.double().requires_grad_() for t in (gate, up)]
    act = F.silu(exact[0]) if name == "silu" else F.gelu(exact[0], approximate="tanh")
    expected = act * exact[1]
    backs = torch.autograd.grad(expected, exact, grad.double())
    assert far(card.gated(gate, up, name), expected.detach()) < 5e-3
    card.gated_back(grad, gate, up, name)
    assert far(grad, expected.detach()) < 5e-3
    assert far(gate, backs[0]) < 5e-3 and far(up, backs[1]) < 5e-3


@pytest.mark.parametrize("vocabulary", [7, 8192, 128_256, 262_144])
def test_cross_entropy(dtype, vocabulary):
    logits = draw(33, vocabulary, dtype=dtype) * 4
    targets = torch.randint(0, vocabulary, (33,), device="cuda")
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    (back,) = torch.autograd.grad(expected.sum(), exact)
    losses, grad = _cross_entropy_and_gradient(logits, targets)
    assert far(losses, expected.detach()) < 1e-5
    assert far(grad, back) < 5e-3


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bit_weights_have_the_bits_that_bitsandbytes_gives(kind, nested, dtype):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(draw(640, 4096, dtype=dtype), quant_type=kind, compress_statistics=nested)
    assert torch.equal(card.dense(packed, state), dequantize_4bit(packed, state))


def make(kind, dtype):
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(LlamaConfig(**shape, **heads))
        if kind == "llama"
        else Qwen3ForCausalLM(Qwen3Config(**shape, **heads))
    )
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=16, target_modules="all-linear"), model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.to("cuda")
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    use_attention(model, NAME)
    return model.train()


def gradient(model, dtype):
    """The gradient of a fixed sum over hidden states, as one float64 vector."""
    ids = torch.randint(0, 512, (1, TOKENS), generator=torch.Generator().manual_seed(1)).cuda()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].cuda()
    starts = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).int()
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float64):
        hidden = model.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=None,
            use_cache=False,
            document_lengths=LENGTHS,
            cu_seq_lens_q=starts,
        ).last_hidden_state
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(hidden)
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad((hidden * weights).sum(), trained)
    return torch.cat([g.double().flatten() for g in grads])


@pytest.fixture(scope="module")
def exact():
    """By kind, in float64 with attention written out by PyTorch."""
    found = {}
    for kind in ("llama", "qwen3"):
        model = make(kind, torch.float64)
        model.double()
        found[kind] = gradient(model, torch.float64)
    return found


@pytest.mark.parametrize(("kind", "fusion"), [("llama", "layers"), ("llama", "linears"), ("qwen3", "linears")])
def test_layers_are_no_further_from_exact_than_their_own_code(exact, dtype, kind, fusion):
    model = make(kind, dtype)
    plain = far(gradient(model, dtype), exact[kind])
    assert fuse(model, fusion) > 0
    fused = far(gradient(model, dtype), exact[kind])
    print(f"{kind} {fusion} {dtype}: own code {plain:.1e}, fused {fused:.1e}")
    assert fused < max(1.2 * plain, 5e-3)


@pytest.mark.parametrize("fusion", ["layers", "linears"])
def test_recomputed_layers(exact, fusion):
    model = make("llama", torch.bfloat16)
    fuse(model, fusion)
    plain = gradient(model, torch.bfloat16)
    fuse(model, None)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fuse(model, fusion)
    assert far(gradient(model, torch.bfloat16), plain) < 2e-3


@pytest.mark.parametrize(("kind", "fusion"), [("llama", "layers"), ("llama", None), ("qwen3", "linears")])
def test_offloaded_layers(kind, fusion):
    """As near to checkpointed layers as these are to themselves: the way back of attention has no fixed order."""
    model = make(kind, torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
    fuse(model, fusion)
    plain = gradient(model, torch.bfloat16)
    offloading = offload(model)
    for _ in range(20):
        assert far(gradient(model, torch.bfloat16), plain) < 2e-3
    assert offloading.host_bytes == 2 * 2**18  # page-locked memory comes in powers of two
    with torch.autograd.graph.save_on_cpu(pin_memory=True):  # somebody else's hooks around ours
        assert far(gradient(model, torch.bfloat16), plain) < 2e-3


def test_offloaded_inputs_are_not_on_the_card():
    """Of many layers, two inputs at a time."""
    shape = {"vocab_size": 64, "hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    tokens, peaks, grads = 16_384, [], []
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads)).requires_grad_(False).to("cuda", torch.bfloat16)
    inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear"), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    use_attention(model, NAME)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
    fuse(model, "layers")
    starts = torch.tensor([0, tokens], device="cuda").int()
    ids = torch.randint(0, 64, (1, tokens), generator=torch.Generator().manual_seed(0)).cuda()
    for away in (False, True):
        if away:
            offload(model)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                hidden = model.model(
                    input_ids=ids,
                    position_ids=torch.arange(tokens, device="cuda")[None],
                    use_cache=False,
                    document_lengths=(tokens,),
                    cu_seq_lens_q=starts,
                ).last_hidden_state
            found = torch.autograd.grad(hidden.square().sum(), [p for p in model.parameters() if p.requires_grad])
        peaks.append(torch.cuda.max_memory_allocated())
        grads.append(torch.cat([g.flatten() for g in found]))
    assert far(grads[1], grads[0]) < 2e-3
    one_input = tokens * 1024 * 2
    assert peaks[0] - peaks[1] > 20 * one_input


def test_blocks_of_a_long_row(monkeypatch, exact):
    """Gate and up by blocks of tokens, kept and made anew."""
    plain = gradient(make("llama", torch.bfloat16), torch.bfloat16)
    monkeypatch.setattr(gated, "BLOCK_ON_CARD", 70)
    for checkpointing in (False, True):
        model = make("llama", torch.bfloat16)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        fuse(model, "layers")
        found = gradient(model, torch.bfloat16)
        assert far(found, exact["llama"]) < max(1.2 * far(plain, exact["llama"]), 5e-3)


@pytest.mark.parametrize("double", [False, True])
def test_4_bit_layers(double):
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=2)).to(torch.bfloat16)
    for name, module in list(model.model.layers.named_modules()):
        if type(module) is torch.nn.Linear:
            packed = Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                compress_statistics=double,
            )
            packed.weight = Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=double
            )
            model.model.layers.set_submodule(name, packed)
    model.requires_grad_(False).cuda()
    model.is_loaded_in_4bit = True
    inject_adapter_in_model(LoraConfig(r=16, target_modules="all-linear"), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float().cuda()
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    use_attention(model, NAME)
    model.train()
    plain = gradient(model, torch.bfloat16)
    assert fuse(model, "layers") == 2
    assert far(gradient(model, torch.bfloat16), plain) < 2e-2


def test_a_second_way_back_fails_rather_than_lies():
    model = make("llama", torch.bfloat16)
    fuse(model, "layers")
    starts = torch.tensor([0, 8], device="cuda").int()
    hidden = model.model(
        input_ids=torch.arange(8, device="cuda")[None],
        position_ids=torch.arange(8, device="cuda")[None],
        use_cache=False,
        document_lengths=(8,),
        cu_seq_lens_q=starts,
    ).last_hidden_state
    hidden.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()
