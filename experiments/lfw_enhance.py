"""The enhance recipe: LFW faces at 80×80, pixelated to 32×32, split by person.

    python experiments/lfw_enhance.py --data.data-dir DIR

DIR holds the dataset as TFDS prepared it. Without the flag, TFDS's own folder is used, or the
dataset is downloaded.

Training costs about 27 GFLOP an image, so this is for a GPU or TPU, and has not been run to its end
yet. What was run, on 2 CPU cores and 10,358 images of 4,566 people:

    python experiments/lfw_enhance.py --data.data-dir DIR --training.steps 30
        --training.batch-size 8 --training.log-every 3 --data.validation-fraction 0.02

30 steps took 68 s with evaluation, 5.9 images/s; the loss fell from 0.64 (mean of the first three
steps) to 0.023.
The pixelated images of the 1,036 that the default split holds out score an MSE of 0.00529
(22.76 dB; the mean of each image's PSNR is 23.16 dB) and an SSIM of 0.799.
"""

from aecore import Data, Experiment, Optimizer, Training
from aecore.cli import main
from aecore.degradations import Pixelate
from aecore.models import ResolutionEnhancer

experiment = Experiment(
    name="lfw_enhance",
    model=ResolutionEnhancer(),
    degradation=Pixelate(0.4),
    # The recipe's own resizing, without antialiasing: its inputs are as sharp as aliasing makes
    # them, and its scores hold for those.
    data=Data(dataset="lfw", image_size=(80, 80), resize="bilinear"),
    optimizer=Optimizer(learning_rate=1e-3),
    training=Training(batch_size=128, epochs=50, patience=4, min_delta=1e-4),
)

if __name__ == "__main__":
    main(experiment)
