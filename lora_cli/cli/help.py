"""`lora --help` and unknown commands: commands in groups, one line each, and the near match of a typo.

Plain text, without Rich: the page answers in about a tenth of a second. Knows the order of the commands;
what each does is said by its own docstring.
"""

from __future__ import annotations

import shutil
import textwrap
from difflib import get_close_matches
from typing import Any

from typer.core import TyperCommand, TyperGroup

from lora_cli.cli.failures import exit_codes
from lora_cli.errors import UserError

GROUPS: dict[str, tuple[str, ...]] = {
    "Before": ("init", "check", "preview", "params", "estimate-vram"),
    "Run": ("train", "sweep"),
    "After": ("eval", "generate", "merge", "extract", "export"),
    "Editor": ("schema",),
}

_EXAMPLE = "lora init run.yaml && lora check run.yaml && lora train run.yaml"
_EXIT_CODES = "0 done, 1 our bug, 2 yours to mend, 3 the answer is no, 130/143 interrupted"


class LoraGroup(TyperGroup):
    """The top level: `lora`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(help_page({name: command.help or "" for name, command in self.commands.items()}))

    def invoke(self, ctx: Any) -> Any:
        with exit_codes(debug=ctx.obj["debug"]):
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name in self.commands or name.startswith("-"):
            return super().resolve_command(ctx, args)
        matches = get_close_matches(name, self.commands, n=1)
        remedy = f"Did you mean '{matches[0]}'?" if matches else "lora --help lists the commands."
        raise UserError(f"there is no command '{name}'", remedy=remedy)


class LoraCommand(TyperCommand):
    """One command, with the arguments where people type them: `lora train CONFIG [OPTIONS]`."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [
            f"{parameter.metavar}{'...' if parameter.nargs != 1 else ''}"
            for parameter in self.get_params(ctx)
            if parameter.param_type_name == "argument"
        ]
        return [*arguments, "[OPTIONS]"]


def help_page(summaries: dict[str, str]) -> str:
    """The page; `summaries` maps each command to what it does."""
    lines = [
        "Usage: lora COMMAND [OPTIONS]",
        "",
        "Fine-tune language models with LoRA and QLoRA from one YAML file.",
        "",
        f"  {_EXAMPLE}",
        "",
    ]
    for group, names in GROUPS.items():
        for position, name in enumerate(names):
            label = group if position == 0 else ""
            summary = summaries[name].splitlines()[0].rstrip(".")
            lines.append(f"{label:<9}{name:<15}{_uncapitalized(summary)}")
    lines += ["", *_exit_codes(), "--debug     with any command: the traceback of an error"]
    return "\n".join(lines) + "\n"


def _uncapitalized(text: str) -> str:
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


def _exit_codes() -> list[str]:
    width = shutil.get_terminal_size((110, 24)).columns
    return textwrap.wrap(f"Exit codes  {_EXIT_CODES}", max(width, 40), subsequent_indent=" " * 12)
