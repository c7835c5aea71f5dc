"""Numbers in words for people, the same in terminals, tables and pages."""

from __future__ import annotations

from collections.abc import Sequence


def amount(number: float) -> str:
    """1234567 → 1.235M."""
    return _scaled(number, 1000, ("", "K", "M", "G", "T"))


def size(nbytes: float) -> str:
    """Bytes in powers of 1024."""
    return _scaled(nbytes, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def percent(share: float) -> str:
    return f"{share:.2%}".replace("%", " %")


def tiny(number: float) -> str:
    """3.1e-13; 0 is exactly that."""
    return f"{number:.1e}" if number else "0"


def duration(seconds: float) -> str:
    """1.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _scaled(value: float, step: int, units: Sequence[str]) -> str:
    *smaller, largest = units
    for unit in smaller:
        if value < step:
            return f"{value:.4g}{unit}"
        value /= step
    return f"{value:.4g}{largest}"
