"""A GPT-2 of well under a million parameters, with its own tokenizer, made offline.

    python scripts/make_tiny_gpt2.py FOLDER

Trains a byte-level BPE tokenizer, then pre-trains the model until it repeats what it is told: enough for LoRA
to build on, and no more. On one machine and one number of threads, every run writes the same bytes.

Tests call `build_tiny_gpt2(folder)`, which leaves the weights random and takes a moment. Knows nothing about
LoRA or about the demo's task; what the model reads is `make_demo_data.small_talk`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from random import Random

import torch
from make_demo_data import Messages, small_talk
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

PRETRAIN_STEPS = 350
ROWS_PER_STEP = 32
IGNORED = -100

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny_gpt2(
    folder: Path,
    *,
    n_embd: int = 128,
    n_layer: int = 3,
    n_head: int = 4,
    n_positions: int = 256,
    pretrain_steps: int = 0,
    seed: int = 0,
) -> None:
    """Write config, weights, tokenizer and generation config to `folder`."""
    tokenizer = train_tokenizer(Random(seed))
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=n_embd,
            n_layer=n_layer,
            n_head=n_head,
            n_positions=n_positions,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own gelu_new, in one operation
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    if pretrain_steps:
        pretrain(model, tokenizer, pretrain_steps, Random(seed))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(random: Random) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ("\n".join(message["content"] for message in small_talk(random)) for _ in range(4_000))
    tokenizer.train_from_iterator(("user\nassistant\n" + text for text in texts), trainer)
    # No merge of digits was learned, so GPT-2's plain pre-tokenizer keeps them apart too; being the one that
    # GPT-2's tokenizer class puts back when it loads the files, it is the one to save.
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def pretrain(model: nn.Module, tokenizer: PreTrainedTokenizerFast, steps: int, random: Random) -> None:
    """Teach the model to answer `small_talk`. Muon moves the layers' weight matrices, Adam the rest."""
    matrices = [p for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if ".h." not in name or p.ndim != 2]
    optimizers = (Muon(matrices, lr=2e-2), torch.optim.Adam(others, lr=3e-3, betas=(0.9, 0.98)))
    schedulers = [LambdaLR(optimizer, partial(warmup_and_decay, steps=steps)) for optimizer in optimizers]
    model.train()
    for _ in range(steps):
        input_ids, labels = padded_batch(tokenizer, [small_talk(random) for _ in range(ROWS_PER_STEP)])
        logits = model(input_ids=input_ids, use_cache=False).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED).backward()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    model.eval()


def warmup_and_decay(step: int, steps: int) -> float:
    """The share of the peak learning rate: up for the first 5 % of the steps, down for the last 40 %."""
    return min(1.0, (step + 1) / (0.05 * steps), (steps - step) / (0.4 * steps))


def padded_batch(tokenizer: PreTrainedTokenizerFast, rows: list[Messages]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, padded on the right; only the assistant's answers are labelled."""
    asked = [row[:-1] for row in rows]
    prompts = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    wholes = tokenizer.apply_chat_template(rows, tokenize=False)
    ids = [torch.tensor(row) for row in tokenizer(wholes)["input_ids"]]
    labels = [row.clone() for row in ids]
    for label, prompt in zip(labels, tokenizer(prompts)["input_ids"], strict=True):
        label[: len(prompt)] = IGNORED
    return (
        pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al., 2024): learns to copy in far fewer steps than Adam.

    torch has one, too, but it computes in bfloat16, which made this five times slower on a CPU without that type.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 0.05)
                update = orthogonal(matrix.grad.lerp(momentum, 0.95))
                rows, columns = matrix.shape
                matrix.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))


def orthogonal(matrix: Tensor) -> Tensor:
    """Roughly the nearest matrix with all singular values 1, by five Newton-Schulz steps."""
    if matrix.size(0) > matrix.size(1):
        return orthogonal(matrix.T).T
    matrix = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = matrix @ matrix.T
        matrix = 3.4445 * matrix + (-4.7750 * gram + 2.0315 * gram @ gram) @ matrix
    return matrix


if __name__ == "__main__":
    logging.disable_progress_bar()
    build_tiny_gpt2(Path(sys.argv[1]), pretrain_steps=PRETRAIN_STEPS)
