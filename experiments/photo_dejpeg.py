"""Photographs without the blocks of JPEG: trained on crops of photographs, compressed anew.

    python experiments/photo_dejpeg.py --data.data-dir MY_PHOTOS

MY_PHOTOS is a folder of pictures, of any sizes from 96×96 pixels on. Each crop is compressed with a
quality of its own, with and without halved colour. A tenth of the pictures are held out, whole, for
validation.

On 2 CPU cores shared with other work, `--training.steps 5000` took 14 minutes on 512 photographs
(with `--data.crops-per-image 40`). PSNR on LIVE1, before and after: 25.69 and 26.69 dB at quality
10, 28.06 and 28.98 at 20, 30.28 and 31.16 at 40. It ships as `photo-dejpeg`.
"""

from aecore import Data, Experiment, Optimizer, Training
from aecore.cli import main
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
