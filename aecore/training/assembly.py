"""Puts an experiment's devices, network, optimizer and training step together."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import numpy as np
import optax

from aecore import losses
from aecore.config import Data, Experiment, Optimizer, Training
from aecore.data.batches import Batch
from aecore.data.crops import Crops
from aecore.data.sources import Dataset
from aecore.errors import ConfigError
from aecore.networks.base import abstract_params
from aecore.networks.network import LinenNetwork, Precision
from aecore.restoring.tiled import in_tiles
from aecore.steps import cpu, state, step
from aecore.steps.devices import COMPILED_BY, Devices, equally_many
from aecore.steps.state import TrainState
from aecore.steps.step import Apply, Loss, Prepare

_CACHE_BYTES = 35 * 2**19
"""Activations, as `activation_bytes` counts them, with which a step is fastest on CPUs.

With 2 cores and 4 MiB of L2 cache, parts of 17 MiB are faster than those of half or twice the size
for several UNets, by 5 to 20 %; the denoise recipe's, of batch 256, should have no more than 9."""


ExampleKind = Literal["images", "crops", "pairs"]
"""Of training examples: whole images, crops of images, or crops of degraded and original images."""


@dataclasses.dataclass(frozen=True)
class Assembly:
    """An experiment put together for images of one size on some devices; all choices are made."""

    model: Any
    image_shape: tuple[int, int, int]
    """Height, width and channels of the originals."""
    kind: ExampleKind
    devices: Devices
    batch_size: int
    apply: Apply
    """The network in float32, which restores large pictures in tiles."""
    apply_in_training: Apply
    """The network in the precision of training, from and to float32."""
    prepare: Prepare
    """Makes the network's inputs and targets from a batch as the feed delivers it."""
    degrades_on_device: bool
    """Whether batches are uint8 originals; else they are pairs that the host has degraded."""
    optimizer: optax.GradientTransformation
    loss: Loss
    ema: float | None
    parts: int
    """Parts in which a device's share of a batch is computed."""
    seed: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what the network takes."""
        return _input_shape(self.model, self.image_shape)

    def create(self) -> TrainState:
        """The state at step 0; pure, to be compiled or evaluated for its shapes."""
        return state.create(
            self.model, self.optimizer, self.input_shape, self.seed, ema=self.ema is not None
        )

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return self.devices.abstract(self.create)

    def flops_per_image(self) -> float:
        """Operations of a training step for an image: of the network, and twice that for gradients.

        As XLA counts them in the network as it is written; a multiply-add counts as two.
        """
        return 3.0 * _flops(self.model, self.input_shape)

    def train_step(
        self, before: TrainState, batch: Any, *, axis_name: str | None = None
    ) -> tuple[TrainState, jax.Array]:
        """`steps.step.train_step` of this experiment; pure, to be compiled."""
        return step.train_step(
            before,
            batch,
            apply=self.apply_in_training,
            prepare=self.prepare,
            optimizer=self.optimizer,
            seed=self.seed,
            loss=self.loss,
            ema=self.ema,
            parts=self.parts,
            axis_name=axis_name,
        )

    def abstract_batch(self) -> Any:
        """Shapes, dtypes and shardings of what `train_step` takes on all devices."""
        count, sharding = self.devices.batch_shape(self.batch_size), self.devices.sharded
        dtype = np.uint8 if self.degrades_on_device else np.float32
        degraded, original = (
            jax.ShapeDtypeStruct((*count, *shape), dtype, sharding=sharding)
            for shape in (self.input_shape, self.image_shape)
        )
        only_originals = self.degrades_on_device and self.kind != "pairs"
        return original if only_originals else Batch(degraded, original)


def _input_shape(model: Any, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    height, width, channels = image_shape
    scale = LinenNetwork(model).scale
    return height // scale, width // scale, channels


def devices(training: Training, parallel: str | None = None) -> Devices:
    """The devices that an experiment uses; on CPUs, the process keeps memory from then on.

    Args:
      training: says how many, and how steps are compiled for them.
      parallel: `jit` or `pmap`, in place of what `training` says.

    Raises:
      ConfigError: there are fewer devices, or they can't divide a batch among them.
    """
    available = jax.devices()
    if training.devices is not None:
        available = equally_many(available, training.devices)
    chosen = COMPILED_BY[parallel or training.parallel](available)
    chosen.check_batch_size(training.batch_size)
    if chosen.platform == "cpu":
        cpu.keep_memory()
    return chosen


def examples(experiment: Experiment, dataset: Dataset) -> np.ndarray | Crops:
    """What training takes batches from; see `Dataset.examples`.

    Raises:
      ConfigError: the model can't learn from the images, or there are fewer than in a batch.
      DataError: the crop's size is no multiple of the scale of pairs.
    """
    experiment.check_images(*dataset.image_shape, dataset.scale)
    found = dataset.examples(experiment.degradation.grid)
    if experiment.training.batch_size > len(found):
        raise ConfigError(
            f"batch_size {experiment.training.batch_size} is more than the {len(found)} "
            "training images; use a smaller one"
        )
    return found


def assemble(
    experiment: Experiment,
    image_shape: tuple[int, int, int],
    devices: Devices,
    last_step: int,
    *,
    batch_size: int | None = None,
    precision: Precision | None = None,
    parts: int | None = None,
    degrades_on_device: bool | None = None,
) -> Assembly:
    """Puts an experiment together.

    Args:
      experiment: what to train.
      image_shape: height, width and channels of the originals.
      devices: to train on.
      last_step: at which training ends, for a learning rate that falls until then.
      batch_size: in place of the experiment's, as are those that follow.
      precision: `float32` or `bfloat16`.
      parts: into how many parts a device's share of a batch is divided.
      degrades_on_device: whether the step degrades the images.

    Raises:
      ConfigError: a device's share of a batch can't be divided as `accumulation` says.
    """
    training = experiment.training
    batch_size = batch_size or training.batch_size
    if degrades_on_device is None:
        degrades_on_device = training.feed == "resident" or training.degrade_on == "device"
    kind = _kind(experiment.data)
    network = LinenNetwork(experiment.model)
    if parts is None:
        share = batch_size // devices.device_count
        parts = _parts(experiment, image_shape, share, devices.platform)
    return Assembly(
        model=experiment.model,
        image_shape=image_shape,
        kind=kind,
        devices=devices,
        batch_size=batch_size,
        apply=in_tiles(network),
        apply_in_training=network.in_precision(precision or training.precision).apply,
        prepare=_prepare(experiment, kind) if degrades_on_device else step.pairs,
        degrades_on_device=degrades_on_device,
        optimizer=optimizer(experiment.optimizer, last_step),
        loss=losses.LOSSES[training.loss],
        ema=experiment.optimizer.ema,
        parts=parts,
        seed=training.seed,
    )


def _kind(data: Data) -> ExampleKind:
    if data.crop is None:
        return "images"
    return "pairs" if data.dataset == "pairs" else "crops"


def _prepare(experiment: Experiment, kind: ExampleKind) -> Prepare:
    """How uint8 images become inputs and targets on the device."""
    if kind == "pairs":
        return step.degrading_pairs(experiment.degradation)
    # Crops were mirrored when they were cut.
    flip = experiment.training.flip and kind == "images"
    return step.degrading(experiment.degradation, flip)


def learning_rate(settings: Optimizer, last_step: int) -> optax.Schedule | float:
    """The learning rate as a function of the step, or constant; training ends at `last_step`."""
    rate = settings.learning_rate
    warmup = min(settings.warmup_steps, last_step // 2)
    if settings.schedule == "cosine":
        rate = optax.cosine_decay_schedule(rate, last_step - warmup)
    if not warmup:
        return rate
    # Step n takes (n + 1) / (warmup + 1) of the rate: the first one already moves.
    rise = optax.linear_schedule(
        settings.learning_rate / (warmup + 1), settings.learning_rate, warmup
    )
    then = rate if callable(rate) else optax.constant_schedule(rate)
    return optax.join_schedules([rise, then], [warmup])


def optimizer(settings: Optimizer, last_step: int) -> optax.GradientTransformation:
    """Turns gradients into updates, in a training that ends at `last_step`."""
    rate = learning_rate(settings, last_step)
    if settings.weight_decay:

        def kernels(params):
            return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

        adam = optax.adamw(rate, weight_decay=settings.weight_decay, mask=kernels)
    else:
        adam = optax.adam(rate)
    if settings.clip_norm is None:
        return adam
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adam)


def _parts(
    experiment: Experiment, image_shape: tuple[int, int, int], share: int, platform: str
) -> int:
    """Into how many parts a device's share of a batch is divided."""
    wanted = experiment.training.accumulation
    divisors = [count for count in range(1, share + 1) if share % count == 0]
    if wanted is not None:
        if share % wanted:
            raise ConfigError(
                f"training.accumulation {wanted} does not divide the {share} images of a device; "
                f"use one of {', '.join(map(str, divisors))}"
            )
        return wanted
    if platform != "cpu":
        return 1
    # A network may keep nothing for its backward pass.
    fitting = _CACHE_BYTES // max(1, activation_bytes(experiment.model, image_shape))
    return next(count for count in divisors if share // count <= max(1, fitting))


@functools.lru_cache(maxsize=16)
def _flops(model: Any, shape: tuple[int, int, int]) -> float:
    """XLA's count for one image of this shape."""
    images = jax.ShapeDtypeStruct((1, *shape), np.float32)
    apply = jax.jit(lambda params, images: model.apply({"params": params}, images))
    lowered = apply.lower(abstract_params(model, shape), images)
    return (lowered.cost_analysis() or {}).get("flops", 0.0)


@functools.lru_cache(maxsize=16)
def activation_bytes(model: Any, image_shape: tuple[int, int, int]) -> int:
    """What a float32 training step keeps of each image for the backward pass."""
    shape = _input_shape(model, image_shape)
    params = abstract_params(model, shape)
    apply = LinenNetwork(model).apply

    def kept(count):
        images = jax.ShapeDtypeStruct((count, *shape), np.float32)
        saved = jax.eval_shape(
            lambda params, images: jax.vjp(lambda params: apply(params, images), params)[1],
            params,
            images,
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))

    return kept(2) - kept(1)
