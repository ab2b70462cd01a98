"""The training state: arrays and nothing else."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """Everything that training changes."""

    step: jax.Array
    """Steps done so far, int32 scalar."""
    params: Any
    """The network's parameters, float32."""
    opt_state: Any
    """The optimizer's state for them."""
    ema: Any = None
    """An exponential moving average of the parameters; None if there is none."""

    @property
    def inference_params(self) -> Any:
        """The parameters to evaluate and restore with: the average, if one is kept."""
        return self.params if self.ema is None else self.ema


def create(
    model: Any,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    seed: int,
    ema: bool = False,
) -> TrainState:
    """The state at step 0; a pure function, for `jit` or `jax.eval_shape`.

    Args:
      model: a Linen module.
      optimizer: an optax transformation.
      image_shape: height, width and channels.
      seed: seed of the initial parameters.
      ema: whether to keep an average of the parameters; it starts equal to them.
    """
    images = jnp.zeros((1, *image_shape), jnp.float32)
    params = model.init(jax.random.key(seed), images)["params"]
    # A copy, since a step's input is donated.
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def count_parameters(params: Any) -> int:
    """How many numbers a tree of arrays, or of their shapes, holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
