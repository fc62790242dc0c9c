"""Write the generated pages: docs/config.md and configs/schema.json from the schema, docs/architectures.md from proofs.

python scripts/docs.py            write them all (the architectures take about a minute)
python scripts/docs.py --check    exit 1 if the pages made from the schema aren't current; takes a second
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_cli.config import config_schema

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = {
    "model": "ModelConfig",
    "model.quantization": "QuantizationConfig",
    "adapter": "AdapterConfig",
    "data": "DataConfig",
    "data.train[]": "Source",
    "train": "TrainConfig",
    "sweep": "SweepConfig",
    "sweep.halving": "HalvingConfig",
}


def main() -> None:
    schema = config_schema()
    pages = {
        ROOT / "configs" / "schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
        ROOT / "docs" / "config.md": "\n".join(config_page(schema)) + "\n",
    }
    if "--check" in sys.argv[1:]:
        stale = [path for path, text in pages.items() if not path.exists() or path.read_text("utf-8") != text]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not current: make docs", file=sys.stderr)
        sys.exit(bool(stale))
    for path, text in pages.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, str(ROOT / "scripts" / "architectures.py")], check=True)


def config_page(schema: dict[str, Any]) -> Iterator[str]:
    """Every setting with its type, default and meaning, section by section."""
    yield "# The config"
    yield ""
    yield "Generated from the schema by `make docs`. Names are those of PEFT's `LoraConfig` and transformers'"
    yield "`TrainingArguments` wherever one exists. A setting without a default must be given."
    for section, definition in SECTIONS.items():
        found = schema["$defs"][definition]
        required = found.get("required", ())
        yield ""
        yield f"## {section}"
        yield ""
        yield found["description"]
        yield ""
        yield "| setting | type | default | meaning |"
        yield "|---|---|---|---|"
        for name, field in found["properties"].items():
            default = "" if name in required else f"`{shown(field.get('default'))}`"
            yield f"| `{name}` | {kind(field)} | {default} | {field.get('description', '').replace('|', '/')} |"
    yield ""
    yield "## output_dir"
    yield ""
    yield schema["properties"]["output_dir"]["description"]


def kind(field: dict[str, Any]) -> str:
    """The type of a setting, in words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(kind(option) for option in field["anyOf"]))
    if "$ref" in field:
        return "section"
    if "enum" in field:
        return ", ".join(f"`{shown(value)}`" for value in field["enum"])
    if "const" in field:
        return f"`{shown(field['const'])}`"
    if field.get("type") == "array":
        return f"list of {kind(field['items'])}"
    name: str = field.get("type", "any")
    return "mapping" if name == "object" else name


def shown(value: Any) -> str:
    """A value as YAML would have it."""
    return json.dumps(value)


if __name__ == "__main__":
    main()
