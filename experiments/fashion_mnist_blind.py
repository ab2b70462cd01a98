"""One denoiser for every strength of noise: σ from 0 to 0.6 on Fashion-MNIST.

    python experiments/fashion_mnist_blind.py --data.data-dir DIR

After it, five networks of the same size (56,708 parameters) are trained with MSE, each for one σ
only, in run directories next to its own. Both kinds are scored on the 10,000 test images with noise
of that σ. On 2 CPU cores shared with other work, each training took 2 to 5 min. PSNR in dB:

| σ | noisy | blind | trained for that σ | difference |
|---|---|---|---|---|
| 0.1 | 21.62 | 26.68 | 26.95 | -0.27 |
| 0.2 | 15.97 | 23.54 | 23.69 | -0.15 |
| 0.3 | 12.81 | 21.64 | 21.81 | -0.18 |
| 0.4 | 10.72 | 20.28 | 20.49 | -0.21 |
| 0.5 | 9.30 | 19.22 | 19.50 | -0.28 |
"""

import dataclasses
import json

from etils import epath

from aecore.cli import main
from aecore import Data, Experiment, Optimizer, Training, evaluate, train
from aecore.degradations import GaussianNoise
from aecore.models import UNet

experiment = Experiment(
    name="fashion_mnist_blind",
    model=UNet(features=(16, 32), patch=2, residual=False, last_relu=True),
    degradation=GaussianNoise((0.0, 0.6)),
    data=Data(dataset="fashion_mnist"),
    optimizer=Optimizer(learning_rate=4e-3, schedule="cosine", warmup_steps=200),
    # With MSE, images with strong noise would make up nearly all of the loss.
    training=Training(batch_size=32, epochs=3, loss="log_mse", feed="resident"),
)


def then(blind: Experiment) -> None:
    """Trains one network for each σ, and prints its PSNR next to that of the blind network."""
    rows = []
    directory = epath.Path(blind.directory)
    for sigma in (0.1, 0.2, 0.3, 0.4, 0.5):
        one = dataclasses.replace(
            blind,
            name=f"{blind.name}_{sigma}",
            degradation=GaussianNoise(sigma),
            training=dataclasses.replace(blind.training, loss="mse"),
            run_dir=f"{directory}_{sigma}",
        )
        alone = train(one)["evaluation"]["psnr"]
        scores = evaluate(blind.directory, degradation=one.degradation)
        degraded, restored = (scores[name]["psnr"] for name in ("baseline", "evaluation"))
        rows.append({"sigma": sigma, "degraded": degraded, "blind": restored, "alone": alone})
    print("\n  σ   degraded   blind   for that σ alone")
    for row in rows:
        print(
            f"{row['sigma']:.1f}{row['degraded']:8.2f} dB{row['blind']:8.2f} dB"
            f"{row['alone']:8.2f} dB ({row['blind'] - row['alone']:+.2f})"
        )
    (directory / "blind.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(experiment, then=then)
