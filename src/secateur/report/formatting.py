"""Numbers -> text: counts, shares, bytes, times, changes and their significance."""

from __future__ import annotations

import re

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
ARROW = "\N{RIGHTWARDS ARROW}"
# What HTML cannot hold (control characters, lone surrogates), and what turns the direction of all text after it.
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)


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


def format_rate(tokens_per_second: float) -> str:
    """Tokens per second.

    >>> format_rate(12.34)
    '12.3 tokens/s'
    """
    return f"{tokens_per_second:.1f} tokens/s"


def format_with_error(value: float, error: float | None, form: str, scale: float = 1.0) -> str:
    """A value and its standard error, both times `scale`.

    >>> format_with_error(0.25, 0.01, "+.2f"), format_with_error(0.25, None, ".1f", 100.0)
    ('+0.25 ± 0.01', '25.0')
    """
    return f"{scale * value:{form}}" + ("" if error is None else f" ± {scale * error:{form.lstrip('+')}}")


def format_signed(value: float, text: str) -> str:
    r"""A difference with its sign, which is that of the rounded text.

    >>> ascii(format_signed(-1.5, "1.5")), format_signed(0.001, "0.0"), format_signed(2, "2.0")
    ("'\\u22121.5'", '0.0', '+2.0')
    """
    if not any(digit in "123456789" for digit in text):
        return text
    return f"{MINUS if value < 0 else '+'}{text}"


def format_change(before: float | None, after: float | None) -> str:
    r"""A change in percent; nothing where there is no number to compare with.

    >>> format_change(1, 3), format_change(None, 3), ascii(format_change(100, 84.2)), ascii(format_change(100, 250_000))
    ('+200 %', '', "'\\u221215.8 %'", "'\\xd7 2,500'")
    """
    if before is None or after is None or before == 0:
        return ""
    share = 100 * (after / before - 1)
    if share >= 1000:
        return f"{TIMES} {after / before:,.0f}"
    return format_signed(share, f"{abs(share):.1f}" if abs(share) < 99.95 else f"{abs(share):.0f}") + " %"


def format_perplexity(value: float | None) -> str:
    """A perplexity; null in JSON is infinite.

    >>> format_perplexity(12.345), format_perplexity(8.7e6), format_perplexity(None)
    ('12.35', '8.7e+06', 'infinite')
    """
    if value is None:
        return "infinite"
    return f"{value:.2f}" if value < 10_000 else f"{value:.2g}"


def format_seconds(value: float) -> str:
    """A time of a forward pass.

    >>> format_seconds(0.0123), format_seconds(2.5)
    ('12.3 ms', '2.50 s')
    """
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def format_accuracy(share: float) -> str:
    """A share of right answers.

    >>> format_accuracy(0.4512)
    '45.1 %'
    """
    return f"{100 * share:.1f} %"


def format_p_value(p: float | None) -> str:
    """A significance.

    >>> format_p_value(0.0312), format_p_value(1e-5), format_p_value(None)
    ('p = 0.031', 'p < 0.001', '')
    """
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def printable(text: str) -> str:
    r"""A text with a replacement character for each that a page cannot hold.

    >>> printable("a\x00b") == "a\N{REPLACEMENT CHARACTER}b"
    True
    """
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
