"""Numbers as people read them: one spelling for each kind of quantity, on screens and in report.html.

Sizes are binary and say so (GiB, MiB); a "GB" is only ever part of a card's name. Knows nothing about layout.
"""

from __future__ import annotations

import math

KIB = 2**10
MIB = 2**20
GIB = 2**30


def counts(number: int) -> str:
    """`8,030,261,248`"""
    return f"{number:,}"


def counted(number: int, noun: str) -> str:
    """`1 row`, `12,467 rows`"""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def gib(size_bytes: float, digits: int = 1) -> str:
    """`11.4 GiB`, whatever the size: for figures that are compared with each other."""
    return f"{size_bytes / GIB:,.{digits}f} GiB"


def size(size_bytes: float) -> str:
    """`312 KiB`, `480 MiB`, `14.9 GiB`: three digits or so, in the unit that suits."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        # 1023.7 MiB rounds to 1024 MiB, which is 1.0 GiB.
        if round(size_bytes / unit * 1024) >= 1024:
            number = size_bytes / unit
            return f"{number:,.0f} {name}" if round(number, 1) >= 100 else f"{number:.1f} {name}"
    return f"{size_bytes / KIB:.0f} KiB"


def percent(value: float, digits: int = 1) -> str:
    """`34.5 %`; `value` is already in percent."""
    return f"{value:.{digits}f} %"


def trainable_share(value: float) -> str:
    """`0.2364 %`: four digits, as they are quoted when adapters are compared."""
    return percent(value, 4)


def loss(value: float) -> str:
    """`1.0832`"""
    return f"{value:.4f}"


def learning_rate(value: float) -> str:
    """`9.5e-05`, `1.94e-04`, `0`: scientific, three digits at most."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"


def gradient_norm(value: float) -> str:
    """`0.41`, `12.3`, `3.1e-04`"""
    if value != 0 and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def clock(seconds: float) -> str:
    """`51:07`, `1:02:33`; `-:--` for a time that isn't known."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """`0.8 s`, `48 s`, `3 min 20 s`, `1 h 48 min`, `2 d 3 h`: two units at most."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return _two_units(whole // 60, "min", whole % 60, "s")
    whole_minutes = round(seconds / 60)
    if whole_minutes < 24 * 60:
        return _two_units(whole_minutes // 60, "h", whole_minutes % 60, "min")
    hours = round(seconds / 3600)
    return _two_units(hours // 24, "d", hours % 24, "h")


def _two_units(large: int, large_unit: str, small: int, small_unit: str) -> str:
    return f"{large:,} {large_unit} {small} {small_unit}" if small else f"{large:,} {large_unit}"
