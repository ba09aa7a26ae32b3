"""Figures of an evaluation and of the report, in one style that an SVG hands over to the page's light or dark colours."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

NAMES = {"simclr": "SimCLR", "care": "CARE"}
COLOURS = {"ink": "#1f2630", "muted": "#69717e", "grid": "#e3e5e9", "simclr": "#8d95a4", "care": "#0b7a75"}
STYLE: dict[Any, Any] = {
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["grid"],
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.labelsize": 9.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["grid"],
    "ytick.color": COLOURS["grid"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "ytick.left": False,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "care",
}
BINS = 60  # of the histogram of cosines, over [-1, 1]

P = ParamSpec("P")
T = TypeVar("T")


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Run under our style; matplotlib is imported only then."""

    @wraps(draw)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return run


@styled
def angle_histogram(cosines: Mapping[str, Sequence[Sequence[int]]]) -> "Figure":
    """How far each transformation turns the images (CARE, S^1 encoder): a panel a model, a ridge a transformation.

    Args:
        cosines: model -> counts [draws, BINS] of cos angle(f(x), f(a x)) over [-1, 1].
    """
    figure, panels = _panels(1, len(cosines), (4.4, 3.4))
    centres = np.linspace(-1, 1, 2 * BINS + 1)[1::2]
    shares = {model: np.array(counts) / np.sum(counts, axis=1, keepdims=True) for model, counts in cosines.items()}
    left = min(centres[share.sum(axis=0).nonzero()[0][0]] for share in shares.values())
    for axes, (model, share) in zip(panels, shares.items(), strict=True):
        order = np.argsort(share @ centres)
        for level, ridge in enumerate(share[order]):
            top = level + 3 * ridge / share.max()
            colour = COLOURS.get(model, COLOURS["care"])
            axes.fill_between(centres, level, top, color=colour, alpha=0.45, linewidth=0, zorder=-level)
            axes.plot(centres, top, color=colour, linewidth=0.9, zorder=-level)
        axes.set(title=NAMES.get(model, model), xlim=(left, 1), ylim=(-0.5, len(share) + 3), yticks=[])
        axes.set_xlabel("cosine of the angle")
    panels[0].set_ylabel("transformations, the strongest below")
    return figure


@styled
def curves(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], across: str, up: str) -> "Figure":
    """One line a model.

    Args:
        lines: model -> (x, y).
        across, up: labels of the axes, with units.
    """
    figure, (axes,) = _panels(1, 1, (3.5, 2.4))
    for model, (x, y) in lines.items():
        axes.plot(x, y, color=COLOURS.get(model, COLOURS["care"]), label=NAMES.get(model, model))
    axes.set(xlabel=across, ylabel=up)
    axes.margins(x=0.02)
    axes.legend(ncols=len(lines), loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.2)
    return figure


@styled
def result_bars(measures: Mapping[str, Mapping[str, float | None]]) -> "Figure":
    """The picture of a result: accuracy, the two measures of equivariance and the recovered hue, a bar a model."""
    shown = {
        "knn": ("kNN accuracy, %", "higher is better", "{:.1f}"),
        "gamma": ("γ, relative rotational\nequivariance error", "lower is better", "{:.2f}"),
        "unexplained": ("displacement that no\nrotation explains", "lower is better", "{:.2f}"),
        "hue_r2": ("hue recovered\nlinearly, R²", "higher is better", "{:.2f}"),
    }
    figure, panels = _panels(1, len(shown), (8.6, 2.9))
    for axes, (key, (title, better, form)) in zip(panels, shown.items(), strict=True):
        values = [measures[model].get(key) for model in measures]
        heights = [0.0 if value is None else value for value in values]
        bars = axes.bar(
            [NAMES.get(m, m) for m in measures], heights, 0.62, color=[COLOURS.get(m, COLOURS["care"]) for m in measures]
        )
        axes.bar_label(bars, ["–" if value is None else form.format(value) for value in values], padding=2, fontsize=10)
        axes.set_title(title, loc="center", pad=12)
        axes.set_xlabel(better, fontsize=8.5)
        axes.set_yticks([])
        axes.set_ylim(min(0, *heights), 1.12 * max(*heights, 1e-9))
        axes.tick_params(axis="x", length=0, labelcolor=COLOURS["ink"])
    return figure


def view_sheet(images: Tensor, views: Tensor, groups: int, mean: Sequence[float], std: Sequence[float]) -> "Image":
    """Images and their two views side by side: `groups` blocks of columns (image, view, view'), a row an image.

    Where a group shares its draws, every row of a block shows the same crop box, flip and change of colour.

    Args:
        images: normalised evaluation views, [B, 3, H, W].
        views: normalised views of the same images, [2, B, 3, H, W]; group g holds consecutive rows.
        groups: blocks; divides B.
        mean, std: of the normalisation, which is undone.
    """
    from PIL import Image

    scale = torch.tensor(std)[:, None, None], torch.tensor(mean)[:, None, None]
    cells = (torch.stack([images, *views]).cpu() * scale[0] + scale[1]).clamp(0, 1).mul(255).round().byte()
    cells = cells.unflatten(1, (groups, -1)).permute(2, 1, 0, 4, 5, 3)  # row, block, column, y, x, channel
    side = cells.shape[3]
    enlarge = max(1, 64 // side)
    gap, step = max(1, side // 16), side + max(1, side // 16)
    rows, blocks, columns = cells.shape[:3]
    wide = blocks * (columns * step + 3 * gap) - 4 * gap
    sheet = np.zeros((rows * step - gap, wide, 4), np.uint8)  # transparent between the cells
    for row, block, column in np.ndindex(rows, blocks, columns):
        top, left = row * step, block * (columns * step + 3 * gap) + column * step
        sheet[top : top + side, left : left + side, :3] = cells[row, block, column].numpy()
        sheet[top : top + side, left : left + side, 3] = 255
    return Image.fromarray(sheet).resize((enlarge * wide, enlarge * sheet.shape[0]), Image.Resampling.NEAREST)


@styled
def save_png(figure: "Figure", path: Path) -> None:
    """Write a figure on white."""
    figure.savefig(path, dpi=180, facecolor="white")


@styled
def to_svg(figure: "Figure", label: str) -> str:
    """A figure as an <svg> to stand inside HTML: no prologue, no references, colours named by the page (var(--ink) ...).

    Args:
        label: what a screen reader says of it.
    """
    text = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg.split(">", 1)[0]) + ">" + svg.split(">", 1)[1]
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _panels(rows: int, columns: int, size: tuple[float, float]) -> "tuple[Figure, list[Axes]]":
    """A figure of its own, outside pyplot, so that no display and no global state is involved."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.grid(axis="x", visible=False)
    return figure, list(panels.flat)
