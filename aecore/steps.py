"""One training step and one evaluation step, as pure functions of `(B, H, W, C)` batches.

Compiling them for some devices is `aecore.parallel`'s part.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aecore import losses, metrics
from aecore.degradations import Degradation
from aecore.state import TrainState

Apply = Callable[[Any, jax.Array], jax.Array]
"""`(params, images) -> images`."""


def train_step(
    state: TrainState,
    degraded: jax.Array,
    original: jax.Array,
    *,
    apply: Apply,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, jax.Array]:
    """One step of gradient descent.

    Args:
      state: before the step.
      degraded: `(B, H, W, C)` float32 in [0, 1], the network's input.
      original: what it should be, in the same form.
      apply: the network.
      optimizer: turns gradients into updates.

    Returns:
      The state after the step, and the loss before it: float32 scalar, the mean over images.
    """

    def loss_of(params):
        return jnp.mean(losses.mse(apply(params, degraded), original))

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), loss


def eval_step(
    params: Any, images: jax.Array, keys: jax.Array, *, apply: Apply, degradation: Degradation
) -> dict[str, jax.Array]:
    """Degrades, restores and scores images.

    Args:
      params: the network's parameters.
      images: `(B, H, W, C)` uint8 originals.
      keys: `(B,)` PRNG keys, one an image.
      apply: the network.
      degradation: what is done to the images first.

    Returns:
      `mse` of the network's output as it is, `psnr` and `ssim` of the output clipped to [0, 1];
      each `(B,)` float32.
    """
    original = images.astype(jnp.float32) / 255.0
    restored = apply(params, degradation(original, keys))
    clipped = jnp.clip(restored.astype(jnp.float32), 0.0, 1.0)
    return {
        "mse": losses.mse(restored, original),
        "psnr": metrics.psnr(clipped, original),
        "ssim": metrics.ssim(clipped, original),
    }
