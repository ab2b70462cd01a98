"""One training step and one evaluation step, as pure functions of `(B, H, W, C)` batches.

`aecore.steps.devices` compiles them. Several devices run a step together, each on its share of the
batch; they average over the axis named by `axis_name`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from aecore import losses, metrics
from aecore.degradations import Degradation, JaxOps, augmentations
from aecore.steps.state import TrainState

Apply = Callable[[Any, jax.Array], jax.Array]
"""`(params, images) -> images`."""

Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""`(outputs, originals) -> (B,)`, one value per image."""

Prepare = Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
"""`(batch, keys) -> (degraded, original)`, both float32 in [0, 1]; one PRNG key per image."""


def train_step(
    state: TrainState,
    batch: Any,
    *,
    apply: Apply,
    prepare: Prepare,
    optimizer: optax.GradientTransformation,
    seed: int,
    loss: Loss = losses.mse,
    ema: float | None = None,
    parts: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, jax.Array]:
    """One step of gradient descent.

    Args:
      state: before the step.
      batch: arrays of `(B, ...)`, this device's share of the batch.
      apply: the network.
      prepare: makes the network's inputs and targets from a batch.
      optimizer: turns gradients into updates.
      seed: seed of the images' keys, which also depend on the step and on the place in the batch.
      loss: compares outputs with originals.
      ema: decay of the average of the parameters, if `state` holds one. It starts lower, so that
        the average quickly forgets the initial parameters.
      parts: number of equal parts of the batch whose gradients are computed one after another and
        averaged. The result is the same up to rounding.
      axis_name: name of the devices' axis; None for one device.

    Returns:
      The state after the step, and the loss before it: a float32 scalar, the mean over images.
    """

    def gradient(params, degraded, original):
        def loss_of(params):
            return jnp.mean(loss(apply(params, degraded), original))

        return jax.value_and_grad(loss_of)(params)

    size = jax.tree.leaves(batch)[0].shape[0]
    first = 0 if axis_name is None else lax.axis_index(axis_name) * size
    step_key = jax.random.fold_in(jax.random.key(seed), state.step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, first + jnp.arange(size))
    # Outside of the parts: compilers would draw the noise again wherever the network reads it.
    prepared = prepare(batch, keys)
    value, gradients = _mean_over_parts(gradient, parts, state.params, *prepared)
    if axis_name is not None:
        value, gradients = lax.pmean((value, gradients), axis_name)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = None
    if ema is not None:
        decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(params, state.ema, 1 - decay)
    return TrainState(state.step + 1, params, opt_state, average), value


def _mean_over_parts(function: Callable, parts: int, params: Any, *batch: Any) -> Any:
    """The mean of `function(params, *part)` over equal parts of a batch, one after another."""
    if parts == 1:
        return function(params, *batch)
    divided = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)
    # Traced once, for its shapes and for the loop.
    function = jax.jit(function, inline=True)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(params, *part)), None

    first = jax.tree.map(lambda leaf: leaf[0], divided)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, params, *first))
    # Two parts without a loop may overlap: on 2 cores, 6 to 12 % more steps of a UNet (32, 64 and
    # 96 features, 16 crops of 64×64). More would need more memory than glibc keeps at hand.
    total, _ = lax.scan(add, zeros, divided, unroll=parts == 2)
    return jax.tree.map(lambda leaf: leaf / parts, total)


def pairs(batch: tuple[jax.Array, jax.Array], keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`Prepare` for batches that were degraded on the host."""
    del keys
    degraded, original = batch
    return degraded, original


def degrading(
    degradation: Degradation, flip: bool = False, ops_of: type[JaxOps] = JaxOps
) -> Prepare:
    """`Prepare` for batches of `(B, H, W, C)` uint8 originals; `flip` mirrors them at random."""

    def prepare(images, keys):
        original = images.astype(jnp.float32) / 255.0
        ops = ops_of(keys)
        if flip:
            original = augmentations.flip(original, ops)
        return degradation.apply(original, ops), original

    return prepare


def degrading_pairs(degradation: Degradation, ops_of: type[JaxOps] = JaxOps) -> Prepare:
    """`Prepare` for pairs of `(B, ., ., C)` uint8 degraded and original images.

    The degradation is applied to images that are degraded already.
    """

    def prepare(batch, keys):
        degraded, original = (images.astype(jnp.float32) / 255.0 for images in batch)
        return degradation.apply(degraded, ops_of(keys)), original

    return prepare


def eval_step(
    params: Any,
    batch: Any,
    keys: jax.Array,
    *,
    apply: Apply,
    prepare: Prepare,
    sizes: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Degrades, restores and scores images.

    Args:
      params: the network's parameters.
      batch: what `prepare` takes, such as `(B, H, W, C)` uint8 originals.
      keys: `(B,)` PRNG keys, one per image.
      apply: the network.
      prepare: degrades them.
      sizes: as for `score`.

    Returns:
      `mse` of the unclipped output, `psnr` and `ssim` of the output clipped to [0, 1]; each `(B,)`
      float32.
    """
    degraded, original = prepare(batch, keys)
    return score(apply(params, degraded), original, sizes)


def score(
    restored: jax.Array, original: jax.Array, sizes: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Scores as `eval_step` returns them, from `(B, H, W, C)` restored and original images.

    Args:
      restored: by the network.
      original: what they should be.
      sizes: `(B, 2)`: of each image, only so many rows and columns count; None: all.
    """
    clipped = jnp.clip(restored.astype(jnp.float32), 0.0, 1.0)
    if sizes is None:
        return {
            "mse": losses.mse(restored, original),
            "psnr": metrics.psnr(clipped, original),
            "ssim": metrics.ssim(clipped, original),
        }
    return {
        "mse": metrics.mse_within(restored, original, sizes),
        "psnr": metrics.psnr_within(clipped, original, sizes),
        "ssim": metrics.ssim_within(clipped, original, sizes),
    }
