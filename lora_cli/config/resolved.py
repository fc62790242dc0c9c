"""A `Config` as complete YAML: what a run folder keeps, and what repeats the run from anywhere.

Relative paths become absolute. Loading the text again gives the same config, apart from that.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from lora_cli.config.schema import Config, Source
from lora_cli.config.secrets import redact

_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".gz", ".zst", ".bz2", ".xz", ".zip")


def dump_config(config: Config, *, given_only: bool = False) -> str:
    """Every field of `config`, in the schema's order, as YAML 1.2.

    Args:
        given_only: without defaults, of which some follow from other settings.
    """
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.width = 10_000
    yaml.indent(mapping=2, sequence=4, offset=2)
    text = io.StringIO()
    yaml.dump(_plain(with_absolute_paths(config).model_dump(exclude_unset=given_only)), text)
    return redact(text.getvalue())


def with_absolute_paths(config: Config) -> Config:
    """`config` without any path that depends on the working directory."""
    model = config.model.model_copy(update={"name_or_path": _absolute(config.model.name_or_path)})
    adapter = config.adapter
    if adapter is not None and adapter.path is not None:
        adapter = adapter.model_copy(update={"path": _absolute(adapter.path)})
    data: dict[str, Any] = {"train": _sources(config.data.train)}
    if isinstance(config.data.validation, tuple):
        data["validation"] = _sources(config.data.validation)
    if config.data.chat_template is not None:
        data["chat_template"] = str(Path(config.data.chat_template).absolute())
    return config.model_copy(
        update={
            "model": model,
            "adapter": adapter,
            "data": config.data.model_copy(update=data),
            "output_dir": str(Path(config.output_dir).absolute()),
        }
    )


def _sources(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    return tuple(source.model_copy(update={"path": _absolute(source.path)}) for source in sources)


def _absolute(path_or_id: str) -> str:
    """A path as absolute; a hub id as it is. What exists here, looks relative or ends like data is a path."""
    local = (
        path_or_id.startswith(("./", "../")) or path_or_id.lower().endswith(_DATA_SUFFIXES) or Path(path_or_id).exists()
    )
    return str(Path(path_or_id).absolute()) if local else path_or_id


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return value


class _Representer(RoundTripRepresenter):
    """Null as `null` and 1e-08 as `1.0e-08`, which YAML 1.1 readers understand as well."""


def _null(representer: _Representer, _: None) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _float(representer: _Representer, value: float) -> Any:
    mantissa, e, exponent = repr(value).partition("e")
    written = f"{mantissa}{'' if '.' in mantissa else '.0'}{e}{exponent}"
    return representer.represent_scalar("tag:yaml.org,2002:float", written)


_Representer.add_representer(type(None), _null)
_Representer.add_representer(float, _float)
