"""The libraries that training, planning and evaluation need, imported at once."""

from __future__ import annotations

import gc
import sys

from lora_cli.report.events import Emit, Working, ignore


def load_libraries(emit: Emit = ignore) -> None:
    """Import PyTorch, transformers and PEFT while the garbage collector stands still, and have it pass over them later.

    They leave half a million objects that stay: to look for garbage among them takes a fifth of the imports' time.
    """
    if "peft" in sys.modules:
        return
    emit(Working("loading PyTorch and transformers"))
    enabled = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
        from peft import PeftModel  # noqa: F401 - with all that it imports
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    finally:
        if enabled:
            gc.enable()
    gc.freeze()
