"""Pictures of results: sample grids and training curves, as PNG files."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath


def _save(figure: Any, path: epath.PathLike) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # Not pyplot, whose global state belongs to the program that calls us.
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=150)
    epath.Path(path).write_bytes(buffer.getvalue())


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
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    count = len(next(iter(rows.values())))
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    figure = Figure(figsize=(side * count + 0.4, side * len(rows)), layout=layout)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for (label, pictures), row in zip(rows.items(), axes, strict=True):
        row[0].set_ylabel(label, fontsize=9)
        for picture, axis in zip(pictures, row, strict=True):
            picture = picture[..., 0] if picture.shape[-1] == 1 else picture
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for title, axis in zip(titles, axes[0], strict=False):
        axis.set_title(title, fontsize=7)
    _save(figure, path)


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

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, psnr = figure.subplots(1, 2)
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
