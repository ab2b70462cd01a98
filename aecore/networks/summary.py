"""What a network is, layer by layer, and what it was trained on, as text."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from aecore.networks import layers, receptive_field
from aecore.networks.layers import Operation
from aecore.networks.network import LinenNetwork, Network


@dataclasses.dataclass(frozen=True)
class Layer:
    """A module of a network that has parameters of its own."""

    name: str
    shape: tuple[int, int, int]
    """Height, width and channels of what it gives."""
    parameters: int
    flops: float
    """Of an image: twice the multiplications with the kernel."""
    field: int | None
    """Height of the part of the image that one of its outputs depends on; None: all of it."""


def describe(model: Any, params: Any, image_shape: tuple[int, int, int]) -> list[Layer]:
    """The layers of a Linen module, in the order in which they are applied.

    Args:
      model: a network of `aecore.models`, or of one's own.
      params: its parameters.
      image_shape: height, width and channels, multiples of the stride.
    """
    import flax.linen as nn

    from aecore.networks.convolution import merge_phases

    calls = []

    def apply(params, images):
        calls.clear()

        def intercept(function, args, kwargs, context):
            output = function(*args, **kwargs)
            own = context.module.variables.get("params", {})
            has_own = any(not isinstance(leaf, Mapping) for leaf in own.values())
            operation = layers.operation(context.module, context.method_name)
            if has_own and operation is None and context.method_name == "__call__":
                operation = Operation()
            if has_own and operation is not None:
                whole = merge_phases(output) if operation.gives_phases else output
                positions = args[0] if operation.multiplies_inputs else whole
                calls.append((context.module.path, own, whole.shape, positions.shape))
                outputs.append(whole)
            return output

        outputs = []
        with nn.intercept_methods(intercept):
            model.apply({"params": params}, images)
        return outputs

    images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    jax.eval_shape(apply, params, images)
    described = list(calls)
    fields = receptive_field.sizes(
        apply, params, channels=image_shape[2], stride=model.stride, count=len(described)
    )
    found = []
    for (path, own, shape, positions), field in zip(described, fields, strict=True):
        leaves = jax.tree.leaves(own)
        kernel = max((leaf.size for leaf in leaves if leaf.ndim > 1), default=0)
        found.append(
            Layer(
                name="/".join(path),
                shape=shape[1:],
                parameters=sum(leaf.size for leaf in leaves),
                flops=2.0 * kernel * math.prod(positions[1:3]),
                field=field,
            )
        )
    return found


def summarize(network: Network, params: Any, description: Mapping[str, Any]) -> str:
    """What there is to say about a trained network.

    Args:
      network: the network.
      params: its parameters.
      description: of its checkpoint; what it lacks is left out.
    """
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    channels = network.channels
    head = (
        f"{network.name}: {count:,} parameters, for images of {channels} "
        f"channel{'s' * (channels != 1)} and of sides that are multiples of {network.stride} "
        "(others are extended)"
    )
    parts = [head]
    if isinstance(network, LinenNetwork):
        parts.append(_table(network, params, description))
    settings = [
        ("degradation", description.get("degradation")),
        ("data", description.get("data")),
        ("optimizer", description.get("optimizer")),
    ]
    lines = [
        f"{name:12} {', '.join(f'{key} {value}' for key, value in fields.items())}"
        for name, fields in settings
        if fields
    ]
    if description.get("step") is not None:
        lines.append(f"{'trained':12} {description['step']:,} steps")
    scores = description.get("metrics")
    if scores:
        lines.append(f"{'scores':12} {_scores(scores)}")
    parts.append("\n".join(lines))
    return "\n\n".join(part for part in parts if part)


def _table(network: LinenNetwork, params: Any, description: Mapping[str, Any]) -> str:
    size = description.get("image_size") or [16 * network.stride] * 2
    height, width = size
    rows = describe(network.model, params, (height, width, network.channels))
    lines = [f"{'layer':16} {'gives':>14} {'parameters':>12} {'FLOP':>14} {'sees':>10}"]
    for layer in rows:
        shape = "x".join(map(str, layer.shape))
        sees = "all" if layer.field is None else f"{layer.field}x{layer.field}"
        lines.append(
            f"{layer.name:16} {shape:>14} {layer.parameters:>12,} {layer.flops:>14,.0f} {sees:>10}"
        )
    total = sum(layer.flops for layer in rows)
    lines.append(f"{'all, an image':16} {'':14} {'':12} {total:>14,.0f}")
    return "\n".join(lines)


def _scores(scores: Mapping[str, Any]) -> str:
    return (
        f"MSE {scores['mse']:.5f}, PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.3f} "
        f"on {scores['images']:,} validation images"
    )
