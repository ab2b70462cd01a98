"""Writes a function on images as an ONNX graph.

Images are `(B, H, W, C)` float32 in [0, 1]. The function is traced once, with symbolic B, H and W,
and each JAX primitive of the trace becomes one or a few ONNX nodes. Sizes that depend on the
images are computed in the graph. Three things keep the graph small:

- What depends on no image is computed here and becomes a constant.
- An array remembers in which order its axes are stored. It is transposed only for a node that
  needs another order, so convolutions, which are NCHW in ONNX, don't each turn it around.
- An array that was repeated along an axis is stored with size 1 there, as ONNX broadcasts.

All floating-point numbers are float32 in the graph, even where the function uses fewer bits; all
integers are int64. Of code for several platforms, the default is written.

The primitives that are known here are those that the following emit. aecore's own networks need
about half; the rest is what convolutional networks for images usually have.

- Layers: convolutions (strided, dilated, grouped, transposed), dense layers, einsum and attention,
  max and average pooling, LayerNorm, GroupNorm, RMSNorm, InstanceNorm and BatchNorm in inference.
- Activations: relu, relu6, leaky_relu, prelu, elu, celu, selu, gelu, silu, sigmoid, hard_sigmoid,
  tanh, hard_tanh, softplus, soft_sign, glu, softmax and log_softmax; arithmetic and comparisons.
- Sizes and places: `jax.image.resize` (nearest, bilinear, bicubic), depth-to-space and
  space-to-depth (reshape, transpose, stack), repeat, tile, concatenate, split, slices, flip, and
  `jnp.pad` (constant, edge, reflect, symmetric).

Every other primitive is refused by its name.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import onnx

from aecore.errors import ConfigError
from aecore.saved.onnx.graph import INPUT, Array, Graph, natural
from aecore.saved.onnx.trace import translate

_OPSET = 17
# The oldest that may hold this opset: a newer one would only shut out older readers.
_IR_VERSION = 8

_EXTENDED, _OUTPUT = "extended", "restored"


def convert(
    function: Callable[[jax.Array], jax.Array],
    *,
    channels: int,
    stride: int,
    scale: int = 1,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Writes a function on images as an ONNX model for images of any size.

    The model needs ONNX operator set 17. Its input `images` is `(batch, height, width, channels)`
    float32 in [0, 1], each side at least 1. Its output `restored` is
    `(batch, scale height, scale width, channels)` float32. As `Restorer` does, the model extends
    sides that are not multiples of `stride` by reflection, and crops the result.

    Args:
      function: takes `(B, H, W, C)` float32 in [0, 1] and gives `(B, scale H, scale W, C)`, for
        every B, and every H and W that are multiples of `stride`. It holds its parameters.
      channels: C.
      stride: what H and W must be multiples of.
      scale: how many times larger the function makes the sides.
      metadata: is stored in the model's `metadata_props`.

    Raises:
      ConfigError: the function can't be traced without knowing H and W, uses something that can't
        be written, or returns another shape.
    """
    shape = jax.export.symbolic_shape(f"b, {stride}*h, {stride}*w, {channels}")
    batch, height, width, _ = shape
    try:
        trace = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, jnp.float32))
    except jax.errors.InconclusiveDimensionOperation as error:
        raise ConfigError(
            "the network depends on the images' height or width in a way that aecore can't write "
            f"as ONNX ({str(error).strip().splitlines()[0]}); export without --format onnx"
        ) from error
    made = [tuple(aval.shape) for aval in trace.out_avals]
    wanted = (batch, scale * height, scale * width, channels)
    if made != [wanted]:
        raise ConfigError(
            f"the network makes {', '.join(map(str, made)) or 'nothing'} of images "
            f"{tuple(shape)}; for ONNX, it must make {wanted}"
        )

    graph = Graph(INPUT if stride == 1 else _EXTENDED, stride)
    if stride > 1:
        graph.extend(INPUT, output=_EXTENDED)
    (restored,) = translate(graph, trace, [Array(tuple(shape), graph.images, natural(4))])
    restored = graph.dense(restored, natural(4))
    if stride > 1:
        restored = graph.crop(restored, scale)
    graph.node("Identity", restored, output=_OUTPUT)
    nodes, constants = graph.needed_for(_OUTPUT)
    sides = ["height", "width"]
    larger = sides if scale == 1 else [f"{scale} * {side}" for side in sides]
    images, output = (
        onnx.helper.make_tensor_value_info(
            name, onnx.TensorProto.FLOAT, ["batch", *sides, channels], "NHWC, in [0, 1]"
        )
        for name, sides in ((INPUT, sides), (_OUTPUT, larger))
    )
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "restore",
            [images],
            [output],
            [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        producer_name="aecore",
        opset_imports=[onnx.helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
    )
    onnx.helper.set_model_props(model, dict(metadata or {}))
    return model
