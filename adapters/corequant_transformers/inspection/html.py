"""One self-contained HTML page of plots about an inspected model."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from corequant.errors import BackendError, OutputError
from corequant_transformers.files.atomic import replacing
from corequant_transformers.files.outputs import check_file_output
from corequant_transformers.inspection.outliers import Inspection
from corequant_transformers.inspection.words import outlier_advice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_report_output", "write_report"]

_COLOURS = {
    "identity": "#9e9e9e",
    "permuted": "#c2a5cf",
    "rotated": "#f4a582",
    "massdiff": "#f4a582",
    "energydiff": "#2166ac",
    "permuted and rotated": "#2166ac",
    "full rotation": "#1b7837",
}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1, p, li { overflow-wrap: anywhere } code { font-size: .9em }
img { max-width: 100% } table { border-collapse: collapse; font-size: 14px }
.wide { overflow-x: auto } td { white-space: nowrap }
td, th { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } .worst { background: #fde0dd }
"""


def write_report(inspection: Inspection, path: str | Path) -> Path:
    """Write the page; it needs no other file and no network.

    Parameters
    ----------
    inspection : Inspection
    path : str or Path
        Path of the HTML file; an older one is replaced.

    Returns
    -------
    Path

    Raises
    ------
    BackendError
        If matplotlib is not installed.
    OutputError
        If the file can't be written.
    """
    target = check_report_output(path)
    text = _page(inspection)
    with replacing(target) as part:
        part.write_bytes(text.encode())
    return target


def check_report_output(path: str | Path) -> Path:
    """Return the path of a report that can be written, before any work is done.

    Raises
    ------
    BackendError
        If matplotlib is not installed.
    OutputError
        If it can't.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise BackendError(
            'the report needs matplotlib; install it with: pip install "corequant[plot]"'
        ) from error
    try:
        return check_file_output(path, new=False)
    except OutputError as error:
        raise OutputError(f"the report can't be written: {error}") from None


def _page(found: Inspection) -> str:
    b = found.block_size
    sections = [
        (
            "Ranges",
            "Mean range of a token before it is rounded, relative to the untouched activation, by "
            f"layer. Lower is better; blocks of {b}.",
            _ranges(found),
        ),
        (
            "Recovery over block size",
            "Rounding error of the full-vector rotation divided by that of the block rotation; the "
            "line is the geometric mean over layers, the band covers all of them. Above 1, blocks "
            "are better than the full rotation.",
            _recovery(found),
        ),
        (
            "Bounds against the truth",
            "Largest magnitude after permutation and block rotation, mean over tokens: between its "
            "lower and upper bound, and below the bound that holds with probability 95 % for "
            "random signs.",
            _bounds(found),
        ),
        (
            "Where the outliers sit",
            "Mean magnitude of each channel relative to its layer's median, the largest channels "
            "of each layer first.",
            _channels(found),
        ),
    ]
    body = "".join(
        f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{_image(figure)}"
        for title, text, figure in sections
    )
    title = f"{html.escape(found.name)}: what its rotated layers read"
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width'><title>{title}</title>"
        f"<style>{_STYLE}</style><h1>{title}</h1>{_advice(found)}{body}<h2>Table</h2>"
        f"<div class='wide'>{_table(found)}</div></html>"
    )


def _advice(found: Inspection) -> str:
    advice = outlier_advice(found)
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in advice.reasons)
    options = "".join(
        f"<li><code>{html.escape(option)}</code>: {html.escape(effect)}</li>"
        for option, effect in advice.options
    )
    return (
        f"<p>{html.escape(advice.summary)}</p><ol>{reasons}</ol>"
        f"<p>What helps:</p><ul>{options}</ul>"
    )


def _figure(height: float = 3.6) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _ranges(found: Inspection) -> Figure:
    figure, axes = _figure()
    for name in ("rotated", "permuted and rotated", "full rotation"):
        values = [layer.ranges[name] for layer in found.layers]
        axes.plot(values, "o-", ms=4, label=name, color=_COLOURS[name])
    axes.axhline(1, color=_COLOURS["identity"], lw=1, label="identity, or permuted alone")
    axes.set(xlabel="layer", ylabel="range / identity", ylim=(0, None))
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def _recovery(found: Inspection) -> Figure:
    figure, axes = _figure()
    for method in ("identity", "massdiff", "energydiff"):
        values = np.array([layer.recovery[method] for layer in found.layers])
        middle = np.exp(np.log(np.maximum(values, 1e-12)).mean(0))
        axes.plot(found.block_sizes, middle, "o-", label=method, color=_COLOURS[method])
        axes.fill_between(
            found.block_sizes, values.min(0), values.max(0), alpha=0.12, color=_COLOURS[method]
        )
    axes.axhline(1, color=_COLOURS["full rotation"], lw=1, label="full rotation")
    axes.set_xscale("log", base=2)
    axes.set_xticks(found.block_sizes, [str(b) for b in found.block_sizes])
    axes.set(xlabel="block size", ylabel="recovery", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def _bounds(found: Inspection) -> Figure:
    figure, axes = _figure()
    layers = np.arange(len(found.layers))
    kinds = ("lower", "truth", "probable", "upper")
    pick = {k: np.array([layer.bounds[k] for layer in found.layers]) for k in kinds}
    axes.fill_between(layers, pick["lower"], pick["upper"], color="#d1e5f0", label="bounds")
    axes.plot(layers, pick["probable"], "--", color="#b2182b", label="probable bound")
    axes.plot(layers, pick["truth"], "o-", ms=4, color="#2166ac", label="truth")
    axes.set_yscale("log")
    axes.set(xlabel="layer", ylabel="largest magnitude")
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def _channels(found: Inspection) -> Figure:
    figure, axes = _figure(4.2)
    rows = np.array([layer.magnitudes for layer in found.layers])
    ordered = -np.sort(-rows, axis=1)
    relative = ordered / np.maximum(np.median(rows, axis=1, keepdims=True), 1e-30)
    shown = relative[:, : min(128, relative.shape[1])]
    picture = axes.imshow(np.log2(np.maximum(shown, 1)), aspect="auto", cmap="magma", vmin=0)
    bar = figure.colorbar(picture, ax=axes, label="times the median")
    ticks = np.arange(0, int(np.log2(shown.max().clip(2))) + 1)
    bar.set_ticks(ticks.tolist(), labels=[str(2**t) for t in ticks.tolist()])
    axes.set(xlabel="channel, by magnitude", ylabel="layer")
    axes.locator_params(axis="y", integer=True)
    return figure


def _image(figure: Figure) -> str:
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=120)
    data = base64.b64encode(memory.getvalue()).decode()
    return f"<img alt='' src='data:image/png;base64,{data}'>"


def _table(found: Inspection) -> str:
    heads = ["layer", "δ (median)", "tokens with δ ≤ 1/√d", "range, rotated", "range, both"]
    heads += ["energy balance", *(f"recovery b={b}" for b in found.block_sizes)]
    worst = max(found.layers, key=lambda layer: layer.ranges["permuted and rotated"])
    lines = []
    for layer in found.layers:
        cells = [
            html.escape(layer.name),
            f"{layer.concentration:.4f}",
            f"{layer.guaranteed:.0%}",
            f"{layer.ranges['rotated']:.2f}",
            f"{layer.ranges['permuted and rotated']:.2f}",
            f"{layer.balance['identity']:.2f} → {layer.balance['energydiff']:.2f}",
            *(f"{r:.2f}" for r in layer.recovery["energydiff"]),
        ]
        mark = " class='worst'" if layer is worst else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    top = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    return f"<table><tr>{top}</tr>{''.join(lines)}</table>"
