"""Whether the hub can be reached, found out once and quickly.

Without network the hub's client tries again for half a minute before it says so. Asked beforehand, it looks in its
cache at once, and says what is missing.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

_SECONDS = 3.0
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def stay_offline_without_network(names: list[str]) -> None:
    """If one of `names` is a hub id and the hub can't be reached, set HF_HUB_OFFLINE before its client is imported."""
    if os.environ.get("HF_HUB_OFFLINE") or all(Path(name).expanduser().exists() for name in names):
        return
    if any(os.environ.get(name) for name in _PROXIES):  # a proxy may reach what we can't
        return
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=_SECONDS).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        print(f"  !  {address.hostname} can't be reached: only what its cache holds is used", file=sys.stderr)
