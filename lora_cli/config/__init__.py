"""The config: what a YAML file may say, how it is read, and what it says in full.

    schema           every field, with type, range, default and documentation
    contradictions   rules between fields
    load             file and overrides -> Config, or all mistakes at once
    grid             file with a grid -> the Configs of a sweep's members
    resolved         Config -> complete YAML
    starter          the file that `lora init` writes

Imports pydantic and ruamel.yaml and nothing heavier: a broken config is refused before torch is loaded.
"""

from lora_cli.config.grid import Grid, MemberConfig, load_grid
from lora_cli.config.json_schema import config_schema
from lora_cli.config.load import load_config
from lora_cli.config.resolved import dump_config
from lora_cli.config.schema import (
    AdapterConfig,
    Config,
    DataConfig,
    HalvingConfig,
    ModelConfig,
    QuantizationConfig,
    Source,
    SweepConfig,
    TrainConfig,
)
from lora_cli.config.starter import starter_config

__all__ = [
    "AdapterConfig",
    "Config",
    "DataConfig",
    "Grid",
    "HalvingConfig",
    "MemberConfig",
    "ModelConfig",
    "QuantizationConfig",
    "Source",
    "SweepConfig",
    "TrainConfig",
    "config_schema",
    "dump_config",
    "load_config",
    "load_grid",
    "starter_config",
]
