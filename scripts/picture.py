"""Draw docs/run.svg: a real run's screen, once while it trains and once at its end.

    python scripts/picture.py configs/demo-lora.yaml

Runs `lora train` on a pseudo-terminal of 96 columns, reads what it shows with a terminal emulator, and writes the two
screens as one SVG without fonts or scripts of its own. The run goes to a temporary folder.
"""

from __future__ import annotations

import os
import pty
import re
import select
import sys
import tempfile
import time
from html import escape
from pathlib import Path

import pyte

COLUMNS, LINES = 96, 48
LINE_HEIGHT, COLUMN_WIDTH, MARGIN = 18, 8.43, 16
PERCENT = re.compile(r"(\d+) %  epoch")
COLOURS = {"red": "#c4314b", "green": "#2d7d46", "yellow": "#a15c00", "brown": "#a15c00", "cyan": "#0b6e99"}
ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "run.svg"


def main() -> None:
    config = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("configs", "scripts", ".demo", "lora_cli"):
            (Path(folder) / name).symlink_to(ROOT / name)
        os.chdir(folder)
        screens = watch(["-m", "lora_cli", "train", config, "--output-dir", "runs/dates"])
    PICTURE.write_text(draw(f"lora train {config} --output-dir runs/dates", screens), encoding="utf-8")
    print(f"wrote {PICTURE}")


def watch(arguments: list[str]) -> list[list[list[pyte.screens.Char]]]:
    """Run Python with `arguments` on a terminal; its screen half way through the steps, and at the end."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(COLUMNS=str(COLUMNS), LINES=str(LINES), TERM="xterm-256color")
        os.execv(sys.executable, [sys.executable, *arguments])
    half: list[list[pyte.screens.Char]] = []
    while True:
        ready, _, _ = select.select([terminal], [], [], 0.05)
        if ready:
            try:
                data = os.read(terminal, 65536)
            except OSError:  # how Linux says that the other side has closed
                break
            if not data:
                break
            stream.feed(data)
        if not half and any(int(found[1]) >= 60 for line in screen.display if (found := PERCENT.search(line))):
            half = copy(screen)
    os.waitpid(child, 0)
    time.sleep(0.1)
    return [half, copy(screen)]


def copy(screen: pyte.Screen) -> list[list[pyte.screens.Char]]:
    """The lines of a screen, without empty ones at its end."""
    lines = [[screen.buffer[row][column] for column in range(COLUMNS)] for row in range(LINES)]
    while lines and all(char.data == " " for char in lines[-1]):
        lines.pop()
    return lines


def draw(title: str, screens: list[list[list[pyte.screens.Char]]]) -> str:
    """Screens below one another, in one SVG."""
    live = screens[0][-2:]
    rows = [*screens[1]]
    width = round(COLUMNS * COLUMN_WIDTH + 2 * MARGIN)
    height = (len(rows) + len(live) + 6) * LINE_HEIGHT + 2 * MARGIN
    y = MARGIN + LINE_HEIGHT
    parts = [text_row(f"$ {title}", y, "#0b6e99")]
    y += 2 * LINE_HEIGHT
    for line in rows:
        parts.append(row(line, y))
        y += LINE_HEIGHT
    y += LINE_HEIGHT
    parts.append(text_row("  while it ran:", y, "#777"))
    y += 2 * LINE_HEIGHT
    for line in live:
        parts.append(row(line, y))
        y += LINE_HEIGHT
    style = "font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}">\n<rect width="100%" height="100%" rx="8" fill="#fbfbfa" stroke="#ddd"/>\n'
        f'<g style="{style}" fill="#222">\n' + "\n".join(part for part in parts if part) + "\n</g>\n</svg>\n"
    )


def text_row(text: str, y: float, colour: str) -> str:
    return f'<text x="{MARGIN}" y="{y}" fill="{colour}" xml:space="preserve">{escape(text)}</text>'


def row(line: list[pyte.screens.Char], y: float) -> str:
    """One line of a screen as text, a span for each run of one style; placed by column, whatever the font."""
    spans = []
    start = 0
    while start < len(line):
        end = start
        while end < len(line) and (line[end].fg, line[end].bold) == (line[start].fg, line[start].bold):
            end += 1
        text = "".join(char.data for char in line[start:end])
        if text.strip():
            x = MARGIN + start * COLUMN_WIDTH
            fill = f' fill="{COLOURS[line[start].fg]}"' if line[start].fg in COLOURS else ""
            weight = ' font-weight="600"' if line[start].bold else ""
            length = f' textLength="{len(text) * COLUMN_WIDTH:.1f}" lengthAdjust="spacingAndGlyphs"'
            spans.append(f'<text x="{x:.1f}" y="{y}"{fill}{weight}{length} xml:space="preserve">{escape(text)}</text>')
        start = end
    return "".join(spans)


if __name__ == "__main__":
    main()
