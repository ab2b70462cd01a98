"""A better denoiser at the recipe's cost: Gaussian noise of σ = 0.4 on Fashion-MNIST, 10 epochs.

python experiments/fashion_mnist_subpixel.py --data.data-dir DIR
"""

from aecore import Data, Experiment, Optimizer, Training
from aecore.cli import main
from aecore.degradations import GaussianNoise
from aecore.models import SubpixelAutoencoder

experiment = Experiment(
    name="fashion_mnist_subpixel",
    model=SubpixelAutoencoder(),
    degradation=GaussianNoise(0.4),
    data=Data(dataset="fashion_mnist"),
    optimizer=Optimizer(learning_rate=5e-3, schedule="cosine", warmup_steps=200),
    training=Training(batch_size=32, epochs=10, feed="resident"),
)

if __name__ == "__main__":
    main(experiment)
