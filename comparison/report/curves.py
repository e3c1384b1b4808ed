"""Plots of the comparison report that show training: loss, gradient norm, rank decay, singular values of Φ."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

from comparison.report.results import Results, Run
from comparison.report.style import Plot, Theme, line_style, log_axis, panels, shared_legend
from comparison.report.words import method_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 60  # of a drawn curve: each the mean of a window of steps
_MARKERS = 6  # on one curve
_SPECTRA = 6  # steps whose singular values are drawn


def training_plots(results: Results) -> list[Plot]:
    """Those that the results have data for, by name: training_curves, rank_decay, singular_values."""
    plots = []
    curves = {bits: found for bits in results.bits if (found := _mean_curves(results, bits))}
    if curves:
        alt = f"Loss and gradient norm over the training steps, line per trained method; {', '.join(curves)}."
        plots.append(Plot("training_curves", alt, lambda theme: _training(curves, theme)))
    if decaying := _decaying(results):
        methods = ", ".join(decaying)
        alt = f"Rank of Φ and factor u over the training steps of {methods}; both end at zero."
        plots.append(Plot("rank_decay", alt, lambda theme: _rank_decay(decaying, theme)))
    if spectra := _spectra(results):
        alt = f"Singular values of Φ at several steps, and the share of small ones. {spectrum_sentence(results)}"
        plots.append(Plot("singular_values", alt, lambda theme: _singular_values(spectra, theme)))
    return plots


def _mean_curves(results: Results, bits: str) -> dict[str, dict[str, list[float]]]:
    """{method: {"step", "loss", "gradient_norm"}}, averaged over windows of steps and over seeds."""
    found = {}
    for name, runs in sorted(results.compared(bits).items(), key=lambda item: method_order(item[0])):
        curves = [run.curve for run in runs if run.curve]
        if curves:
            length = min(len(curve["step"]) for curve in curves)
            window = max(1, -(-length // _POINTS))
            found[name] = {
                key: _windows([statistics.fmean(values) for values in zip(*(c[key] for c in curves), strict=False)], window)
                for key in ("step", "loss", "gradient_norm")
            }
    return found


def _windows(values: list[float], window: int) -> list[float]:
    return [statistics.fmean(values[i : i + window]) for i in range(0, len(values), window)]


def _decaying(results: Results) -> dict[str, dict[str, list[float]]]:
    """{method: curve} of one run of each method that ever had a Φ, at the bits where most is compared."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in results.runs:
        if run.compared and run.method not in found and any(run.curve.get("rank", ())):
            found[run.method] = run.curve
    return found


def _spectra(results: Results) -> list[tuple[Run, dict[str, Any]]]:
    """One run with singular values per method and bits, the lowest seed of each."""
    found: dict[tuple[str, str], tuple[Run, dict[str, Any]]] = {}
    for run in results.runs:
        if run.compared and (run.bits, run.method) not in found and run.singular_values.get("step"):
            found[run.bits, run.method] = (run, run.singular_values)
    order = {bits: i for i, bits in enumerate(results.bits)}
    return [found[key] for key in sorted(found, key=lambda k: (order[k[0]], method_order(k[1])))]


def _training(curves: dict[str, dict[str, dict[str, list[float]]]], theme: Theme) -> Figure:
    titles = [f"{bits}: {what}" for bits in curves for what in ("loss", "gradient norm")]
    figure, axes = panels(titles, [2.9] * len(curves))
    for number, found in enumerate(curves.values()):
        for axis, key in zip(axes[2 * number :], ("loss", "gradient_norm"), strict=False):
            _draw_curves(axis, found, key, theme)
            log_axis(axis, "y")
    shared_legend(figure, axes)
    return figure


def _draw_curves(axis: Axes, curves: dict[str, dict[str, list[float]]], key: str, theme: Theme) -> None:
    for number, (name, curve) in enumerate(curves.items()):
        every = max(1, len(curve["step"]) // _MARKERS)
        offset = number * every // len(curves)  # equal curves show their markers in turn
        style = line_style(name, theme) | {"markevery": (offset, every), "linewidth": 1.3}
        axis.plot(curve["step"], curve[key], label=name, **style)
    axis.set_xlabel("training step")


def _rank_decay(decaying: dict[str, dict[str, list[float]]], theme: Theme) -> Figure:
    figure, axes = panels(["rank of Φ", "u, the factor of the part that decays"], [3.2])
    for axis, key in zip(axes, ("rank", "u"), strict=True):
        _draw_curves(axis, decaying, key, theme)
    axes[0].set_yscale("symlog", base=2, linthresh=1)  # halving looks like a staircase, and 0 is on it
    highest = max(max(curve["rank"]) for curve in decaying.values())
    axes[0].set_yticks([0, *(2**i for i in range(math.ceil(math.log2(max(1, highest))) + 1))])
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[0].minorticks_off()
    shared_legend(figure, axes)
    return figure


def _singular_values(spectra: list[tuple[Run, dict[str, Any]]], theme: Theme) -> Figure:
    import matplotlib

    run, found = spectra[0]
    figure, (left, right) = panels(
        [f"{run.method}, {run.bits}: spectrum of Φ", f"share below {found['limit']:g} of the largest"], [3.6]
    )
    with_values = [i for i, values in enumerate(found["values"]) if values]
    chosen = [with_values[i * (len(with_values) - 1) // max(1, _SPECTRA - 1)] for i in range(_SPECTRA)] if with_values else []
    chosen = list(dict.fromkeys(chosen))
    colours = matplotlib.colormaps[theme.sequential]
    for number, i in enumerate(chosen):
        values = found["values"][i]
        colour = colours(0.25 + 0.7 * number / max(1, len(chosen) - 1))
        label = f"step {found['step'][i]:g}, rank {found['rank'][i]:g}"
        left.plot(range(1, len(values) + 1), values, color=colour, marker="o", markersize=3, linewidth=1.3, label=label)
    left.set_xlabel("number of the singular value, largest first")
    left.set_ylabel("over the largest")
    left.set_ylim(bottom=0)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=3)  # the curves need all of the room
    dashes = dict(zip(dict.fromkeys(r.bits for r, _ in spectra), ("-", "--", ":", "-."), strict=False))
    for other, values in spectra:
        style = line_style(other.method, theme) | {"linestyle": dashes.get(other.bits, "-"), "markersize": 4}
        right.plot(values["step"], values["share_small"], label=f"{other.method}, {other.bits}", **style)
    right.set_xlabel("training step")
    right.set_ylim(-0.02, 1.02)
    right.legend(loc="best")
    return figure


def spectrum_sentence(results: Results) -> str:
    """What the singular values of the first run with any show, in numbers; "" if none has them."""
    spectra = _spectra(results)
    if not spectra:
        return ""
    run, found = spectra[0]
    whole = [i for i, rank in enumerate(found["rank"]) if rank == found["rank"][0]]  # before anything is cut
    first, last = (f"{100 * found['share_small'][i]:.0f} %" for i in (whole[0], whole[-1]))
    when = f"at step {found['step'][whole[-1]]:g}, the last one at full rank"
    small = f"below {found['limit']:g} of the largest"
    return f"With {run.method} at {run.bits}, {first} of them are {small} at the start and {last} {when}."
