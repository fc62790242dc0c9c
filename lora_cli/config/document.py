"""A YAML document as plain values, with the place of every one of them.

Reads YAML 1.2 and nothing beyond its core types: mappings with text keys, lists, text, numbers, booleans,
null. Collects what is wrong with the writing (duplicate keys, unknown tags, broken syntax). Knows nothing
of what a config may contain.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLStreamError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from lora_cli.config.secrets import redact
from lora_cli.errors import Place, Problem

Path_ = tuple[str | int, ...]
"""A value's way from the top: `("data", "train", 0, "path")`."""

MAX_VALUES = 20_000
"""A config has about a hundred. Aliases of aliases can make billions out of a few lines."""

_CORE_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null")}
_TEXT_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("str", "timestamp", "merge", "value")}
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")


@dataclass(frozen=True)
class Mark:
    """Where a value stands and how it is written. Both places are None for a value from the command line."""

    key: Place | None
    value: Place | None
    written: str

    @property
    def empty(self) -> bool:
        """Nothing was written after the colon: YAML's other way to say null."""
        return self.written == ""


@dataclass
class Document:
    """What was read. `value` is None where `problems` say that nothing could be."""

    value: Any
    marks: dict[Path_, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def mark(self, path: Path_) -> Mark | None:
        """The mark of the value, or of the nearest one above it."""
        while path and path not in self.marks:
            path = path[:-1]
        return self.marks.get(path)


def read_document(text: str, file: Path | str | None) -> Document:
    """`text` as values and places; without a `file`, the places are None."""
    reader = _Reader(text, file)
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = reader.place(mark.line, mark.column) if mark is not None else None
        return Document(None, problems=[Problem("", f"not YAML: {_sentence(error)}", _advice(text, place), place)])
    except (ReaderError, YAMLStreamError) as error:
        return Document(None, problems=[_unreadable(error, text, reader)])
    if node is None:
        return Document(None)
    value = reader.read(node, (), None)
    return Document(value, reader.marks, reader.problems)


class _Reader:
    """Walks the composed nodes once, building values and marks together."""

    def __init__(self, text: str, file: Path | str | None) -> None:
        self.text = text
        self.file = file
        self.lines = _LINE_BREAK.split(text)
        self.marks: dict[Path_, Mark] = {}
        self.problems: list[Problem] = []
        self.construct = YAML(typ="safe", pure=True).constructor.construct_object
        self.open: set[int] = set()

    def read(self, node: Node, path: Path_, key: Place | None) -> Any:
        value_place = self.node_place(node)
        self.marks[path] = Mark(key, value_place, self.written(node))
        if id(node) in self.open or len(self.marks) > MAX_VALUES:
            self.problem(path, "an alias that contains itself, or far too many values", "", value_place)
            return None
        self.open.add(id(node))
        try:
            if isinstance(node, MappingNode):
                return self.mapping(node, path)
            if isinstance(node, SequenceNode):
                return [self.read(item, (*path, index), None) for index, item in enumerate(node.value)]
            return self.scalar(node, path)
        finally:
            self.open.discard(id(node))

    def mapping(self, node: MappingNode, path: Path_) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self.node_place(key_node)
            key = self.scalar(key_node, path) if isinstance(key_node, ScalarNode) else None
            if not isinstance(key, str):
                written = self.written(key_node)
                self.problem((*path, written), "a key must be text", f'"{written}" in quotes is', place)
            elif key in values:
                first = self.marks[(*path, key)].key
                hint = f"first given on line {first.line}" if first is not None else "keep one of them"
                self.problem((*path, key), "given twice", hint, place)
            else:
                values[key] = self.read(value_node, (*path, key), place)
        return values

    def scalar(self, node: Node, path: Path_) -> Any:
        if node.tag in _TEXT_SCALARS:
            text = _with_whole_characters(node.value)
            if text is None:
                self.problem(path, "holds half a character", "a \\u escape is one of a pair", self.node_place(node))
            return text
        if node.tag in _CORE_SCALARS:
            try:
                return self.construct(node)
            except (ValueError, MarkedYAMLError):
                pass
        hint = "plain text, numbers, true, false and null are all there is"
        self.problem(path, f"{node.tag} is no type of a config", hint, self.node_place(node))
        return None

    def problem(self, path: Path_, message: str, hint: str, place: Place | None) -> None:
        self.problems.append(Problem(dotted(path), message, hint, place))

    def written(self, node: Node) -> str:
        """The value as a message should show it: text in quotes, the rest as it stands in the file."""
        if isinstance(node, ScalarNode) and node.tag in _TEXT_SCALARS:
            return redact(
                json.dumps(node.value if len(node.value) <= 60 else node.value[:57] + "...", ensure_ascii=False)
            )
        source = self.text[node.start_mark.index : node.end_mark.index].strip()
        if "\n" in source or len(source) > 60:
            return "a mapping" if isinstance(node, MappingNode) else "a list"
        return redact(source)

    def node_place(self, node: Node) -> Place | None:
        start, end = node.start_mark, node.end_mark
        length = end.column - start.column if end.line == start.line else 1
        return self.place(start.line, start.column, max(1, length))

    def place(self, line: int, column: int, length: int = 1) -> Place | None:
        if self.file is None:
            return None
        text = self.lines[line] if line < len(self.lines) else ""
        return Place(self.file, line + 1, column + 1, redact(text), length)


def holds(value: Any, step: str | int) -> bool:
    """Whether `value[step]` is there."""
    if isinstance(value, dict):
        return step in value
    return isinstance(value, list) and isinstance(step, int) and step < len(value)


def _with_whole_characters(text: str) -> str | None:
    """JSON escapes a character beyond the first 65,536 as a pair, which YAML takes for two. None: one stands alone."""
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        return None


def dotted(path: Path_) -> str:
    return ".".join(str(step) for step in path)


def _unreadable(error: ReaderError | YAMLStreamError, text: str, reader: _Reader) -> Problem:
    position = error.position if isinstance(error, ReaderError) else 0
    before = _LINE_BREAK.split(text[:position])
    character = text[position : position + 1]
    message = f"not YAML: the character U+{ord(character):04X} may not stand here" if character else "not YAML"
    return Problem("", message, "delete it", reader.place(len(before) - 1, len(before[-1])))


def _sentence(error: MarkedYAMLError) -> str:
    return " ".join((error.problem or error.context or "broken syntax").split())


def _advice(text: str, place: Place | None) -> str:
    if place is not None and "\t" in place.text:
        return "indent with spaces; YAML knows no tabs"
    if re.search(r"^---\s", text, re.MULTILINE) and place is not None and place.text.startswith("---"):
        return "one document per file"
    return "look for a missing colon, quote or bracket here or just above"
