"""Charts as SVG: pure functions from numbers to markup.

Colours, fonts and line widths are classes of template/charts.css, so a chart follows the colour scheme of the page.
Series differ in colour, dashes and markers. A chart is as wide as a small screen and scales up, never down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

CHART_STYLE = Path(__file__).parent / "template/charts.css"
WIDTH, HEIGHT = 340, 246
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 26, 40
MARKERS = ("circle", "square", "triangle", "diamond")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A curve. `colour` also decides its dashes and markers; a faint one is a thin line without markers."""

    name: str
    points: Points
    colour: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Axis:
    """A range of values on a line of pixels, with a tick every `step`; the logarithm of the values without a step."""

    low: float
    high: float
    step: float | None = None

    @classmethod
    def around(cls, values: Sequence[float], *, zero: bool = False, log: bool = False) -> Axis:
        """A range that holds all finite values, with round ends; with `zero` it starts or ends there."""
        finite = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
        low, high = min(finite), max(finite)
        if log:
            return cls(low / 1.15, high * 1.15)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            half = max(0.5, abs(low) / 2)
            low, high = low - half, high + half
        step = _round_step(high - low)
        return cls(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step)

    def share(self, value: float) -> float:
        """Where `value` lies, from 0 to 1."""
        if self.step is None:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        if self.step is not None:
            return [self.low + i * self.step + 0.0 for i in range(round((self.high - self.low) / self.step) + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        digits = (1, 2, 5) if len(powers) <= 4 else (1,)
        found = [digit * 10.0**power for power in powers[:: max(1, len(powers) // 8)] for digit in digits]
        return [value for value in found if self.low <= value <= self.high]


def _round_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, about a fifth of the span."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= span / 5 * 0.999)


def number(value: float) -> str:
    """A tick's number: 0.25, 1,200, 12k, 5e-5."""
    if 1e-10 < abs(value) < 0.001:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    if abs(value) >= 10_000:
        return f"{value / 1e6:.3g}M" if abs(value) >= 1e6 else f"{value / 1e3:.3g}k"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 10):.3g}"


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, always_linear: bool = False
) -> Markup:
    """Curves over a number, such as the step.

    The y axis is logarithmic if the values span more than a factor of 20, unless it is `always_linear`.
    """
    values = [y for each in series for _, y in each.points]
    log = not always_linear and min(values, default=0.0) > 0 and max(values) / min(values) > 20
    x = Axis.around([x for each in series for x, _ in each.points], zero=True)
    y = Axis.around(values, log=log)
    parts = [_axes(x_label, y_label + (" (log scale)" if log else ""), y), _x_ticks(x)]
    return _svg(title, [*parts, *_curves(series, x, y)])


def category_chart(
    edges: Sequence[str], counts: Sequence[int], series: Sequence[Series], *, title: str, x_label: str, y_label: str
) -> Markup:
    """Values by bin, whose number is the x of a point, with the number of tokens in each as grey bars behind them.

    Args:
        edges: lower end of each bin.
    """
    x = Axis(-0.5, len(edges) - 0.5, 1.0)
    y = Axis.around([value for each in series for _, value in each.points], zero=True)
    wide = (WIDTH - LEFT - RIGHT) / max(1, len(edges))
    most = max(max(counts, default=0), 1)
    bottom = HEIGHT - BOTTOM
    parts = []
    for i, count in enumerate(counts):
        tall = (bottom - TOP) * count / most
        parts.append(_tag("rect", "count", x=LEFT + wide * (i + 0.1), y=bottom - tall, width=wide * 0.8, height=tall))
    parts.append(_axes(x_label, y_label, y))
    for i, edge in enumerate(edges):
        parts.append(_text(edge, LEFT + wide * i, bottom + 14, "tick x"))
    return _svg(title, [*parts, *_curves(series, x, y)])


def reliability_chart(series: Sequence[Series], *, title: str, x_label: str, y_label: str) -> Markup:
    """Share of right predictions over confidence, with the diagonal of a calibrated model."""
    x = y = Axis(0.0, 1.0, 0.2)
    (x0, y0), (x1, y1) = _place(x, y, 0.0, 0.0), _place(x, y, 1.0, 1.0)
    parts = [_axes(x_label, y_label, y), _x_ticks(x), _tag("line", "diagonal", x1=x0, y1=y0, x2=x1, y2=y1)]
    return _svg(title, [*parts, *_curves(series, x, y)])


def key(colour: int) -> Markup:
    """Line and marker of a series, for a legend."""
    sample = _curve([(2, 7), (26, 7)], f"curve s{colour % 7} d{colour % 4}") + _marker(14, 7, colour)
    return Markup('<svg class="key" viewBox="0 0 28 14" width="28" height="14" aria-hidden="true">{}</svg>').format(
        sample
    )


def as_file(chart: Markup) -> str:
    """The contents of an SVG file that shows a chart, in light or dark colours as the reader prefers."""
    head, _, body = str(chart).removeprefix("<svg ").partition(">")
    size = f'width="{2 * WIDTH}" height="{2 * HEIGHT}"'
    style = CHART_STYLE.read_text(encoding="utf-8")
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {head}>\n<style>\n{style}</style>\n{body}\n'


def _svg(title: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, title, Markup("").join(parts)
    )


def _place(x: Axis, y: Axis, a: float, b: float) -> tuple[float, float]:
    return LEFT + x.share(a) * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y.share(b) * (HEIGHT - TOP - BOTTOM)


def _axes(x_label: str, y_label: str, y: Axis) -> Markup:
    """Labels, that of y above its axis, and a grid line with its number at every tick of y."""
    parts = []
    for tick in y.ticks:
        at = HEIGHT - BOTTOM - y.share(tick) * (HEIGHT - TOP - BOTTOM)
        parts.append(_tag("line", "grid", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at))
        parts.append(_text(number(tick), LEFT - 5, at + 3.5, "tick y"))
    parts.append(_text(x_label, LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 4, "label"))
    parts.append(_text(y_label, 4, TOP - 13, "label y"))
    return Markup("").join(parts)


def _x_ticks(x: Axis) -> Markup:
    parts = []
    for tick in x.ticks:
        at = LEFT + x.share(tick) * (WIDTH - LEFT - RIGHT)
        parts.append(_text(number(tick), at, HEIGHT - BOTTOM + 14, "tick x"))
    return Markup("").join(parts)


def _curves(series: Sequence[Series], x: Axis, y: Axis) -> list[Markup]:
    parts = []
    for each in series:
        places = [_place(x, y, *point) for point in each.points]
        kind = f"curve s{each.colour % 7} " + ("faint" if each.faint else f"d{each.colour % 4}")
        parts.append(_curve(places, kind))
        if not each.faint:
            parts += [_marker(*place, each.colour) for place in places]
    return parts


def _curve(places: Points, kind: str) -> Markup:
    return Markup('<polyline class="{}" points="{}"/>').format(kind, " ".join(f"{x:.1f},{y:.1f}" for x, y in places))


def _marker(x: float, y: float, series: int) -> Markup:
    kind, name = f"mark s{series % 7}", MARKERS[series % len(MARKERS)]
    if name == "circle":
        return _tag("circle", kind, cx=x, cy=y, r=3)
    if name == "square":
        return _tag("rect", kind, x=x - 2.8, y=y - 2.8, width=5.6, height=5.6)
    corners = [(0, -3.8), (3.6, 2.8), (-3.6, 2.8)] if name == "triangle" else [(0, -4), (4, 0), (0, 4), (-4, 0)]
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return Markup('<polygon class="{}" points="{}"/>').format(kind, path)


def _tag(name: str, kind: str, **numbers: float) -> Markup:
    attributes = Markup("").join(Markup(' {}="{:.1f}"').format(key, value) for key, value in numbers.items())
    return Markup('<{} class="{}"{}/>').format(Markup(name), kind, attributes)


def _text(text: str, x: float, y: float, kind: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, text)
