"""Is the adapter better than its base, and by how much?

    rows        which rows, and whether they were trained on
    models      the base, loaded once as trained, with adapters put on and taken off
    scoring     each row's loss and right tokens
    answers     each row's prompt answered
    matching    answers compared with references
    statistics  paired bootstrap intervals, the sign test
    verdict     the figures in words
    records     what is left in the run folder
    paired      all of it: `evaluate`
    voices      who answers: base, adapters, stacks of them
    prompts     a prompt, or a conversation, as token ids
    prompting   `generate`
    conversation the same, with a memory, for a chat

Knows nothing about training or screens.
"""

from lora_cli.evaluate.paired import evaluate
from lora_cli.evaluate.prompting import generate
from lora_cli.evaluate.prompts import read_prompts

__all__ = ["evaluate", "generate", "read_prompts"]
