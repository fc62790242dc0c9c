"""The JSON Schema of the config: for editors, for `lora schema`, and for the words in errors."""

from __future__ import annotations

from typing import Any

from lora_cli.config.schema import Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def config_schema() -> dict[str, Any]:
    """The schema, without the titles that pydantic makes out of field names."""
    return {"$schema": DIALECT, "title": "lora config", **_untitled(Config.model_json_schema())}


def _untitled(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_untitled(item) for item in schema]
    if isinstance(schema, dict):
        kept = {key: value for key, value in schema.items() if not (key == "title" and isinstance(value, str))}
        return {key: _untitled(value) for key, value in kept.items()}
    return " ".join(schema.split()) if isinstance(schema, str) else schema
