"""The cards that people rent or own: how much memory PyTorch sees on each, and its architecture.

PyTorch sees less than nvidia-smi, by what the driver keeps: an H100 has 81,559 MiB there (modal-labs/modal-client#2797)
and 79.11 GiB here. The figures are those of PyTorch's own errors, "GPU 0 has a total capacity of ... GiB", the lowest
that were found; drivers and ECC move them a little. The H200 alone has been measured by this project:
`torch.cuda.mem_get_info` tells the truth of a card at hand, and `train` asks it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from lora_cli.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Card:
    name: str
    gib: float
    """Memory that PyTorch sees."""
    capability: tuple[int, int]
    source: str = ""
    """Who says so: `measured` by this project, an issue on GitHub, or `logs`, where public logs and notes name the card
    beside the figure and a search of GitHub's code finds them. Empty: common on cards of this size, and no report names
    this one."""

    @property
    def memory_bytes(self) -> int:
        return int(self.gib * GIB)


CARDS = (
    Card("rtx-4060-8gb", 7.60, (8, 9)),
    Card("rtx-3080-10gb", 9.62, (8, 6), "logs"),
    Card("rtx-2080-ti-11gb", 10.56, (7, 5)),
    Card("rtx-3060-12gb", 11.63, (8, 6), "logs"),
    Card("rtx-4070-12gb", 11.62, (8, 9)),
    Card("t4-16gb", 14.56, (7, 5), "Zheng-Chong/CatVTON#133"),
    Card("v100-16gb", 15.77, (7, 0)),
    Card("rtx-4080-16gb", 15.57, (8, 9)),
    Card("rtx-5080-16gb", 15.45, (12, 0)),
    Card("a10g-24gb", 22.06, (8, 6), "logs, of an A10"),
    Card("l4-24gb", 22.03, (8, 9), "logs"),
    Card("rtx-3090-24gb", 23.56, (8, 6), "logs"),
    Card("rtx-4090-24gb", 23.52, (8, 9), "logs"),
    Card("rtx-5090-32gb", 31.34, (12, 0), "logs"),
    Card("v100-32gb", 31.73, (7, 0), "logs"),
    Card("a100-40gb", 39.38, (8, 0), "TianheWu/CoSeR#10, 39.50 there"),
    Card("l40s-48gb", 44.39, (8, 9), "logs"),
    Card("a6000-48gb", 47.40, (8, 6)),
    Card("a100-80gb", 79.14, (8, 0), "vllm-project/vllm#4408, 79.15 there"),
    Card("h100-80gb", 79.11, (9, 0), "vllm-project/vllm#27508"),
    Card("h200-141gb", 139.80, (9, 0), "measured"),
    Card("b200-180gb", 178.35, (10, 0), "logs"),
)


def find_card(name: str) -> Card:
    """The card that a name means: `rtx-4090`, `RTX 4090`, `a100-80gb`; of several sizes, one must be named.

    Raises:
        UserError: no card, or more than one, has this name.
    """
    wanted = _plain(name)
    found = [card for card in CARDS if wanted in (_plain(card.name), _plain(card.name.rpartition("-")[0]))]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"--gpu {name}: there are several", remedy=f"Say which: {', '.join(card.name for card in found)}."
        )
    known = {_plain(card.name): card.name for card in CARDS}
    near = [known[match] for match in get_close_matches(wanted, known, n=3, cutoff=0.5)]
    near = near or [card.name for card in CARDS if wanted and wanted in _plain(card.name)]
    raise UserError(
        f"--gpu {name}: no such card is known",
        remedy=(f"Did you mean {' or '.join(near)}? " if near else f"Known: {', '.join(c.name for c in CARDS)}. ")
        + "For any other, give its memory: --vram 24",
    )


def _plain(name: str) -> str:
    """`NVIDIA GeForce RTX 4090` and `rtx-4090` alike."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
