"""An experiment in; its devices, network, optimizer, state and training step out."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aecore import losses
from aecore.config import Experiment, Optimizer, Training
from aecore.errors import ConfigError
from aecore.networks.network import in_precision
from aecore.steps import state, step
from aecore.steps.devices import FORMS, DataParallel
from aecore.steps.step import Apply, of_model

_CACHE_BYTES = 12 * 2**20
"""Activations, as `activation_bytes` counts them, with which a step is fastest on CPUs."""


class Assembly(NamedTuple):
    """What an experiment comes to, for images of one size on some devices."""

    apply: Apply
    """The network in float32."""
    create: Callable
    """`() -> TrainState` at step 0."""
    train_step: Callable
    """`train_step` but for `prepare` and `axis_name`."""


def devices(training: Training) -> DataParallel:
    """The devices that an experiment uses, in the form that it asks for.

    Raises:
      ConfigError: there are fewer devices, or they can't divide a batch among them.
    """
    available = jax.devices()
    if training.devices is not None and training.devices > len(available):
        raise ConfigError(
            f"training.devices {training.devices} is more than the {len(available)} there are; "
            "use fewer, or None for all"
        )
    chosen = FORMS[training.parallel](available[: training.devices])
    chosen.check_batch_size(training.batch_size)
    return chosen


def assemble(
    experiment: Experiment,
    image_shape: tuple[int, int, int],
    parallel: DataParallel,
    last_step: int,
) -> Assembly:
    """Puts an experiment together.

    Args:
      experiment: what to train.
      image_shape: height, width and channels.
      parallel: the devices.
      last_step: at which training will end, for a learning rate that falls until then.

    Raises:
      ConfigError: a device's share of a batch can't be divided as `accumulation` says.
    """
    training = experiment.training
    apply = of_model(experiment.model)
    settings = experiment.optimizer
    transformation = optimizer(settings, last_step)
    create = functools.partial(
        state.create,
        experiment.model,
        transformation,
        image_shape,
        training.seed,
        ema=settings.ema is not None,
    )
    share = training.batch_size // parallel.device_count
    train_step = functools.partial(
        step.train_step,
        apply=apply
        if training.precision == "float32"
        else in_precision(apply, jnp.dtype(training.precision)),
        optimizer=transformation,
        seed=training.seed,
        loss=losses.LOSSES[training.loss],
        ema=settings.ema,
        parts=_parts(experiment, image_shape, share, parallel.platform),
    )
    return Assembly(apply, create, train_step)


def optimizer(settings: Optimizer, last_step: int) -> optax.GradientTransformation:
    """What turns gradients into updates, in a training that ends at `last_step`."""
    rate = settings.learning_rate
    warmup = min(settings.warmup_steps, last_step // 2)
    if settings.schedule == "cosine":
        rate = optax.cosine_decay_schedule(rate, last_step - warmup)
    if warmup:
        # Step n takes (n + 1) / (warmup + 1) of the rate: the first one already moves.
        rise = optax.linear_schedule(
            settings.learning_rate / (warmup + 1), settings.learning_rate, warmup
        )
        then = rate if callable(rate) else optax.constant_schedule(rate)
        rate = optax.join_schedules([rise, then], [warmup])
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
    fitting = _CACHE_BYTES // activation_bytes(experiment.model, image_shape)
    return next(count for count in divisors if share // count <= max(1, fitting))


def activation_bytes(model, image_shape: tuple[int, int, int]) -> int:
    """What a float32 training step keeps of each image for the backward pass."""
    params = state.abstract_params(model, image_shape)
    apply = of_model(model)

    def kept(count):
        images = jax.ShapeDtypeStruct((count, *image_shape), np.float32)
        saved = jax.eval_shape(
            lambda params, images: jax.vjp(lambda params: apply(params, images), params)[1],
            params,
            images,
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))

    return kept(2) - kept(1)
