"""What holds for all tests: no hub, and libraries as quiet as the command line makes them.

Both are read once, when the libraries are first imported, so they are said here, before any test module is.
"""

from __future__ import annotations

import os

from lora_cli.cli.quiet import quiet_libraries

os.environ["HF_HUB_OFFLINE"] = "1"
quiet_libraries()
