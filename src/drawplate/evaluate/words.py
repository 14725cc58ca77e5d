"""Figures and foreign strings as the report writes them."""

from __future__ import annotations

from collections.abc import Callable

_UNITS = ("", "k", "M", "G", "T")


def fixed(value: float) -> str:
    """Four digits behind the point."""
    return f"{value:.4f}"


def tenth(value: float) -> str:
    """One digit behind the point."""
    return f"{value:.1f}"


def percent(value: float) -> str:
    """A share of one as percent."""
    return f"{100 * value:.1f}%"


def round_percent(value: float) -> str:
    """A share of one as percent, without digits that say nothing.

    >>> round_percent(0.25), round_percent(0.125)
    ('25%', '12.5%')
    """
    return f"{round(100 * value, 6):g}%"


def small(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def brief(value: float) -> str:
    """Three significant digits, thousands with a unit."""
    return small(value) if abs(value) < 1000 else f"{'-' if value < 0 else ''}{count(abs(value))}"


def count(value: float) -> str:
    """Three significant digits with a unit of thousands.

    >>> count(1376256), count(80.57), count(999.9)
    ('1.38 M', '80.6', '1 k')
    """
    unit = 0
    while float(f"{value:.3g}") >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{float(f'{value:.3g}'):g} {_UNITS[unit]}".rstrip()


def size(value: float) -> str:
    """Bytes with a decimal unit.

    >>> size(5509632), size(12)
    ('5.51 MB', '12 B')
    """
    short = count(value)
    return f"{short}B" if short[-1].isalpha() else f"{short} B"


def p_value(value: float) -> str:
    """A probability; very small ones as a bound."""
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def maybe(value: float | None) -> str:
    """One digit behind the point, or a dash for what does not exist."""
    return "–" if value is None else tenth(value)


def signed(style: Callable[[float], str], value: float) -> str:
    """The size of a difference in `style`, with its sign; of shares without the percent sign."""
    shown = style(abs(value)).removesuffix("%")
    if not any(digit in "123456789" for digit in shown):
        return shown
    return f"{'+' if value > 0 else '−'}{shown}"


def span(style: Callable[[float], str], low: float, high: float) -> str:
    """From low to high, the percent sign once."""
    return f"{style(low).removesuffix('%')}–{style(high)}"


def label(metric: str) -> str:
    """What a metric is called on the page."""
    if metric.startswith("pass_at_"):
        return f"pass@{metric.removeprefix('pass_at_')}"
    named = {
        "greedy": "solved (greedy)",
        "length": "tokens of an answer",
        "truncated": "answers cut off",
    }
    return named.get(metric, metric.replace("_", " "))


def visible(text: str) -> str:
    """The text with each character that cannot be seen as ⟨hex⟩; space, tab and line break stay.

    Such are control characters, those that turn the direction of writing, and lone surrogates.

    >>> visible("a" + chr(0) + "b")
    'a⟨0⟩b'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else f"⟨{ord(c):X}⟩" for c in text)
