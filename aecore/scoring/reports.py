"""Pictures of results: sample grids and training curves, as PNG files."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from aecore.storage import write_whole

_GAP = 0.04
"""Inches between pictures."""

_FOR_LABELS, _FOR_TITLES = 0.3, 0.2
"""Inches for the labels of rows and the titles of columns."""


def _save(figure: Any, path: epath.PathLike) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # Not pyplot, whose global state belongs to the program that calls us.
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(path, buffer.getvalue())


def save_samples(
    rows: Mapping[str, np.ndarray],
    path: epath.PathLike,
    titles: Sequence[str] = (),
    side: float = 1.0,
) -> None:
    """A grid of pictures.

    Args:
      rows: for each row a label and an array `(N, H, W, C)` of floats in [0, 1].
      path: the PNG file.
      titles: titles of the N columns.
      side: of each picture, in inches of 150 pixels.
    """
    from matplotlib.figure import Figure

    count = len(next(iter(rows.values())))
    size = np.max([pictures.shape[1:3] for pictures in rows.values()], axis=0)
    gap = max(1, round(_GAP / side * size[1]))
    # One picture of all: matplotlib takes a while for each of many axes.
    sheet = np.ones((*((size + gap) * (len(rows), count) - gap), 3), np.float32)
    for row, pictures in enumerate(rows.values()):
        for column, picture in enumerate(pictures):
            top, left = (size + gap) * (row, column)
            sheet[top : top + size[0], left : left + size[1]] = _resized(picture, size)
    inches = side / size[1]
    height, width = (length * inches for length in sheet.shape[:2])
    over = _FOR_TITLES if titles else _GAP
    figure = Figure(figsize=(_FOR_LABELS + width + _GAP, over + height + _GAP))
    whole = figure.get_size_inches()
    place = np.array([_FOR_LABELS, _GAP, width, height]) / [*whole, *whole]
    axis = figure.add_axes(tuple(place.tolist()))
    axis.imshow(sheet, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    for row, label in enumerate(rows):
        middle = (size[0] + gap) * row + size[0] / 2
        axis.text(-gap, middle, label, fontsize=9, rotation=90, ha="right", va="center")
    for column, title in enumerate(titles):
        middle = (size[1] + gap) * column + size[1] / 2
        axis.text(middle, -gap, title, fontsize=7, ha="center", va="bottom")
    _save(figure, path)


def _resized(picture: np.ndarray, size: np.ndarray) -> np.ndarray:
    """A picture, `(H, W, C)`, at another size, of its nearest pixels."""
    rows, columns = (
        np.arange(wanted) * given // wanted
        for wanted, given in zip(size, picture.shape[:2], strict=True)
    )
    return picture[rows][:, columns]


def save_curves(
    training: Sequence[Mapping[str, float]],
    validation: Sequence[Mapping[str, float]],
    baseline: Mapping[str, float],
    path: epath.PathLike,
    loss_name: str = "mse",
) -> None:
    """Loss and PSNR over steps.

    Args:
      training: entries with `step` and `loss`.
      validation: entries with `step`, `mse` and `psnr`.
      baseline: scores of the degraded images.
      path: the PNG file.
      loss_name: name of the training loss; the validation loss is always the MSE.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5))
    loss, psnr = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.14, top=0.96, wspace=0.2)
    training_steps = [e["step"] for e in training]
    loss.plot(training_steps, [e["loss"] for e in training], label=f"training, {loss_name}")
    steps = [e["step"] for e in validation]
    loss.plot(steps, [e["mse"] for e in validation], "o-", markersize=4, label="validation, mse")
    positive = all(entry["loss"] > 0 for entry in training)
    loss.set(xlabel="step", ylabel="loss", yscale="log" if positive else "linear")
    loss.legend()
    psnr.plot(steps, [e["psnr"] for e in validation], "o-C1", markersize=4, label="restored")
    psnr.axhline(baseline["psnr"], color="gray", linestyle="--", label="degraded")
    psnr.set(xlabel="step", ylabel="validation PSNR (dB)")
    psnr.legend()
    for axis in (loss, psnr):
        axis.grid(alpha=0.3)
        axis.locator_params(axis="x", nbins=6)  # Long numbers would run into each other.
    _save(figure, path)
