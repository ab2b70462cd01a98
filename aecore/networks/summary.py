"""A network as text: its layers, and what it was trained on."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from aecore.networks import receptive_field
from aecore.networks.network import LinenNetwork, Network


@dataclasses.dataclass(frozen=True)
class Row:
    """What the table says of one module that has parameters of its own."""

    name: str
    shape: tuple[int, int, int]
    """Height, width and channels of its result."""
    parameters: int
    flops: float
    """For one image: two for each multiplication with the kernel (a multiply and an add)."""
    field: int | None
    """Rows of the image that one of its outputs depends on; None: all of them."""


def layers(model: Any, params: Any, image_shape: tuple[int, int, int]) -> list[Row]:
    """The modules with parameters in a network, in the order in which they are applied.

    Args:
      model: a network of `aecore.models`, or your own.
      params: its parameters.
      image_shape: height, width and channels, multiples of the stride.
    """
    import flax.linen as nn  # Exported files do without Flax.

    from aecore.networks.layers import Layer, kernel_uses, own_parameters

    calls = []

    def apply(params, images):
        calls.clear()
        outputs = []

        def intercept(function, args, kwargs, context):
            output = function(*args, **kwargs)
            module = context.module
            own = own_parameters(module)
            if own and context.method_name == "__call__":
                whole = module.merged(output) if isinstance(module, Layer) else output
                calls.append((module, own, args[0].shape, whole.shape))
                outputs.append(whole)
            return output

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
    for (module, own, given, result), field in zip(described, fields, strict=True):
        leaves = jax.tree.leaves(own)
        kernels = sum(leaf.size for leaf in leaves if leaf.ndim > 1)
        found.append(
            Row(
                name="/".join(module.path),
                shape=result[1:4],
                parameters=sum(leaf.size for leaf in leaves),
                flops=2.0 * kernels * kernel_uses(module, given, result),
                field=field,
            )
        )
    return found


def summarize(
    network: Network,
    params: Any,
    description: Mapping[str, Any],
    about: Mapping[str, str] = types.MappingProxyType({}),
) -> str:
    """A trained network as text: its layers, its training and its scores.

    Args:
      network: the network.
      params: its parameters.
      description: its checkpoint's description as JSON values; parts that it lacks are left out.
      about: what else people should know: the fields of a `weights.Card`.
    """
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    channels = network.channels
    head = (
        f"{network.name}: {count:,} parameters, for images of {channels} "
        f"channel{'s' * (channels != 1)} with sides that are multiples of {network.stride} "
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
        started = description.get("started_from") or {}
        origin = started.get("source") or started.get("name")
        lines.append(
            f"{'trained':12} {description['step']:,} steps"
            + (f", starting from {origin} after {started['step']:,} steps" if origin else "")
        )
    scores = description.get("metrics")
    if scores:
        lines.append(f"{'scores':12} {_scores(scores)}")
    parts.append("\n".join(lines))
    words = {
        "purpose": "for",
        "data": "trained on",
        "limits": "not for",
        "benchmarks": "benchmarks",
        "licence": "licence",
        "sha256": "SHA-256",
    }
    known = [(word, about[key]) for key, word in words.items() if key in about]
    parts.insert(1, "\n".join(f"{word:12} {text}" for word, text in known))
    return "\n\n".join(part for part in parts if part)


def _table(network: LinenNetwork, params: Any, description: Mapping[str, Any]) -> str:
    side = 16 * network.stride * network.scale
    height, width = (size // network.scale for size in description.get("image_size") or [side] * 2)
    rows = layers(network.model, params, (height, width, network.channels))
    lines = [f"{'layer':16} {'gives':>14} {'parameters':>12} {'FLOP':>14} {'sees':>10}"]
    for layer in rows:
        shape = "x".join(map(str, layer.shape))
        sees = "all" if layer.field is None else f"{layer.field}x{layer.field}"
        lines.append(
            f"{layer.name:16} {shape:>14} {layer.parameters:>12,} {layer.flops:>14,.0f} {sees:>10}"
        )
    total = sum(layer.flops for layer in rows)
    lines.append(f"{'all, an image':16} {'':14} {'':12} {total:>14,.0f}")
    a_pixel = total / 2 / (height * width)
    per = "of the input" if network.scale > 1 else ""
    lines.append(f"{'multiply-adds':16} {a_pixel:,.0f} a pixel {per}".rstrip())
    return "\n".join(lines)


def _scores(scores: Mapping[str, Any]) -> str:
    return (
        f"MSE {scores['mse']:.5f}, PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.3f} "
        f"on {scores['images']:,} validation images"
    )
