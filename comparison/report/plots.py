"""Plots of the comparison report that show errors: by method, by bits, by timestep, by layer."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from comparison.report.ranking import ranked, summary_of
from comparison.report.results import Results, Run
from comparison.report.style import Plot, Theme, line_style, log_axis, panels, rows_of, shared_legend
from comparison.report.words import method_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_LAYERS = 48  # columns of the heat map that can still be read


def error_plots(results: Results) -> list[Plot]:
    """Those that the results have data for, by name: ranking, error_by_bits, error_by_timestep."""
    plots = []
    if bits := [b for b in results.bits if _means(results, b)]:
        plots.append(Plot("ranking", _ranking_alt(results, bits), lambda theme: _ranking(results, bits, theme)))
    if len(bits) > 1:
        alt = f"Mean velocity error of every method at {', '.join(bits)}, logarithmic. The numbers are in the tables above."
        plots.append(Plot("error_by_bits", alt, lambda theme: _by_bits(results, bits, theme)))
    if timed := [b for b in bits if any(_by_timestep(runs) for runs in results.compared(b).values())]:
        alt = f"Line per method: velocity error at each timestep, one panel for each of {', '.join(timed)}."
        plots.append(Plot("error_by_timestep", alt, lambda theme: _timesteps(results, timed, theme)))
    return plots


def layer_plot(results: Results, bits: str) -> Plot | None:
    """Heat map of layers and methods at these bits; None without data."""
    errors = layer_errors(results, bits)
    if not errors:
        return None
    worst = max(((v, layer, name) for name, layers in errors.items() for layer, v in layers.items()), default=None)
    assert worst is not None
    alt = (
        f"Heat map of the relative output error of every layer (columns) for every method (rows) at {bits}. "
        f"Largest: {worst[0]:.3f} in {worst[1]} with {worst[2]}."
    )
    return Plot(f"layer_error_{bits}", alt, lambda theme: _layers(errors, theme))


def layer_errors(results: Results, bits: str) -> dict[str, dict[str, float]]:
    """{method: {layer: relative output error, mean over seeds}}, finite values only."""
    found = {}
    for name, runs in sorted(results.compared(bits).items(), key=lambda item: method_order(item[0])):
        if means := _mean_entries(runs, "layer_error"):
            found[name] = means
    return found


def _means(results: Results, bits: str) -> dict[str, float]:
    """{method: mean velocity error}, best first, without diverged ones."""
    methods = results.compared(bits)
    found = {name: summary_of(methods[name], "velocity_mse") for name in ranked(methods)}
    return {name: s.mean for name, s in found.items() if s and math.isfinite(s.mean)}


def _mean_entries(runs: list[Run], key: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for run in runs:
        for entry, value in (run.scores.get(key) or {}).items():
            if value is not None and math.isfinite(value):
                values.setdefault(entry, []).append(value)
    return {entry: statistics.fmean(found) for entry, found in values.items()}


def _by_timestep(runs: list[Run]) -> dict[float, float]:
    means = {float(timestep): value for timestep, value in _mean_entries(runs, "velocity_mse_by_timestep").items()}
    return dict(sorted(means.items()))


def _ranking_alt(results: Results, bits: list[str]) -> str:
    ends = []
    for b in bits:
        means = _means(results, b)
        best, *_, worst = [*means, *means]  # the same where there is one method
        ends.append(f"{b}: from {best}, {means[best]:.4f}, to {worst}, {means[worst]:.4f}")
    return f"Velocity error of every method and seed, best at the top. {'; '.join(ends)}."


def _ranking(results: Results, bits: list[str], theme: Theme) -> Figure:
    rows = [max(len(_means(results, b)) for b in bits[i : i + 2]) for i in range(0, len(bits), 2)]
    figure, axes = panels(bits, [0.9 + 0.24 * methods for methods in rows])
    for axis, b in zip(axes, bits, strict=True):
        means = _means(results, b)
        for row, (name, mean) in enumerate(means.items()):
            style = line_style(name, theme)
            values = [v for run in results.compared(b)[name] if (v := run.number("velocity_mse")) is not None]
            axis.plot([mean, mean], [row - 0.3, row + 0.3], color=style["color"], linewidth=2)
            axis.plot(values, [row] * len(values), **(style | {"linestyle": "", "alpha": 0.85}))
        axis.set_yticks(range(len(means)), list(means))
        axis.tick_params(axis="y", length=0, labelcolor=theme.ink)
        axis.set_ylim(len(means) - 0.5, -0.5)
        log_axis(axis, "x")
        axis.set_xlabel("velocity error, logarithmic; smaller is better")
    return figure


def _by_bits(results: Results, bits: list[str], theme: Theme) -> Figure:
    figure, (axis,) = panels([""], [4.6])
    means = {b: _means(results, b) for b in bits}
    names = sorted({name for found in means.values() for name in found}, key=method_order)
    for number, name in enumerate(names):
        shift = 0.7 * (number / max(1, len(names) - 1) - 0.5)  # side by side, or error bars hide each other
        there = [i for i, b in enumerate(bits) if name in means[b]]
        style = line_style(name, theme)
        summaries = [summary_of(results.compared(bits[i])[name], "velocity_mse") for i in there]
        axis.errorbar(
            [i + shift for i in there],
            [means[bits[i]][name] for i in there],
            yerr=[(s.sd or 0.0) if s else 0.0 for s in summaries],
            label=name,
            elinewidth=1.2,
            **(style | {"linestyle": "", "markersize": 1.25 * style["markersize"]}),
        )
    for edge in range(1, len(bits)):
        axis.axvline(edge - 0.5, color=theme.grid, linewidth=1)
    axis.set_xticks(range(len(bits)), bits)
    axis.tick_params(axis="x", length=0, labelcolor=theme.ink)
    axis.set_xlim(-0.5, len(bits) - 0.5)
    log_axis(axis, "y")
    axis.set_ylabel("velocity error, logarithmic")
    axis.grid(axis="x", visible=False)
    shared_legend(figure, [axis])
    return figure


def _timesteps(results: Results, bits: list[str], theme: Theme) -> Figure:
    figure, axes = panels(bits, [3.6] * rows_of(len(bits)))
    for axis, b in zip(axes, bits, strict=True):
        for name, runs in results.compared(b).items():
            if found := _by_timestep(runs):
                axis.plot(list(found), list(found.values()), label=name, **line_style(name, theme))
        log_axis(axis, "y")
        axis.set_xlabel("timestep (0: clean video, 1000: pure noise)")
        axis.set_ylabel("velocity error, logarithmic")
    shared_legend(figure, axes)
    return figure


def _layers(errors: dict[str, dict[str, float]], theme: Theme) -> Figure:
    from matplotlib.colors import LogNorm

    names, layers = list(errors), _shown_layers(errors)
    grid = [[errors[name].get(layer, math.nan) for layer in layers] for name in names]
    positive = [v for row in grid for v in row if v > 0]
    figure, (axis,) = panels([""], [1.9 + 0.24 * len(names)], width=max(9.6, 2.5 + 0.22 * len(layers)))
    norm = LogNorm(min(positive), max(positive)) if positive and min(positive) < max(positive) else None
    picture = axis.imshow(grid, aspect="auto", cmap=theme.sequential, norm=norm, interpolation="nearest")
    axis.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7.5)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(length=0, labelcolor=theme.ink)
    axis.grid(visible=False)
    bar = figure.colorbar(picture, ax=axis, fraction=0.03, pad=0.01)
    bar.set_label("relative error")
    bar.outline.set_visible(False)
    if norm:
        log_axis(bar.ax, "y")
    return figure


def _shown_layers(errors: dict[str, dict[str, float]]) -> list[str]:
    """All layers in the model's order; of a large model those whose error is largest in the mean over methods."""
    layers = list(dict.fromkeys(layer for found in errors.values() for layer in found))
    if len(layers) <= _MAX_LAYERS:
        return layers
    means = {layer: statistics.fmean([f[layer] for f in errors.values() if layer in f]) for layer in layers}
    kept = set(sorted(layers, key=lambda layer: -means[layer])[:_MAX_LAYERS])
    return [layer for layer in layers if layer in kept]
