"""`lora train`: the loop, its checkpoints, and going on after a stop. Emits events; never prints."""

from lora_cli.train.run import train

__all__ = ["train"]
