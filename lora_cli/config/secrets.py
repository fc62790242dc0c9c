"""Access tokens and passwords: found wherever they stand in a config, and never shown.

A config is copied into every run folder, so a secret in one is a mistake; the error about it must not
print it.
"""

from __future__ import annotations

import re

_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}"  # GitHub
    r"|(?<=://)[^\s/@'\"]+@"  # user:password@ in a URL
    r"|(?<=[?&])(?:token|access_token|api_key|sig|signature)=[^&\s'\"]+",
    re.IGNORECASE,
)


def holds_secret(text: str) -> bool:
    return _SECRET.search(text) is not None


def redact(text: str) -> str:
    """`text` with every secret starred out, at the same length so that columns still count."""
    return _SECRET.sub(lambda match: "*" * len(match.group()), text)
