"""What libraries say to each other stays off the screen: progress bars of their own, advice, notes on deprecation.

Our screens say what the user needs; with `--debug` everything is let through.
"""

from __future__ import annotations

import logging
import os
import warnings

_CHATTY = (
    "transformers",
    "bitsandbytes",
    "peft",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "torch.distributed",
    "lm_eval",
)


def quiet_libraries() -> None:
    """Silence what isn't an error. Call it before the libraries are imported: they read these settings once."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category)
