"""Numbers of parameters and bytes, in few digits for people."""

from __future__ import annotations


def in_short(count: int) -> str:
    """Such as 2.13 B or 1.1 M."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def in_bytes(size: int) -> str:
    """Such as 4.26 GB or 5.3 MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
