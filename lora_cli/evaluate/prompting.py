"""Text from a base and from adapters on it, for prompts as a user types them.

Knows nothing about figures, and nothing about how a prompt becomes tokens: that's `prompts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lora_cli.data.loading import set_chat_template
from lora_cli.engine.generation import Generated, Sampling, generate_aloud
from lora_cli.engine.trained import find_target
from lora_cli.errors import UserError
from lora_cli.evaluate.answers import answer_all
from lora_cli.evaluate.models import check_results, read_target
from lora_cli.evaluate.prompts import Layout, Prompt
from lora_cli.evaluate.voices import Voice, Voices, find_voices, load_voices
from lora_cli.report.comparison import Generations, Output
from lora_cli.report.events import Emit, Working, ignore


class Listener(Protocol):
    """Hears answers while they come."""

    def begin(self, adapter: str | None) -> None: ...

    def say(self, text: str) -> None: ...

    def end(self, stop_reason: str) -> None: ...


def generate(
    target: Path | str,
    *,
    prompts: Sequence[str | Prompt],
    adapters: Sequence[str] = (),
    sampling: Sampling,
    overrides: Sequence[str] = (),
    raw: bool = False,
    system: str | None = None,
    base: bool = True,
    listener: Listener | None = None,
    emit: Emit = ignore,
) -> Generations:
    """Answers of the base, of the target's adapter, and of further adapters on the same base, loaded once.

    Args:
        target: a run folder, an adapter folder, a config, or a whole model.
        adapters: folders, or stacks such as `runs/docs:0.7+runs/chat:0.3`.
        raw: give the prompts to the model as they are.
        system: what the system says, for a chat template.
        base: whether the base answers, too. A whole model always does.
        listener: hears the answers to a single prompt as they come; many prompts are answered in batches.

    Raises:
        UserError: no prompt, a prompt that is too long, or anything wrong with target and adapters.
    """
    if not prompts:
        raise UserError("no prompt", remedy="Give --prompt TEXT or --prompts-file PATH.")
    asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    found = find_target(target, overrides, whole_models=True)
    speakers = find_voices(found, adapters, base=base)
    check_results([piece.folder for voice in speakers for piece in voice.pieces])
    reader = read_target(found)
    set_chat_template(found.config.data, reader.tokenizer)
    layout = Layout(found, reader, raw=raw, system=system)
    tokens = [layout.tokens(prompt) for prompt in asked]
    voices = load_voices(found, reader, emit)
    by_adapter: dict[str | None, list[Generated]] = {}
    for voice in speakers:
        if listener is not None and len(asked) == 1:
            by_adapter[voice.name] = [_aloud(voices, voice, tokens[0], sampling, listener)]
        else:
            by_adapter[voice.name] = _in_batches(voices, voice, tokens, sampling, emit)
    return Generations(
        tuple(
            Output(prompt.text, adapter, answers[number].text, answers[number].stop_reason)
            for number, prompt in enumerate(asked)
            for adapter, answers in by_adapter.items()
        )
    )


def _aloud(voices: Voices, voice: Voice, tokens: list[int], sampling: Sampling, listener: Listener) -> Generated:
    listener.begin(voice.name)
    with voices.speaking(voice) as model:
        computation, reader = voices.loaded.computation, voices.reader
        fitting = reader.fitting(sampling, len(tokens))
        answer = generate_aloud(
            model, computation, reader.tokenizer, tokens, reader.stop_token_ids, fitting, listener.say
        )
    listener.end(answer.stop_reason)
    return answer


def _in_batches(
    voices: Voices, voice: Voice, tokens: Sequence[Sequence[int]], sampling: Sampling, emit: Emit
) -> list[Generated]:
    def progress(done: int, total: int) -> None:
        emit(Working("generating", done, total, "answers"))

    with voices.speaking(voice) as model:
        return answer_all(model, voices.loaded, voices.reader, tokens, sampling, progress=progress)
