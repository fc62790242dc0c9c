"""`lora generate`: prompts answered side by side, and a chat where there is a terminal and no prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.cli.options import AsJson, Set, print_json
from lora_cli.errors import UserError

if TYPE_CHECKING:
    from lora_cli.evaluate.conversation import Conversation
    from lora_cli.report.console import Console
    from lora_cli.report.speech import Speech

_HELP = "/base, /adapter N: who answers   /forget: begin anew   /quit, or Ctrl-D"

Target = Annotated[
    str,
    typer.Argument(metavar="TARGET", help="A run folder, adapter folder, config or whole model.", show_default=False),
]


def generate(
    target: Target,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="May be repeated.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(metavar="PATH", help="One prompt per line; .jsonl: prompt or messages.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="This one, too; A:0.7+B stacks several. May be repeated."),
    ] = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Leave the base's answers out.")] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the system says first.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give prompts to the model as they are.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is all.")] = 0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 42,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Text from base and adapters.

    The same prompts through the base and every adapter, side by side on one loaded base. Without a prompt, on a
    terminal: a chat.
    """
    from lora_cli.engine.generation import Sampling
    from lora_cli.evaluate import generate, read_prompts
    from lora_cli.evaluate.conversation import Conversation
    from lora_cli.report.console import Console, show
    from lora_cli.report.evaluation import render_outputs
    from lora_cli.report.speech import Speech

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, min_p, repetition_penalty)
    prompts = read_prompts(prompt or (), prompts_file)
    on_terminal = sys.stdout.isatty() and not as_json
    if not prompts and on_terminal and sys.stdin.isatty():
        with Console(quiet_stdout=True) as console:
            conversation = Conversation(
                target,
                adapters=adapter or (),
                sampling=sampling,
                overrides=set_ or (),
                raw=raw,
                system=system,
                emit=console.emit,
            )
        with conversation:
            _chat(conversation)
        return
    with Console(quiet_stdout=True) as console:
        aloud = on_terminal and len(prompts) == 1
        result = generate(
            target,
            prompts=prompts,
            adapters=adapter or (),
            sampling=sampling,
            overrides=set_ or (),
            raw=raw,
            system=system,
            base=not no_base,
            listener=_After(console, Speech(sys.stdout)) if aloud else None,
            emit=console.emit,
        )
    if as_json:
        print_json(result.as_json())
    elif not aloud:
        show(render_outputs(result))


class _After:
    """A listener before whom the console clears its live region away."""

    def __init__(self, console: Console, speech: Speech) -> None:
        self._console = console
        self.say, self.end = speech.say, speech.end
        self._speech = speech

    def begin(self, adapter: str | None) -> None:
        self._console.__exit__(None, None, None)
        self._speech.begin(adapter)


def _chat(conversation: Conversation) -> None:
    import readline  # noqa: F401 - gives input() its history and editing

    from lora_cli.report.speech import Speech, who

    print()
    for number, voice in enumerate(conversation.voices):
        mark = "answers" if voice is conversation.voice else f"/adapter {number}" if number else "/base"
        print(f"  {mark:<11}{who(voice.name)}" + (f" in {conversation.precision}" if voice.name is None else ""))
    if not conversation.remembers:
        print("  !  no chat template: each line is a prompt by itself")
    print(f"\n  {_HELP}")
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line in ("/quit", "/exit", "/q"):
            return
        try:
            if line.startswith("/"):
                print(f"  {_command(conversation, line)}")
            elif line:
                speech = Speech(sys.stdout, indent="  ")
                print()
                speech.end(conversation.ask(line, speech.say).stop_reason)
        except UserError as error:
            print(f"  !  {error.message}" + (f"\n     {error.remedy}" if error.remedy else ""))
        except KeyboardInterrupt:
            print("\n  (interrupted; not remembered)")


def _command(conversation: Conversation, line: str) -> str:
    from lora_cli.report.speech import who

    word, _, rest = line.partition(" ")
    if word == "/forget":
        conversation.forget()
        return "forgotten"
    if word == "/base" or (word == "/adapter" and rest.strip().isdecimal()):
        conversation.switch(int(rest) if word == "/adapter" else 0)
        return f"{who(conversation.voice.name)} answers now"
    return _HELP
