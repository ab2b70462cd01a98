"""What the scripts in `experiments/` compute, and that the README's table is theirs."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
RANDOM = np.random.default_rng(0)


def script(name):
    return runpy.run_path(str(EXPERIMENTS / f"{name}.py"), run_name="script")


def test_a_face_on_both_sides_is_found():
    duplicates = script("lfw_duplicates")
    train = RANDOM.integers(0, 256, (50, 80, 80, 3), np.uint8)
    validation = RANDOM.integers(0, 256, (10, 80, 80, 3), np.uint8)
    assert duplicates["shared"](train, validation) == 0
    assert duplicates["nearest"](train, validation)[1].max() < 0.5
    validation[3] = train[17]
    # The same picture, coded anew.
    noise = RANDOM.normal(0, 4, train[9].shape)
    validation[5] = np.clip(0.9 * train[9] + noise, 0, 255).astype(np.uint8)
    assert duplicates["shared"](train, validation) == 1
    indices, correlations = duplicates["nearest"](train, validation)
    assert indices[[3, 5]].tolist() == [17, 9]
    assert correlations[[3, 5]].min() > duplicates["_SAME"]


def test_no_face_of_lfw_is_on_both_sides(tfds_dir):
    done = subprocess.run(
        [sys.executable, EXPERIMENTS / "lfw_duplicates.py", "--data-dir", tfds_dir],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training images too: 0" in done.stdout


def summary(name, seed, psnr, **more):
    scores = {"mse": 0.01, "psnr": psnr, "ssim": 0.6}
    ci95 = {"mse": 0.001, "psnr": 0.05, "ssim": 0.01}
    return {
        "name": name,
        "seed": seed,
        "seconds": 60.0 * (1 + seed),
        "epochs": 10.0,
        "parameters": 3217,
        "device": "cpu",
        "evaluation": scores | {"ci95": ci95},
        "baseline": scores | {"psnr": 10.7, "ci95": ci95},
        **more,
    }


def test_the_table_is_made_of_summaries(tmp_path):
    results = script("results_table")
    median = summary("", 0, 14.0)["evaluation"] | {"settings": {"size": 5}}
    runs = [
        summary("fashion_mnist_denoise", 0, 18.0),
        summary("fashion_mnist_denoise", 1, 19.0),
        summary("fashion_mnist_unet", 0, 20.5, device="TPU v5", classical={"median": median}),
    ]
    for index, run in enumerate(runs):
        (tmp_path / f"{index}.json").write_text(json.dumps(run))
    table = results["tables"](results["load"](tmp_path))
    rows = {
        cells[1].strip(): cells for cells in (line.split("|") for line in table.splitlines()[2:])
    }
    assert rows["median (size 5)"][3].strip() == "14.00 ± 0.05"
    own = rows["[`fashion_mnist_denoise`](fashion_mnist_denoise.py)"]
    assert own[2].strip() == "3,217"
    assert own[3].strip() == "18.50 ± 0.05"
    assert own[4].strip() == "2, 18.00 to 19.00"
    assert own[7].strip() == "10 epochs, 1.5 min"
    other = rows["[`fashion_mnist_unet`](fashion_mnist_unet.py)"]
    assert other[7].strip() == "10 epochs, 1.0 min on TPU v5"
    assert "LFW" not in table

    (tmp_path / "again.json").write_text(json.dumps(runs[0]))
    with pytest.raises(ValueError, match="of this seed already"):
        results["load"](tmp_path)


def test_the_readmes_table_is_the_one_that_the_script_makes():
    results = script("results_table")
    readme = (EXPERIMENTS / "README.md").read_text()
    table = results["tables"](results["load"](EXPERIMENTS / "results"))
    assert table
    assert results["inserted"](readme, table) == readme
