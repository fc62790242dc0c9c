"""The shared step against a step of each member alone: losses, gradients, and nobody in anybody's way."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit

from lora_cli.config import AdapterConfig, TrainConfig
from lora_cli.data.examples import Examples
from lora_cli.engine.batch import flat_batch
from lora_cli.engine.computation import Computation
from lora_cli.engine.optimizers import make_optimizer, make_scheduler
from lora_cli.engine.scoring import example_losses
from lora_cli.engine.step import Abandoned, Learner, train_step
from lora_cli.engine.world import join_world
from lora_cli.errors import ModelError
from lora_cli.model.adapter import attach_adapter
from lora_cli.plan import DataAccount
from lora_cli.sweep.arrange import Wish
from lora_cli.sweep.proof import prove_sharing
from lora_cli.sweep.row import Row
from lora_cli.sweep.shared import shared_losses, shared_step
from lora_cli.sweep.stack import Adapter, Stack
from tests.unit.engine import tiny

LENGTHS = [9, 5, 14, 3, 7, 11]
SEVERAL = [
    AdapterConfig(r=4),
    AdapterConfig(r=4, lora_alpha=64),
    AdapterConfig(r=2, use_rslora=True),
    AdapterConfig(r=8, target_modules=r".*\.1\..*(c_attn|q_proj|down_proj)"),
]
"""Neighbours of one shape, another rank, and one that adapts a few layers of the last block alone."""


@pytest.fixture(scope="module")
def examples():
    draw = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    ids = draw.integers(3, tiny.VOCABULARY, offsets[-1]).astype(np.int32)
    trained = draw.random(offsets[-1]) < 0.6
    trained[offsets[:-1]] = False
    trained[offsets[1:] - 1] = True
    account = DataAccount(6, 6, 0, 0, int(offsets[-1]), int(trained.sum()), 14, 14)
    return Examples(ids, trained, offsets, [f"rows:{n}" for n in range(6)], account, "rows")


def in_four_bits(model):
    """The base's linear layers as NF4, by bitsandbytes, on the CPU."""
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            packed = Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            packed.load_state_dict({"weight": module.weight.data})
            setattr(model.get_submodule(parent), leaf, packed.to("cpu"))
    return model.requires_grad_(False)


def members(base, configs, computation, rate=1e-2):
    adapters, learners = [], []
    for number, config in enumerate(configs):
        model = attach_adapter(base, config, seed=number)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in trained.values():
                parameter.normal_(std=0.1, generator=generator)
        train = TrainConfig(
            learning_rate=rate * (number + 1), optim="sgd", lr_scheduler_type="constant", warmup_steps=0
        )
        optimizer = make_optimizer(train, trained, torch.device("cpu"))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        computation.prepare(base)
        model.train()
        learners.append(
            Learner(base, trained, optimizer, make_scheduler(train, optimizer, 9), scaler, computation, 1.0)
        )
        adapters.append(Adapter.taken_from(base, model))
    return Stack(base, adapters), learners


def wishes(examples, rows):
    return [Wish(k, tuple(r), tuple(int(examples.lengths[i]) for i in r), "rows") for k, r in rows.items()]


def together(stack, learners, examples, rows, tokens=4096):
    return shared_step(
        Row(stack),
        dict(enumerate(learners)),
        wishes(examples, rows),
        dict.fromkeys(rows, examples),
        {k: int(examples.supervised[r].sum()) for k, r in rows.items()},
        micro_batch_tokens=tokens,
        world=join_world(),
    )


def alone(stack, learners, examples, rows):
    found = {}
    for number, own in rows.items():
        with stack.seated(number):
            batches = [flat_batch(examples, [i], torch.device("cpu")) for i in own]
            found[number] = train_step(learners[number], batches, int(examples.supervised[own].sum()), join_world())
    return found


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral", "gemma2", "qwen3", "nf4"])
@pytest.mark.parametrize("packing", ["documents", "single"])
@pytest.mark.parametrize("tokens", [4096, 40])
def test_a_shared_step_is_the_step_of_each_alone(examples, model_type, packing, tokens):
    kind = model_type if model_type in tiny.SETTINGS else "llama"
    base = in_four_bits(tiny.tiny_model(kind)) if model_type == "nf4" else tiny.tiny_model(kind)
    computation = Computation(packing, "chunked", torch.float32, "eager")
    # The first two see the same rows, as members with one seed do; the others have their own.
    rows = {0: [0, 1, 2], 1: [0, 1, 2], 2: [4, 2], 3: [5]}
    copied = copy.deepcopy(base)
    stack, learners = members(base, SEVERAL, computation)
    other, theirs = members(copied, SEVERAL, computation)
    for _ in range(2):
        ours, expected = together(stack, learners, examples, rows, tokens), alone(other, theirs, examples, rows)
        for number in rows:
            assert ours[number].loss == pytest.approx(expected[number].loss, rel=1e-6)
            assert ours[number].grad_norm == pytest.approx(expected[number].grad_norm, rel=1e-5)
    for one, another in zip(learners, theirs, strict=True):
        for name, parameter in one.parameters.items():
            torch.testing.assert_close(parameter, another.parameters[name], rtol=1e-5, atol=1e-6)


def test_who_else_is_there_changes_nothing(examples):
    computation = Computation("documents", "chunked", torch.float32, "eager")
    rows = {0: [0, 1, 2], 1: [0, 1, 2], 2: [0, 1, 2], 3: [0, 1, 2]}
    many, some = (members(tiny.tiny_model("llama"), SEVERAL, computation) for _ in range(2))
    together(*many, examples, rows)
    together(*some, examples, rows)
    everyone = together(*many, examples, rows)
    few = together(*some, examples, {k: rows[k] for k in (0, 2)})
    for number in (0, 2):
        assert few[number].loss == pytest.approx(everyone[number].loss, rel=1e-6)
    before = {n: p.clone() for n, p in some[1][1].parameters.items()}
    together(*some, examples, {0: rows[0]})
    assert all(torch.equal(before[n], p) for n, p in some[1][1].parameters.items())


def test_dropout_is_each_members_own(examples):
    """A member without dropout isn't touched by its neighbour's, and the neighbour's is there."""
    computation = Computation("documents", "chunked", torch.float32, "eager")
    rows = {0: [0, 1, 2], 1: [0, 1, 2]}
    plain = members(tiny.tiny_model("llama"), [SEVERAL[0], SEVERAL[1]], computation)
    dropped = members(
        tiny.tiny_model("llama"), [SEVERAL[0], SEVERAL[1].model_copy(update={"lora_dropout": 0.5})], computation
    )
    one, other = together(*plain, examples, rows), together(*dropped, examples, rows)
    assert one[0].loss == pytest.approx(other[0].loss, rel=1e-6)
    assert abs(one[1].loss - other[1].loss) > 1e-3


def test_scores_are_those_of_each_alone(examples):
    computation = Computation("documents", "chunked", torch.float32, "eager")
    stack, learners = members(tiny.tiny_model("gpt2"), SEVERAL, computation)
    everything = {number: list(range(6)) for number in range(4)}
    found = shared_losses(
        Row(stack),
        computation,
        wishes(examples, everything),
        dict.fromkeys(everything, examples),
        micro_batch_tokens=30,
        world=join_world(),
    )
    for number in everything:
        with stack.seated(number):
            own = example_losses(
                learners[number].model, computation, examples, micro_batch_tokens=99, world=join_world()
            )
        np.testing.assert_allclose(found[number], own, rtol=1e-6)


def test_a_step_that_is_abandoned_leaves_nothing(examples):
    computation = Computation("documents", "chunked", torch.float32, "eager")
    stack, learners = members(tiny.tiny_model("llama"), SEVERAL[:2], computation)
    before = {n: p.clone() for n, p in learners[0].parameters.items()}
    calls = iter([None, None, Abandoned()])

    def heed():
        if (asked := next(calls)) is not None:
            raise asked

    rows = {0: [0, 1, 2], 1: [3, 4, 5]}
    with pytest.raises(Abandoned):
        shared_step(
            Row(stack),
            dict(enumerate(learners)),
            wishes(examples, rows),
            dict.fromkeys(rows, examples),
            {0: 9, 1: 9},
            micro_batch_tokens=14,
            world=join_world(),
            heed=heed,
        )
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in learners[0].parameters.items())


def test_the_base_is_left_as_it_was(examples):
    base = tiny.tiny_model("llama")
    kinds = {name: type(module) for name, module in base.named_modules()}
    computation = Computation("documents", "chunked", torch.float32, "eager")
    stack, learners = members(base, SEVERAL, computation)
    together(stack, learners, examples, {0: [0], 1: [1]})
    assert {name: type(module) for name, module in base.named_modules()} == kinds


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2"])
def test_sharing_is_proven_for_what_can_share(model_type):
    computation = Computation("documents", "chunked", torch.float32, "eager")
    assert prove_sharing(tiny.tiny_config(model_type), computation, SEVERAL[:3]) < 1e-5


def test_a_head_cannot_be_shared():
    computation = Computation("documents", "chunked", torch.float32, "eager")
    with pytest.raises(ModelError, match="the head"):
        prove_sharing(tiny.tiny_config("llama"), computation, [AdapterConfig(r=4, target_modules=("lm_head",))])
