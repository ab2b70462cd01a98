"""Makes the table in experiments/README.md from summaries, so that no figure is typed by hand.

    python experiments/results_table.py           # prints the table
    python experiments/results_table.py --write   # puts it into experiments/README.md

`experiments/results/` holds the `summary.json` of finished runs, with the scores of classical
methods where `aecore evaluate RUN --save` has added them. Runs with the same name and different
seeds share one line, with the mean over the seeds. The interval is the 95 % confidence interval
over the images of one run. The spread is the lowest and the highest PSNR of the seeds.
"""

import collections
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro

_HERE = Path(__file__).parent
_README = _HERE / "README.md"
_START, _END = "<!-- results: made by experiments/results_table.py -->", "<!-- end of results -->"

_TASKS = {
    "Fashion-MNIST, noise of σ = 0.4, 10,000 test images": (
        "fashion_mnist_denoise",
        "fashion_mnist_subpixel",
        "fashion_mnist_unet",
    ),
    "LFW 80×80, pixelated to 40 %, people never seen": ("lfw_unet", "lfw_enhance"),
}
"""The experiments of each table."""

Summary = Mapping[str, Any]


def load(folder: Path) -> dict[str, list[Summary]]:
    """The summaries in a folder, by the name of the run; one for each seed."""
    runs = collections.defaultdict(dict)
    for path in sorted(folder.glob("*.json")):
        summary = json.loads(path.read_text())
        if summary["seed"] in runs[summary["name"]]:
            raise ValueError(f"{path}: there is a run {summary['name']} of this seed already")
        runs[summary["name"]][summary["seed"]] = summary
    return {name: list(seeds.values()) for name, seeds in runs.items()}


def tables(runs: Mapping[str, list[Summary]]) -> str:
    """A Markdown table for each task."""
    parts = []
    for task, names in _TASKS.items():
        present = [name for name in names if name in runs]
        if not present:
            continue
        lines = [
            f"**{task}**",
            "",
            "| | parameters | PSNR in dB | seeds, spread | SSIM | MSE | training |",
            "|---|---|---|---|---|---|---|",
        ]
        every = [summary for name in present for summary in runs[name]]
        lines.append(_line("the degraded images", [every[0]["baseline"]]))
        classical = {}
        for summary in every:
            classical |= summary.get("classical", {})
        for name, scores in sorted(classical.items(), key=lambda item: -item[1]["mse"]):
            settings = ", ".join(f"{k} {v:.4g}" for k, v in scores["settings"].items())
            lines.append(_line(f"{name} ({settings})", [scores]))
        for name in present:
            seeds = runs[name]
            minutes = statistics.mean(summary["seconds"] for summary in seeds) / 60
            device = seeds[0]["device"]
            on_device = "" if device == "cpu" else f" on {device}"
            lines.append(
                _line(
                    f"[`{name}`]({name}.py)",
                    [summary["evaluation"] for summary in seeds],
                    f"{seeds[0]['parameters']:,}",
                    f"{seeds[0]['epochs']:.3g} epochs, {minutes:.1f} min{on_device}",
                )
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(name: str, scores: list[Mapping[str, Any]], parameters: str = "", cost: str = "") -> str:
    def mean(key: str) -> float:
        return statistics.mean(entry[key] for entry in scores)

    def interval(key: str) -> float:
        return statistics.mean(entry["ci95"][key] for entry in scores)

    psnr = [entry["psnr"] for entry in scores]
    spread = f"{len(psnr)}, {min(psnr):.2f} to {max(psnr):.2f}" if len(psnr) > 1 else ""
    cells = (
        name,
        parameters,
        f"{mean('psnr'):.2f} ± {interval('psnr'):.2f}",
        spread,
        f"{mean('ssim'):.4f} ± {interval('ssim'):.4f}",
        f"{mean('mse'):.5f} ± {interval('mse'):.5f}",
        cost,
    )
    return f"| {' | '.join(cells)} |"


def inserted(readme: str, table: str) -> str:
    """The README with the table between its two markers."""
    before, rest = readme.split(_START)
    _, after = rest.split(_END)
    return f"{before}{_START}\n\n{table}\n\n{_END}{after}"


def main(write: bool = False) -> None:
    """Prints the table.

    Args:
        write: Put it into experiments/README.md instead.
    """
    table = tables(load(_HERE / "results"))
    if write:
        _README.write_text(inserted(_README.read_text(), table))
    else:
        print(table)


if __name__ == "__main__":
    tyro.cli(main)
