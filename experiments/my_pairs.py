"""What your own pairs of pictures have in common: trained on degraded pictures and their originals.

    python experiments/my_pairs.py --data.data-dir PAIRS

PAIRS/degraded and PAIRS/original hold pictures of the same names, pixel on pixel. If the originals
are twice as large, add `--model.scale 2`. Nothing more is done to the degraded ones.
"""

from aecore.cli import main
from aecore import Data, Experiment, Optimizer, Training
from aecore.degradations import Compose
from aecore.models import Upscaler

experiment = Experiment(
    name="my_pairs",
    model=Upscaler(width=32, blocks=4, scale=1),
    degradation=Compose(),
    data=Data(dataset="pairs", crop=96, crops_per_image=16, turn=True),
    optimizer=Optimizer(learning_rate=1e-3, schedule="cosine", warmup_steps=200, ema=0.999),
    training=Training(batch_size=16, epochs=1000, steps=5000, loss="mae"),
)

if __name__ == "__main__":
    main(experiment)
