"""Scores, cost and speed of the weights for photographs, on the benchmarks that everybody knows.

    python experiments/photo_results.py --photos DIR            # prints the tables
    python experiments/photo_results.py --photos DIR --write    # into experiments/README.md

DIR holds the folders `cbsd68`, `live1`, `set5` and `set14`, with the pictures of the test sets of
these names. They are scored as `aecore evaluate` does it. Speeds are of restoring one picture of
481×321 pixels, in turns with the same network in ONNX Runtime (`pip install ".[onnx]" onnxruntime`)
and with OpenCV's non-local means, where these are installed; medians of several repeats.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

import aecore
from aecore.degradations import JPEG, Degradation, Downscale, GaussianNoise
from aecore.saved import exported, weights

_README = Path(__file__).with_name("README.md")
_START, _END = (
    "<!-- photographs: made by experiments/photo_results.py -->",
    "<!-- end of photographs -->",
)
_REPEATS = 7
_SIZE = (321, 481)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A test set, and what is done to its pictures."""

    weights: str
    folder: str
    degradations: dict[str, Degradation]
    on_luma: bool = False
    in_gray: bool = False
    """Whether the pictures are made gray beforehand (ITU-R 601 luma)."""


BENCHMARKS = (
    Benchmark(
        "photo-denoise",
        "cbsd68",
        {f"σ = {level}": GaussianNoise(level / 255, clip=False) for level in (15, 25, 50)},
    ),
    Benchmark(
        "photo-denoise-gray",
        "cbsd68",
        {
            f"σ = {level}": GaussianNoise(level / 255, clip=False, gray=1.0)
            for level in (15, 25, 50)
        },
        in_gray=True,
    ),
    Benchmark(
        "photo-dejpeg", "live1", {f"quality {quality}": JPEG(quality) for quality in (10, 20, 40)}
    ),
    *(
        Benchmark(f"photo-upscale-{scale}x", folder, {f"×{scale}": Downscale(scale)}, on_luma=True)
        for scale in (2, 4)
        for folder in ("set5", "set14")
    ),
)


def scores(benchmark: Benchmark, photos: Path) -> Iterator[str]:
    """A line of the table for each degradation."""
    psnr, ssim = ("psnr_y", "ssim_y") if benchmark.on_luma else ("psnr", "ssim")
    folder, pictures = photos / benchmark.folder, benchmark.folder
    with tempfile.TemporaryDirectory() as made:
        if benchmark.in_gray:
            for path in folder.iterdir():
                Image.open(path).convert("L").save(Path(made, path.name))
            folder, pictures = Path(made), f"{pictures} in gray"
        for name, degradation in benchmark.degradations.items():
            found = aecore.evaluate(benchmark.weights, data=str(folder), degradation=degradation)
            before, after = found["baseline"], found["evaluation"]
            yield (
                f"| `{benchmark.weights}` | {pictures}, {after['images']} pictures, {name} "
                f"| {before[psnr]:.2f} | {after[psnr]:.2f} ± {after['ci95'][psnr]:.2f} "
                f"| {before[ssim]:.4f} | {after[ssim]:.4f} |"
            )


def speeds(name: str) -> str:
    """A line of the table of costs."""
    image = np.random.default_rng(0).integers(0, 256, (*_SIZE, 3), np.uint8)
    restorer = aecore.Restorer.load(name)
    works: dict[str, Callable[[], object]] = {"aecore": lambda: restorer(image)}
    works |= _peers(restorer, image)
    times = {work: [] for work in works}
    for turn in range(_REPEATS + 1):
        for work, function in works.items():
            start = time.perf_counter()
            function()
            if turn:  # The first one compiles.
                times[work].append(time.perf_counter() - start)
    pixels = image.shape[0] * image.shape[1] / 1e6
    rates = {work: f"{pixels / statistics.median(values):.2f}" for work, values in times.items()}
    summary = restorer.summary()
    cost = next(line for line in summary.splitlines() if line.startswith("multiply-adds"))
    parameters = summary.split(": ", 1)[1].split(" ", 1)[0]
    columns = [rates.get(work, "") for work in ("aecore", "ONNX Runtime", "OpenCV")]
    return f"| `{name}` | {parameters} | {cost.split()[1]} | {' | '.join(columns)} |"


def _peers(restorer: aecore.Restorer, image: np.ndarray) -> dict[str, Callable[[], object]]:
    works = {}
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(exported.as_onnx(restorer.trained))
        given = session.get_inputs()[0].name
        floats = image[None].astype(np.float32) / 255
        works["ONNX Runtime"] = lambda: session.run(None, {given: floats})
    except ImportError as error:
        print(f"ONNX Runtime is skipped: {error}")
    try:
        import cv2

        if restorer.network.scale == 1:
            works["OpenCV"] = lambda: cv2.fastNlMeansDenoisingColored(image, None, 10, 10, 7, 21)
    except ImportError as error:
        print(f"OpenCV is skipped: {error}")
    return works


def main(photos: Path, write: bool = False) -> None:
    """Prints the tables, or into experiments/README.md.

    Args:
        photos: Folder of the test sets.
        write: Whether to change experiments/README.md.
    """
    present = [benchmark for benchmark in BENCHMARKS if benchmark.weights in weights.CARDS]
    lines = [
        "| weights | pictures | PSNR in dB before | after | SSIM before | after |",
        "|---|---|---|---|---|---|",
    ]
    for benchmark in present:
        lines += scores(benchmark, photos)
    lines += [
        "",
        "| weights | parameters | multiply-adds a pixel | aecore, megapixels/s | ONNX Runtime "
        "| OpenCV's non-local means |",
        "|---|---|---|---|---|---|",
    ]
    lines += [speeds(name) for name in dict.fromkeys(b.weights for b in present)]
    table = "\n".join(lines)
    print(table)
    if write:
        before, rest = _README.read_text().split(_START)
        _, after = rest.split(_END)
        _README.write_text(f"{before}{_START}\n\n{table}\n\n{_END}{after}")


if __name__ == "__main__":
    tyro.cli(main)
