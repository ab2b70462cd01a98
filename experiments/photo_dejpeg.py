"""Photographs without the blocks of JPEG: trained on crops of photographs, compressed anew.

    python experiments/photo_dejpeg.py --data.data-dir MY_PHOTOS

MY_PHOTOS is a folder of pictures, of any sizes from 96×96 pixels on. Each crop is compressed with a
quality of its own, with and without halved colour. A tenth of the pictures are held out, whole, for
validation.

`photo-dejpeg` is a larger network, which `--training.start-from photo-dejpeg` goes on with:

    python experiments/photo_dejpeg.py --data.data-dir MY_PHOTOS --model.features 48 48 56 \\
        --model.blocks 3 --data.crop 128 --data.crops-per-image 2300 --training.batch-size 32 \\
        --training.steps 35593 --training.precision bfloat16 --optimizer.warmup-steps 500 \\
        --optimizer.clip-norm 1

It was trained so on 506 photographs, in 137 s of an H100's time, except that the learning rate fell
with the time that had passed instead of the steps; then 500 steps in float32 from a rate of 1e-4 on
a CPU. PSNR on LIVE1, before and after: 25.69 and 27.21 dB at quality 10, 28.06 and 29.52 at 20,
30.28 and 31.72 at 40.
"""

from aecore.cli import main
from aecore import Data, Experiment, Optimizer, Training
from aecore.degradations import JPEG
from aecore.models import UNet

experiment = Experiment(
    name="photo_dejpeg",
    model=UNet(features=(32, 64, 96), channels=3, patch=2),
    degradation=JPEG(quality=(5, 95), subsampling=("4:2:0", "4:4:4")),
    data=Data(dataset="folder", crop=96, crops_per_image=16, turn=True),
    optimizer=Optimizer(learning_rate=1e-3, schedule="cosine", warmup_steps=200, ema=0.999),
    training=Training(batch_size=8, epochs=1000, steps=8000, loss="mae", feed="resident"),
)

if __name__ == "__main__":
    main(experiment)
