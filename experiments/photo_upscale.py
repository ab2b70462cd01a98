"""Photographs twice as large: trained on crops of photographs and their bicubic reductions.

    python experiments/photo_upscale.py --data.data-dir MY_PHOTOS
    python experiments/photo_upscale.py --data.data-dir MY_PHOTOS --model.scale 4 \\
        --degradation.scale 4 --run-dir runs/photo_upscale_4x

MY_PHOTOS is a folder of pictures, of any sizes from 96×96 pixels on. The untrained network is a
bicubic interpolation; it learns what that one lacks. A tenth of the pictures are held out, whole,
for validation.

`photo-upscale-2x` and `photo-upscale-4x` are larger networks, which `--training.start-from` goes on
with:

    python experiments/photo_upscale.py --data.data-dir MY_PHOTOS --model.width 64 \\
        --model.blocks 5 --data.crops-per-image 2100 --training.batch-size 32 \\
        --training.steps 32649 --training.precision bfloat16 --optimizer.warmup-steps 500 \\
        --optimizer.clip-norm 1

For the second, blocks are 8, the scale is 4, crops are 192×192, and steps 33,033. They were
trained so on 506 photographs, in 71 and 75 s of an H100's time, except that the learning rate fell
with the time that had passed instead of the steps; then 400 steps in float32 from a rate of 1e-4
on a CPU, without which bfloat16's rounding would show as a faint grid.

PSNR on luma of what bicubic interpolation and the network make of Set5: 33.68 and 37.61 dB (×2),
28.43 and 31.73 (×4); of Set14: 30.33 and 33.16 (×2), 26.09 and 28.25 (×4).
"""

from aecore.cli import main
from aecore import Data, Experiment, Optimizer, Training
from aecore.degradations import Downscale
from aecore.models import Upscaler

experiment = Experiment(
    name="photo_upscale",
    model=Upscaler(width=32, blocks=4, scale=2),
    degradation=Downscale(2),
    data=Data(dataset="folder", crop=96, crops_per_image=16, turn=True),
    optimizer=Optimizer(learning_rate=1e-3, schedule="cosine", warmup_steps=200, ema=0.999),
    training=Training(batch_size=16, epochs=1000, steps=5000, loss="mae", feed="resident"),
)

if __name__ == "__main__":
    main(experiment)
