"""Answers made in batches with a cache are those of one prompt at a time, all of it computed anew for each token."""

from __future__ import annotations

import random

import pytest
import torch

from lora_cli.engine import generation
from lora_cli.engine.computation import Computation
from lora_cli.engine.generation import Sampling, generate_batch
from tests.unit.engine.learning import with_adapter
from tests.unit.engine.tiny import SETTINGS, VOCABULARY, tiny_model

EAGER = ("gemma2", "gpt_oss")
"""With soft caps or sinks, which SDPA doesn't have."""
NEW = 9


class Spelling:
    """As much of a tokenizer as an answer needs."""

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


def prompts(count=23):
    draw = random.Random(0)
    return [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(2, 30))] for _ in range(count)]


def stops_for(model):
    """Tokens that this random model comes to say, so that some answers end by themselves, sooner or later."""
    return frozenset(one_by_one(model, prompt, ())[0][4] for prompt in prompts()[:4])


def one_by_one(model, prompt, stops):
    """Greedily, without a cache; the answer, and whether the model ended it."""
    ids = list(prompt)
    for _ in range(NEW):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stops:
            return tuple(ids[len(prompt) :]), "stop"
        ids.append(token)
    return tuple(ids[len(prompt) :]), "length"


def computation(model_type="llama"):
    return Computation("documents", "chunked", torch.float32, "eager" if model_type in EAGER else "sdpa")


def adapted(model_type):
    model = with_adapter(tiny_model(model_type)).eval()
    model.set_attn_implementation(computation(model_type).attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("padded", [True, False], ids=["neighbouring lengths", "equal lengths"])
@pytest.mark.parametrize("model_type", sorted(SETTINGS))
def test_a_batch_answers_as_one_by_one(model_type, padded):
    model = adapted(model_type)
    stops = stops_for(model)
    expected = [one_by_one(model, prompt, stops) for prompt in prompts()]
    assert "stop" in {reason for _, reason in expected}
    answers = generate_batch(
        model,
        computation(model_type),
        Spelling(),
        prompts(),
        stops,
        Sampling(max_new_tokens=NEW),
        padded=padded,
        batch_size=8,
    )
    assert [(answer.token_ids, answer.stop_reason) for answer in answers] == expected
    assert [answer.text for answer in answers] == [Spelling().decode(ids) for ids, _ in expected]


def test_batches_are_sorted_by_length_and_use_a_cache(monkeypatch):
    """23 prompts in three batches; after a batch's prompts, each step gives the model one token of each."""
    model = adapted("llama")
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generate_batch(
        model,
        computation(),
        Spelling(),
        prompts(),
        frozenset(),
        Sampling(max_new_tokens=NEW),
        padded=True,
        batch_size=8,
    )
    lengths = sorted(map(len, prompts()))
    steps = NEW - 1
    expected = []
    for start in (0, 8, 16):
        batch = lengths[start : start + 8]
        expected += [(len(batch), max(batch)), *[(len(batch), 1)] * steps]
    assert shapes == expected
    assert model.config.use_cache is False  # as training left it


def test_a_batch_that_doesnt_fit_is_halved(monkeypatch):
    model, run = adapted("gpt2"), generation._run
    stops = stops_for(model)

    def small(model, prompts, *rest):
        if len(prompts) > 3:
            raise torch.OutOfMemoryError
        return run(model, prompts, *rest)

    whole = generate_batch(
        model, computation(), Spelling(), prompts(), stops, Sampling(max_new_tokens=NEW), padded=True
    )
    monkeypatch.setattr(generation, "_run", small)
    halved = generate_batch(
        model, computation(), Spelling(), prompts(), stops, Sampling(max_new_tokens=NEW), padded=True
    )
    assert halved == whole
