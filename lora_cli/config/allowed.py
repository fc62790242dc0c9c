"""What a config allows at a key, in words, read from its JSON Schema.

`a number above 0, such as 2.0e-4`; `nf4, fp4 or int8`; `a mapping with path, split, ...`. Knows JSON
Schema as pydantic writes it and nothing of YAML or of errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

Schema = dict[str, Any]


class Allowed:
    """Answers about one schema."""

    def __init__(self, schema: Schema) -> None:
        self.root = schema

    def at(self, path: Iterable[str | int]) -> list[Schema]:
        """The alternatives at a path; none where the schema has nothing."""
        found = self._alternatives(self.root)
        for step in path:
            found = [inner for outer in found for inner in self._inside(outer, step)]
        return found

    def keys(self, path: Iterable[str | int]) -> list[str]:
        """The keys of the section at `path`."""
        return [key for schema in self.at(path) for key in schema.get("properties", {})]

    def everywhere(self) -> dict[str, list[str]]:
        """Each key of each section, with the dotted paths it has. Sources count once."""
        found: dict[str, list[str]] = {}
        for section in ("", "model", "model.quantization", "adapter", "data", "train"):
            for key in self.keys(section.split(".") if section else ()):
                found.setdefault(key, []).append(f"{section}.{key}" if section else key)
        return found

    def description(self, path: tuple[str | int, ...]) -> str:
        """The first sentence of the key's documentation."""
        own = [each["properties"].get(path[-1], {}) for each in self._raw(path[:-1])]
        texts = [schema["description"] for schema in [*own, *self.at(path)] if "description" in schema]
        return str(texts[0]).split(". ")[0].rstrip(".") if texts else ""

    def default(self, path: tuple[str | int, ...]) -> Any:
        """What the key is when it isn't given."""
        return next((each["properties"].get(path[-1], {}).get("default") for each in self._raw(path[:-1])), None)

    def kind(self, path: Iterable[str | int]) -> str:
        """What a value here must be, as a noun; empty where it may be several things."""
        nouns = {_NOUNS[_type(schema)] for schema in self.at(path) if _type(schema) != "null"}
        return nouns.pop() if len(nouns) == 1 else ""

    def choices(self, path: Iterable[str | int]) -> list[str]:
        """The words that are allowed here by name."""
        return [word for schema in self.at(path) for word in _choices(schema) if isinstance(word, str)]

    def words(self, path: tuple[str | int, ...]) -> str:
        """Everything that is allowed here."""
        schemas = self.at(path)
        parts: list[str] = []
        for schema in schemas:
            for part in self._words(schema, alone=len(schemas) == 1):
                items = part.removeprefix("a list of ")
                parts.append("a list of them" if items != part and items == _joined(parts[-2:]) else part)
        example = self._example(path)
        return _joined(list(dict.fromkeys(parts))) + (f", such as {example}" if example else "")

    def _example(self, path: tuple[str | int, ...]) -> str:
        default = self.default(path)
        return number(default) if isinstance(default, float) and default else ""

    def _raw(self, path: Iterable[str | int]) -> list[Schema]:
        return [schema for schema in self.at(path) if "properties" in schema]

    def _alternatives(self, schema: Schema) -> list[Schema]:
        if "$ref" in schema:
            schema = self.root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
        if "anyOf" in schema:
            return [found for inner in schema["anyOf"] for found in self._alternatives(inner)]
        return [schema]

    def _inside(self, schema: Schema, step: str | int) -> Iterator[Schema]:
        if isinstance(step, int):
            inner = schema.get("items")
        else:
            inner = schema.get("properties", {}).get(step, schema.get("additionalProperties"))
        if isinstance(inner, dict):
            yield from self._alternatives(inner)

    def _words(self, schema: Schema, *, alone: bool) -> list[str]:
        if choices := _choices(schema):
            return [_word(choice) for choice in choices]
        kind = _type(schema)
        if kind == "array":
            inner = [word for item in self._alternatives(schema["items"]) for word in self._words(item, alone=False)]
            return [f"a list of {_joined(inner)}"]
        if kind == "object" and "properties" in schema:
            keys = list(schema["properties"])
            return [f"a mapping with {', '.join(keys)}" if alone else f"{{{', '.join(keys[:3])}, ...}}"]
        if kind == "boolean":
            return ["true", "false"]
        return [f"{_NOUNS[kind]}{_range(schema)}"]


def near(word: str, words: Iterable[str]) -> str | None:
    """The one of `words` that was probably meant."""
    lower = {candidate.lower(): candidate for candidate in words}
    matches = get_close_matches(word.lower().replace("-", "_"), lower, n=1, cutoff=0.7)
    return lower[matches[0]] if matches else None


def number(value: float) -> str:
    """A number as YAML examples show it: `2.0e-4` rather than `0.0002`."""
    if value != 0 and abs(value) < 1e-2:
        digits, exponent = f"{value:e}".split("e")
        digits = digits.rstrip("0")
        return f"{digits}{'0' if digits.endswith('.') else ''}e{int(exponent)}"
    return f"{value:g}" if value != int(value) else f"{value:.1f}"


_NOUNS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}


def _type(schema: Schema) -> str:
    return str(schema.get("type", "string"))


def _choices(schema: Schema) -> list[Any]:
    return [schema["const"]] if "const" in schema else list(schema.get("enum", ()))


def _word(choice: Any) -> str:
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def _range(schema: Schema) -> str:
    bounds = {
        "minimum": "of {} or more",
        "exclusiveMinimum": "above {}",
        "maximum": "up to {}",
        "exclusiveMaximum": "below {}",
    }
    parts = [words.format(_bound(schema[name])) for name, words in bounds.items() if name in schema]
    return " " + " and ".join(parts) if parts else ""


def _bound(value: float) -> str:
    return "2**32" if value == 2**32 else f"{value:g}"


def _joined(parts: list[str]) -> str:
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} or {parts[-1]}"
