"""Photographs without noise: a blind denoiser, trained on crops of photographs at full resolution.

    python experiments/photo_denoise.py --data.data-dir MY_PHOTOS

MY_PHOTOS is a folder of pictures, of any sizes from 96×96 pixels on; a few hundred are enough. Each
crop gets noise of its own strength, from none to σ = 75 of 255. A tenth of the pictures are held
out, whole, for validation.

On 2 free CPU cores this takes about 20 minutes. `--training.start-from photo-denoise` begins with
what those weights have learned, and with their network, which is larger:

    python experiments/photo_denoise.py --data.data-dir MY_PHOTOS --model.features 48 48 56 \\
        --model.blocks 3 --data.crop 128 --data.crops-per-image 2600 --training.batch-size 32 \\
        --training.steps 40724 --training.precision bfloat16 --optimizer.learning-rate 1e-3 \\
        --optimizer.warmup-steps 500 --optimizer.clip-norm 1

`photo-denoise` was trained so on 506 photographs, in 159 s of an H100's time, except that the
learning rate fell with the time that had passed instead of the steps; then 500 steps in float32
from a rate of 1e-4 on a CPU, which took away what bfloat16's rounding had left: flat areas that
were half a level of 255 too dark. PSNR on CBSD68, before and after: 24.61 and 33.71 dB at σ = 15,
20.17 and 31.08 at 25, 14.15 and 27.89 at 50.

In gray pictures, noise is the same in all colours, which the network must have met:
`--degradation.gray 0.3` makes it so in three of ten crops. `photo-denoise-gray` started from
`photo-denoise`, with a rate of 5e-4 after 100 steps, an average of 0.998, batches of 16 crops of
128×128, and 4,800 steps in float32, which take two free CPU cores an hour; every second photograph
was there in gray, too. PSNR on CBSD68 in gray: 24.61 and 31.11 dB, 20.17 and 28.73, 14.15 and
25.90; in colour it is 0.07 to 0.14 dB below `photo-denoise`.
"""

from aecore.cli import main
from aecore import Data, Experiment, Optimizer, Training
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
