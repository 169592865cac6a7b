"""Numbers as people read them: counts, shares, bytes and ratios."""

from __future__ import annotations


def format_count(count: int) -> str:
    """A count with two decimals and the suffix of its size.

    >>> format_count(5415936000), format_count(512)
    ('5.42 B', '512')
    """
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.2f} {suffix}"
    return str(count)


def format_percent(share: float) -> str:
    """A share with one decimal; only nothing is 0%, and only all is 100%.

    >>> format_percent(0.25), format_percent(0.99999), format_percent(1e-6), format_percent(1.0)
    ('25.0%', '>99.9%', '<0.1%', '100%')
    """
    if share in (0, 1):
        return f"{share:.0%}"
    if share < 0.0005:
        return "<0.1%"
    return ">99.9%" if share > 0.9995 else f"{share:.1%}"


def format_macs(count: int) -> str:
    """Multiply-accumulates, in billions as the literature has them; those of tiny models in millions.

    >>> format_macs(339_602_636_800), format_macs(5_320_000)
    ('339.60 G', '5.32 M')
    """
    return f"{count / 1e9:.2f} G" if count >= 10**8 else f"{count / 1e6:.2f} M"


def format_bytes(count: int) -> str:
    """Bytes in binary units.

    >>> format_bytes(538_060_032)
    '513.1 MiB'
    """
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
