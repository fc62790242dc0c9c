"""`lora sweep`: many adapters trained at the same time on one frozen base. Emits events; never prints."""

from lora_cli.sweep.run import sweep

__all__ = ["sweep"]
