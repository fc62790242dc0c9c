"""Access tokens and passwords: found wherever they stand in a config, and never shown.

A config is copied into every run folder, so a secret in one is a mistake; the error about it must not
print it.
"""

from __future__ import annotations

import re

_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\b(?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{20,}"  # GitHub
    r"|\bsk-[A-Za-z0-9_-]{16,}"  # OpenAI, Anthropic
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # Amazon
    r"|\bAIza[A-Za-z0-9_-]{30,}"  # Google
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|(?<=://)[^\s/@'\"]+@"  # user:password@ in a URL
    r"|(?<=[?&])(?:token|access_token|api_key|sig|signature)=[^&\s'\"]+",
    re.IGNORECASE,
)
_NAMED = re.compile(
    r"""(\b\w*(?:api_?key|_token|secret|secret_key|passw(?:or)?d)["']?[ \t]*[:=][ \t]*)([^\s,}\]][^,}\]\n]*)""",
    re.IGNORECASE,
)
"""What stands behind a name that says what it is, of whatever form: no key of ours has such a name."""


def holds_secret(text: str) -> bool:
    return _SECRET.search(text) is not None


def redact(text: str) -> str:
    """`text` with every secret starred out, at the same length so that columns still count."""
    text = _NAMED.sub(lambda match: match[1] + "*" * len(match[2]), text)
    return _SECRET.sub(lambda match: "*" * len(match.group()), text)
