"""Answers on a terminal while they come: words wrapped as they fall, and who is speaking.

Knows nothing about models.
"""

from __future__ import annotations

from typing import TextIO

from rich.cells import cell_len

from lora_cli.report.console import write
from lora_cli.report.layout import INDENT, page_width, printable, short_path


class Speech:
    """One answer after another, each under the name of who gives it."""

    def __init__(self, stream: TextIO, *, indent: str = INDENT * 2) -> None:
        self._stream = stream
        self._indent = indent
        self._column = 0
        self._word = ""
        self._space = ""

    def begin(self, adapter: str | None) -> None:
        write(f"\n{INDENT}{who(adapter)}", self._stream)
        self._start()

    def say(self, text: str) -> None:
        """Pieces may end anywhere; a word is put down once it is known to be whole."""
        for character in text:
            if character == "\n":
                self._put_word()
                self._stream.write("\n")
                self._column, self._space = 0, ""
            elif character == " ":
                self._put_word()
                self._space += " "
            else:
                self._word += printable(character)
        if self._space:
            self._put_word()
        self._stream.flush()

    def end(self, stop_reason: str) -> None:
        self._put_word()
        if stop_reason == "length":
            write(f"\n{INDENT}(cut at the limit)", self._stream)
        else:
            self._stream.write("\n")
        self._stream.flush()
        self._start()

    def _start(self) -> None:
        self._column, self._word, self._space = 0, "", ""

    def _put_word(self) -> None:
        if not self._word:
            return
        width = page_width()
        needed = cell_len(self._space) + cell_len(self._word)
        if self._column and self._column + needed > width:
            self._stream.write("\n")
            self._column, self._space = 0, ""
        if self._column == 0:
            self._stream.write(self._indent)
            self._column = cell_len(self._indent)
        encoding = self._stream.encoding or "utf-8"
        text = (self._space + self._word).encode(encoding, "backslashreplace").decode(encoding)
        self._stream.write(text)
        self._column += cell_len(text)
        self._word, self._space = "", ""


def who(adapter: str | None) -> str:
    """How a voice is called: `base`, a folder, a stack."""
    return "base" if adapter is None else printable(short_path(adapter))
