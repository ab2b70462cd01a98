"""Photographs without noise: a blind denoiser, trained on crops of photographs at full resolution.

    python experiments/photo_denoise.py --data.data-dir MY_PHOTOS

MY_PHOTOS is a folder of pictures, of any sizes from 96×96 pixels on; some hundred are enough. Each
crop gets noise of its own strength, from none to σ = 75 of 255. A tenth of the pictures are held
out, whole, for validation.

`photo-denoise` is a larger network, trained longer on 512 photographs:

    python experiments/photo_denoise.py --data.data-dir MY_PHOTOS --model.blocks 2 \\
        --data.crops-per-image 32 --training.steps 12000

On 2 CPU cores shared with other work, this took 69 minutes. PSNR on CBSD68, before and after: 24.61
and 33.42 dB at σ = 15, 20.17 and 30.79 at 25, 14.15 and 27.61 at 50.
"""

from aecore import Data, Experiment, Optimizer, Training
from aecore.cli import main
from aecore.degradations import GaussianNoise
from aecore.models import UNet

experiment = Experiment(
    name="photo_denoise",
    model=UNet(features=(32, 64, 96), channels=3, patch=2),
    # As in the benchmarks, noise is neither clipped nor rounded.
    degradation=GaussianNoise((0.0, 75 / 255), clip=False),
    data=Data(dataset="folder", crop=96, crops_per_image=16, turn=True),
    optimizer=Optimizer(learning_rate=1.5e-3, schedule="cosine", warmup_steps=200, ema=0.999),
    training=Training(batch_size=8, epochs=1000, steps=8000, loss="mae", feed="resident"),
)

if __name__ == "__main__":
    main(experiment)
