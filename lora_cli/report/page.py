"""The shell of a page: one file that loads nothing, and whose security policy names what may style it and run in it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape


def page(title: str, sections: Sequence[str], *, style: str, script: str = "", metrics: str | None = None) -> str:
    """The whole page; empty sections leave no trace.

    Args:
        sections: HTML, its text escaped.
        metrics: JSON for the script, without anything that needs escaping.
    """
    policy = f"default-src 'none'; style-src '{_digest(style)}'; "
    policy += f"script-src '{_digest(script)}'; base-uri 'none'" if script else "base-uri 'none'"
    data = f'<script type="application/json" id="metrics">{metrics}</script>\n' if metrics is not None else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in sections if part)
        + "\n</main>\n"
        + data
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def figure_tiles(figures: Sequence[tuple[str, str, str]]) -> str:
    """A few figures beside each other: name, number, and what stands below it."""
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(number)}<small>{escape(beside)}</small></dd></div>"
        for name, number, beside in figures
    )
    return f'<dl class="figures">{tiles}</dl>' if tiles else ""


def warning_lines(warnings: Sequence[str]) -> str:
    return "".join(f'<p class="warning"><b>!</b> {escape(text)}</p>' for text in warnings)


def code(name: str, html: str) -> str:
    """Something to copy; `html` is escaped already."""
    button = f'<button data-copies="{name}" hidden>copy</button>'
    return f'<div class="code"><pre id="{name}">{html}</pre>{button}</div>'


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
