"""What a column of the source says of each row, so that rows can be told apart in groups.

Knows sources and places; knows nothing about tokens or figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.config import Source
from lora_cli.data.examples import Examples
from lora_cli.data.loading import open_sources
from lora_cli.errors import UserError

NONE = "(none)"
"""The group of rows that don't have the column, or null in it."""
LONGEST_NAME = 80


def column_values(column: str, examples: Examples, sources: Sequence[Source]) -> list[str]:
    """The column's value for the row of each example, as text.

    Args:
        column: a name, or names joined by dots for objects in objects.

    Raises:
        UserError: no row has it.
    """
    wanted = set(examples.places)
    values: dict[str, str] = {}
    names: dict[str, None] = {}
    found = False
    for source in open_sources(sources):
        for _, place, row in source.placed_rows(None):
            if place in wanted:
                value = _look_up(row, column)
                found = found or value is not None
                names |= dict.fromkeys(row)
                values[place] = NONE if value is None else _as_text(value)
    if not found:
        raise UserError(f"--group-by {column}: no row has such a column", remedy=f"Rows have: {', '.join(names)}.")
    return [values.get(place, NONE) for place in examples.places]


def _look_up(row: Mapping[str, Any], column: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value


def _as_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 3]}..."
