"""The cards that people rent or own: how much memory PyTorch sees on each, and its architecture.

The figures are meant to be those that PyTorch reports as total capacity, some hundred MiB under the marketing figure;
drivers and ECC move them a little. They come from public reports and none has been measured by this project:
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

    @property
    def memory_bytes(self) -> int:
        return int(self.gib * GIB)


CARDS = tuple(
    Card(name, gib, capability)
    for name, gib, capability in (
        ("rtx-4060-8gb", 7.63, (8, 9)),
        ("rtx-3080-10gb", 9.77, (8, 6)),
        ("rtx-2080-ti-11gb", 10.75, (7, 5)),
        ("rtx-3060-12gb", 11.76, (8, 6)),
        ("rtx-4070-12gb", 11.72, (8, 9)),
        ("t4-16gb", 14.56, (7, 5)),
        ("v100-16gb", 15.77, (7, 0)),
        ("rtx-4080-16gb", 15.70, (8, 9)),
        ("rtx-5080-16gb", 15.47, (12, 0)),
        ("a10g-24gb", 22.06, (8, 6)),
        ("l4-24gb", 22.03, (8, 9)),
        ("rtx-3090-24gb", 23.56, (8, 6)),
        ("rtx-4090-24gb", 23.53, (8, 9)),
        ("rtx-5090-32gb", 31.36, (12, 0)),
        ("v100-32gb", 31.73, (7, 0)),
        ("a100-40gb", 39.38, (8, 0)),
        ("l40s-48gb", 44.39, (8, 9)),
        ("a6000-48gb", 47.41, (8, 6)),
        ("a100-80gb", 79.14, (8, 0)),
        ("h100-80gb", 79.10, (9, 0)),
        ("h200-141gb", 139.72, (9, 0)),
        ("b200-180gb", 178.35, (10, 0)),
    )
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
