"""The enhance recipe: LFW faces at 80×80, pixelated to 32×32, split by person.

    python experiments/lfw_enhance.py --data.data-dir DIR

DIR is a folder with the dataset as prepared by TFDS. Without the flag, the data come from TFDS's
default folder, or are downloaded.

A training step costs about 27 GFLOP per image, so this is for a GPU or TPU. On one NVIDIA H100,
shared with another training,

    python experiments/lfw_enhance.py --data.data-dir DIR
        --training.feed resident --training.precision bfloat16

took 73 s, 43 s of them compiling and 21 s steps; it stopped by itself after 17 epochs. Scores of
the pixelated and the restored images, for 1,036 images of people who are not in the training data:
PSNR 23.16 and 27.53 dB, SSIM 0.799 and 0.887, MSE 0.00529 and 0.00195. Alone on the card, a step of
128 images takes 8.6 ms.
"""

from aecore.cli import main
from aecore import Data, Experiment, Optimizer, Training
from aecore.degradations import Pixelate
from aecore.models import ResolutionEnhancer

experiment = Experiment(
    name="lfw_enhance",
    model=ResolutionEnhancer(),
    degradation=Pixelate(0.4),
    # The recipe resizes without antialiasing, which makes images sharper; scores are only
    # comparable on the same images.
    data=Data(dataset="lfw", image_size=(80, 80), resize="bilinear"),
    optimizer=Optimizer(learning_rate=1e-3),
    training=Training(batch_size=128, epochs=50, patience=4, min_delta=1e-4),
)

if __name__ == "__main__":
    main(experiment)
