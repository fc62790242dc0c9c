"""`python -m lora_cli`, and what `torchrun -m lora_cli` starts on every device."""

from __future__ import annotations

from lora_cli.cli import main

if __name__ == "__main__":
    main()
