"""A larger denoiser: Gaussian noise of σ = 0.4 on Fashion-MNIST, 3 epochs.

python experiments/fashion_mnist_unet.py --data.data-dir DIR
"""

from aecore import Data, Experiment, Optimizer, Training
from aecore.cli import main
from aecore.degradations import GaussianNoise
from aecore.models import UNet

experiment = Experiment(
    name="fashion_mnist_unet",
    model=UNet(features=(32, 64), patch=2, residual=False),
    degradation=GaussianNoise(0.4),
    data=Data(dataset="fashion_mnist"),
    optimizer=Optimizer(learning_rate=2e-3, schedule="cosine", warmup_steps=200, ema=0.999),
    training=Training(batch_size=32, epochs=3, feed="resident", flip=True),
)

if __name__ == "__main__":
    main(experiment)
