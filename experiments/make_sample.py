"""Makes the sample that ships in the package: `aecore/data/sample/fashion_mnist.npz`.

    python experiments/make_sample.py --data-dir /usr/share/datasets/fashion-mnist

The first 6,000 training and the first 1,000 test images of Fashion-MNIST's IDX files, which
Debian's package `dataset-fashion-mnist` holds. Fashion-MNIST is (c) 2017 Zalando SE, MIT licence,
kept beside the file. Running this again writes the same arrays.
"""

from pathlib import Path

import numpy as np
import tyro

import aecore
from aecore.data import sources


def main(data_dir: str, out: Path = Path("aecore/data/sample/fashion_mnist.npz")) -> None:
    """Writes the sample.

    Args:
        data_dir: Folder of Fashion-MNIST's IDX files.
        out: The file to write.
    """
    full = sources.load(aecore.Data(dataset="fashion_mnist", data_dir=data_dir))
    train, validation = map(sources.whole_array, (full.train, full.validation))
    out.parent.mkdir(exist_ok=True)
    np.savez_compressed(out, train=train[:6000, ..., 0], validation=validation[:1000, ..., 0])
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    tyro.cli(main)
