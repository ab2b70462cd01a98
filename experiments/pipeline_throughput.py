"""Images per second through the input pipeline, beside the usual chain of one image at a time.

    python experiments/pipeline_throughput.py
    python experiments/pipeline_throughput.py --photographs DIR

Without `--photographs`, the usual chain is `from_tensor_slices → shuffle → map → batch → prefetch`
of tf.data. Both pipelines make float32 batches of 28×28 images with Gaussian noise of σ = 0.4. The
60,000 images are those of the sample, repeated.

With it, the usual chain is a PyTorch DataLoader with 2 workers, to which all photographs are given
decoded: random crop, random mirroring and quarter turn, noise. PyTorch must be installed. Both
pipelines make float32 batches of 96×96 colour crops with Gaussian noise of σ = 0.1; a third one
leaves the noise to the device and makes bytes.

The pipelines take turns in one run; the ratio of the medians is printed last.

On 2 CPU cores, batches of 32 images of 28×28: 19,731 and 96,512 images/s, 4.9 times.
"""

import itertools
import statistics
import time
from collections.abc import Iterator

import numpy as np
import tyro

import aecore
from aecore.data import sources
from aecore.data.batches import training_batches
from aecore.degradations import GaussianNoise

SIGMA, PHOTOGRAPH_SIGMA = 0.4, 0.1


def per_image_batches(images: np.ndarray, batch_size: int) -> Iterator:
    """The usual chain of tf.data."""
    import tensorflow as tf

    def degrade(image):
        image = tf.cast(image, tf.float32) / 255.0
        noise = tf.random.normal(tf.shape(image), stddev=SIGMA)
        return tf.clip_by_value(image + noise, 0.0, 1.0), image

    return (
        tf.data.Dataset.from_tensor_slices(images)
        .shuffle(len(images))
        .repeat()
        .map(degrade, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(batch_size, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE)
        .as_numpy_iterator()
    )


def data_loader_batches(
    images: list[np.ndarray], batch_size: int, size: int, per_image: int
) -> Iterator:
    """The usual chain of PyTorch."""
    import torch
    from torch.utils import data

    tensors = [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in images]

    class RandomCrops(data.Dataset):
        def __len__(self):
            return per_image * len(tensors)

        def __getitem__(self, index):
            image = tensors[index % len(tensors)]
            top = int(torch.randint(image.shape[1] - size + 1, ()))
            left = int(torch.randint(image.shape[2] - size + 1, ()))
            crop = image[:, top : top + size, left : left + size]
            if torch.rand(()) < 0.5:
                crop = crop.flip(2)
            crop = torch.rot90(crop, int(torch.randint(4, ())), (1, 2))
            crop = crop.float() / 255
            noisy = (crop + PHOTOGRAPH_SIGMA * torch.randn_like(crop)).clamp(0, 1)
            return noisy, crop

    loader = data.DataLoader(
        RandomCrops(),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        persistent_workers=True,
    )
    while True:
        yield from loader


def photograph_pipelines(folder: str, batch_size: int, size: int, per_image: int) -> dict:
    """Those that make crops of photographs, decoded beforehand."""
    dataset = sources.load(
        aecore.Data(
            dataset="folder", data_dir=folder, crop=size, crops_per_image=per_image, turn=True
        )
    )
    images = [dataset.train[index] for index in range(len(dataset.train))]

    def batches(degradation):
        return training_batches(dataset.examples(), degradation, batch_size=batch_size, seed=0)

    return {
        "usual": data_loader_batches(images, batch_size, size, per_image),
        "aecore": batches(GaussianNoise(PHOTOGRAPH_SIGMA)),
        "bytes": batches(None),
    }


def main(
    photographs: str | None = None,
    batch_size: int = 32,
    crop: int = 96,
    crops_per_image: int = 16,
    seconds: float = 4.0,
    repeats: int = 5,
) -> None:
    """Prints images per second and their ratio.

    Args:
        photographs: A folder of them, none smaller than the crop.
        batch_size: Images a batch.
        crop: Side of the crops.
        crops_per_image: Crops of a photograph in an epoch.
        seconds: How long each measurement lasts.
        repeats: Measurements of each pipeline.
    """
    if photographs is not None:
        pipelines = photograph_pipelines(photographs, batch_size, crop, crops_per_image)
    else:
        images = np.tile(sources.whole_array(sources.load(aecore.Data()).train), (10, 1, 1, 1))
        pipelines = {
            "usual": per_image_batches(images, batch_size),
            "aecore": training_batches(images, GaussianNoise(SIGMA), batch_size=batch_size, seed=0),
        }
    speeds = {name: [] for name in pipelines}
    for name in itertools.chain.from_iterable([*pipelines] for _ in range(repeats + 1)):
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            next(pipelines[name])
            count += batch_size
        speeds[name].append(count / (time.perf_counter() - start))
    medians = {}
    for name, values in speeds.items():
        measured = values[1:]  # The first one fills buffers and finds its parallelism.
        medians[name] = statistics.median(measured)
        print(
            f"{name:10}{medians[name]:12,.0f} images/s  "
            f"({min(measured):,.0f} to {max(measured):,.0f}, {repeats} times)"
        )
    for name in list(medians)[1:]:
        print(f"{name} / usual {medians[name] / medians['usual']:8.2f}")


if __name__ == "__main__":
    tyro.cli(main)
