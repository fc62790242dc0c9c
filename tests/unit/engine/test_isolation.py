"""Documents of one row don't see each other, in any attention that the engine runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.engine import attention
from lora_cli.engine.attention import UnsupportedAttention, document_attention
from lora_cli.engine.batch import FlatBatch, flatten
from lora_cli.engine.computation import Computation
from tests.unit.engine.learning import PACKED
from tests.unit.engine.tiny import tiny_model

CPU = torch.device("cpu")
LENGTHS = (13, 21, 9)
DENSE = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


def row(documents: list[np.ndarray]) -> FlatBatch:
    return flatten(documents, [np.ones(len(document), dtype=bool) for document in documents], CPU)


def documents(seed: int) -> list[np.ndarray]:
    draw = np.random.Generator(np.random.PCG64(seed))
    return [draw.integers(3, 90, length) for length in LENGTHS]


def logits(model: PreTrainedModel, computation: Computation, batch: FlatBatch) -> Tensor:
    computation.prepare(model)
    extra = attention.boundaries(batch) if computation.packing == "documents" else {}
    with torch.no_grad():
        found: Tensor = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False, **extra
        ).logits[0]
    return found


@pytest.mark.parametrize("packing", ["documents", "mask"])
@pytest.mark.parametrize("model_type", DENSE)
def test_replacing_the_first_document_changes_no_bit_of_the_others(model_type: str, packing: str) -> None:
    model = tiny_model(model_type)
    computation = replace(PACKED, packing=packing, attention=model.config._attn_implementation)
    before = logits(model, computation, row(documents(0)))
    after = logits(model, computation, row([documents(1)[0], *documents(0)[1:]]))
    assert torch.equal(before[LENGTHS[0] :], after[LENGTHS[0] :])
    assert not torch.allclose(before[: LENGTHS[0]], after[: LENGTHS[0]])


def test_experts_see_another_batch_and_nothing_else() -> None:
    """gpt-oss: experts multiply the tokens that were routed to them together, so the last bits move."""
    model = tiny_model("gpt_oss")
    before = logits(model, PACKED, row(documents(0)))
    after = logits(model, PACKED, row([documents(1)[0], *documents(0)[1:]]))
    apart = (before - after)[LENGTHS[0] :].abs().max() / before.abs().max()
    assert apart < 2e-6


@pytest.mark.parametrize("model_type", [*DENSE, "gpt_oss"])
def test_packed_equals_alone_under_eager_attention(model_type: str) -> None:
    """Windows, soft caps and sinks are transformers' own; so are positions, which leave no leak when wrong."""
    model = tiny_model(model_type)
    packed = logits(model, PACKED, row(documents(0)))
    eager = Computation("single", "full", torch.float32, "eager")
    alone = torch.cat([logits(model, eager, row([document])) for document in documents(0)])
    assert (packed - alone).abs().max() / alone.abs().max() < 2e-6


@pytest.mark.parametrize("lifted", [{"sliding_window": 1000}, {"attn_logit_softcapping": 1000.0}], ids=str)
def test_what_the_eager_comparison_compares_is_felt(lifted: dict[str, float]) -> None:
    """The models above would agree as well if their windows and soft caps did nothing."""
    plain = tiny_model("gemma2", **lifted)
    assert not torch.allclose(
        logits(tiny_model("gemma2"), PACKED, row(documents(0))), logits(plain, PACKED, row(documents(0))), rtol=1e-3
    )


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 14),
    softcap=st.none() | st.floats(0.5, 20),
    sinks=st.booleans(),
    groups=st.sampled_from([1, 2]),
)
def test_attention_is_the_formula_written_out(
    lengths: list[int], window: int | None, softcap: float | None, sinks: bool, groups: int
) -> None:
    total, key_heads, size = sum(lengths), 2, 4
    generator = torch.Generator().manual_seed(total)
    query = torch.randn(1, key_heads * groups, total, size, generator=generator)
    key, value = (torch.randn(1, key_heads, total, size, generator=generator) for _ in range(2))
    sink = torch.randn(key_heads * groups, generator=generator) if sinks else None
    starts = np.cumsum([0, *lengths])
    actual, _ = document_attention(
        torch.nn.Module(), query, key, value, None, scaling=0.3, sliding_window=window, softcap=softcap, s_aux=sink,
        document_lengths=tuple(lengths), cu_seq_lens_q=torch.from_numpy(starts.astype(np.int32)),
    )  # fmt: skip
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for head in range(key_heads * groups):
        for i in range(total):
            seen = [j for j in range(i + 1) if owner[j] == owner[i] and (window is None or i - j < window)]
            scores = torch.stack([query[0, head, i] @ key[0, head // groups, j] * 0.3 for j in seen])
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sink is not None:
                scores = torch.cat([scores, sink[head, None]])
            weights = torch.softmax(scores, 0)[: len(seen)]
            expected = weights @ torch.stack([value[0, head // groups, j] for j in seen])
            assert torch.allclose(actual[0, i, head], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"document_lengths": None}, "boundaries"),
        ({"is_causal": False}, "causal"),
        ({"attention_mask": torch.zeros(1)}, "mask of its own"),
    ],
)
def test_what_it_does_not_do_is_refused(extra: dict[str, object], says: str) -> None:
    """Silence here would be a model that trains on other attention than it was made for."""
    q = torch.zeros(1, 2, 3, 4)
    known: dict[str, object] = {"document_lengths": (3,), "cu_seq_lens_q": torch.tensor([0, 3]), "attention_mask": None}
    with pytest.raises(UnsupportedAttention, match=says):
        document_attention(torch.nn.Module(), q, q, q, **(known | extra))  # type: ignore[arg-type]


def test_a_model_with_attention_of_its_own_says_that_it_cannot_be_exchanged() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gptj", vocab_size=97, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)
    with pytest.raises(UnsupportedAttention, match="can't be exchanged"):
        attention.use_attention(AutoModelForCausalLM.from_config(config), attention.NAME)
