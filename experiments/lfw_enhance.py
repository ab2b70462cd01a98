"""The enhance recipe: LFW faces at 80×80, pixelated to 32×32, split by person.

    python experiments/lfw_enhance.py --data.data-dir DIR

DIR holds the dataset as TFDS prepared it. Without the flag, TFDS's own folder is used, or the
dataset is downloaded.
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
