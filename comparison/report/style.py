"""How the plots of the comparison look, and figures to bytes.

Colours are those of Okabe and Ito, darkened or lightened until they stand out from the page; every method has a marker and a
dash pattern of its own besides, so that nothing rests on colour alone. Dashed: without training.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from comparison.report.words import METHOD_NOTES, method_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    paper: str
    ink: str
    faint: str  # text of lesser weight
    grid: str
    hues: dict[str, str]
    sequential: str  # colour map from near the paper to far from it


_LIGHT_HUES = ("#0068A8", "#C24A00", "#00795A", "#A23F84", "#B07000", "#2C8FC9", "#6B7280", "#16191D")
_DARK_HUES = ("#6AA5FF", "#FF8348", "#35CFA0", "#EE94CC", "#F2B544", "#8AD8FF", "#A1ABB8", "#F3F5F7")
_HUES = ("blue", "vermilion", "green", "purple", "orange", "sky", "grey", "ink")
LIGHT = Theme("#ffffff", "#1b1f24", "#59616b", "#d9dee4", dict(zip(_HUES, _LIGHT_HUES, strict=True)), "viridis_r")
DARK = Theme("#14181d", "#e8ecf0", "#a2acb7", "#323a43", dict(zip(_HUES, _DARK_HUES, strict=True)), "viridis")

# Hue and marker; in the order of legends.
_MARKS = {
    "rtn": ("grey", "X"),
    "mse": ("sky", "P"),
    "svdquant": ("orange", "v"),
    "viditq": ("purple", "<"),
    "lsq": ("sky", ">"),
    "qdm": ("orange", "^"),
    "efficientdm": ("purple", "d"),
    "kd": ("vermilion", "o"),
    "qvgen": ("blue", "D"),
    "dsa": ("green", "s"),
    "qvgen+": ("ink", "*"),
    "finetune": ("grey", "p"),
}
_SPARE = tuple((hue, marker) for marker in ("H", "8", "p") for hue in ("grey", "green", "purple", "orange"))
_PNG_DPI = 108


@dataclass(frozen=True)
class Plot:
    """`draw` paints the same figure in either theme; `alt` says in words what it shows."""

    name: str
    alt: str
    draw: Callable[[Theme], Figure]

    def png(self) -> bytes:
        """The light figure as a file of its own, in the theme's colours alone: a third of the size. A palette chosen by
        frequency gave several methods the same one, because lines are thin."""
        from PIL import Image, ImageColor

        whole, small, palette = Image.open(io.BytesIO(_saved(self.draw, LIGHT, "png"))), io.BytesIO(), Image.new("P", (1, 1))
        colours = (LIGHT.paper, LIGHT.ink, LIGHT.faint, LIGHT.grid, *LIGHT.hues.values())
        palette.putpalette([value for colour in colours for value in ImageColor.getrgb(colour)])
        whole.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE).save(small, "png", optimize=True)
        return small.getvalue()

    def data_uris(self) -> tuple[str, str]:
        """(light, dark) as SVG data URIs."""
        light, dark = (base64.b64encode(_saved(self.draw, theme, "svg")).decode() for theme in (LIGHT, DARK))
        return f"data:image/svg+xml;base64,{light}", f"data:image/svg+xml;base64,{dark}"


def line_style(method: str, theme: Theme) -> dict[str, Any]:
    """Colour, marker and dashes of a method, as matplotlib's `plot` takes them."""
    trained = method not in METHOD_NOTES or METHOD_NOTES[method].kind != "no training"
    spare = _SPARE[sum(map(ord, method)) % len(_SPARE)]
    hue, marker = _MARKS.get(method, spare)
    size = 8.5 if marker == "*" else 5.5
    return {
        "color": theme.hues[hue],
        "marker": marker,
        "markersize": size,
        "markeredgecolor": theme.paper,
        "markeredgewidth": 0.6,
        "linestyle": "-" if trained else (0, (4, 2)),
        "linewidth": 1.6,
    }


def panels(titles: Sequence[str], heights: Sequence[float], *, width: float = 9.6) -> tuple[Figure, list[Axes]]:
    """A figure with one titled panel per entry, two in a row; `heights` of the rows in inches."""
    from matplotlib.figure import Figure

    columns = min(2, len(titles))
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    axes = list(figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights).flat)
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, loc="left", fontweight="bold")
    for axis in axes[len(titles) :]:
        axis.set_visible(False)
    return figure, axes[: len(titles)]


def rows_of(panels: int) -> int:
    """Rows that so many panels take."""
    return -(-panels // 2)


def shared_legend(figure: Figure, axes: list[Axes]) -> None:
    """One legend below all panels, with every method once."""
    found = {}
    for axis in axes:
        found |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = sorted(found, key=method_order)
    if labels:
        figure.legend([found[label] for label in labels], labels, loc="outside lower center", ncols=min(7, len(labels)))


def log_axis(axis: Axes, which: str) -> None:
    """Make "x" or "y" logarithmic, with numbers written out (0.02); call it when everything is drawn."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    getattr(axis, f"set_{which}scale")("log")
    low, high = getattr(axis, f"get_{which}lim")()
    scale = getattr(axis, f"{which}axis")
    scale.set_major_locator(FixedLocator(_log_ticks(low, high)))
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    scale.set_minor_locator(NullLocator())


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`: powers of ten, with some between them if those are few; evenly spread ones where
    the whole range is narrow."""
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for leading, least in (((1,), 4), ((1, 3), 4), ((1, 2, 5), 4), ((1, 1.5, 2, 3, 5, 7), 3)):
        ticks = [float(f"{digit}e{decade}") for decade in decades for digit in leading]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= least:
            return ticks
    return [float(tick) for tick in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= high]


def _saved(draw: Callable[[Theme], Figure], theme: Theme, kind: str) -> bytes:
    """The figure's bytes: the same for the same data, whoever draws it and when."""
    target = io.BytesIO()
    with _themed(theme):
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        draw(theme).savefig(target, format=kind, dpi=_PNG_DPI, metadata=metadata)
    return target.getvalue()


@contextmanager
def _themed(theme: Theme) -> Iterator[None]:
    import matplotlib

    settings: dict[Any, Any] = {
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.faint,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "text.color": theme.ink,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "font.family": "DejaVu Sans",  # matplotlib's own, on every machine
        "svg.hashsalt": "qvgen",  # else the ids of the file are random
    }
    with matplotlib.rc_context(settings):
        yield
