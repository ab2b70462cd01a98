import re

import jax
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from aecore import losses, metrics
from aecore.errors import ImageError

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(
    "shape", [(4, 28, 28, 1), (3, 80, 80, 3), (2, 11, 17, 3), (1, 257, 394, 3), (1, 395, 256, 1)]
)
@pytest.mark.parametrize("strength", [0.005, 0.1, 0.5])
def test_metrics_agree_with_scikit_image(shape, strength):
    random = np.random.default_rng(0)
    targets = random.random(shape, np.float32)
    targets[:, : shape[1] // 2] = 1.0  # Flat areas are where variances cancel.
    noise = strength * random.standard_normal(shape, np.float32)
    outputs = np.clip(targets + noise, 0, 1)
    pairs = list(zip(targets.astype(np.float64), outputs.astype(np.float64), strict=True))

    psnr = [peak_signal_noise_ratio(target, output, data_range=1) for target, output in pairs]
    np.testing.assert_allclose(jax.jit(metrics.psnr)(outputs, targets), psnr, atol=1e-4)
    ssim = [
        structural_similarity(
            target,
            output,
            data_range=1,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for target, output in pairs
    ]
    np.testing.assert_allclose(jax.jit(metrics.ssim)(outputs, targets), ssim, atol=1e-4)
    mse = [((target - output) ** 2).mean() for target, output in pairs]
    np.testing.assert_allclose(jax.jit(losses.mse)(outputs, targets), mse, rtol=1e-5)


def test_ms_ssim_is_tensorflows():
    import tensorflow as tf

    targets = RANDOM.random((2, 192, 208, 3), np.float32)
    outputs = np.clip(targets + RANDOM.normal(0, (0.02, 0.1, 0.3), targets.shape), 0, 1).astype(
        np.float32
    )
    expected = tf.image.ssim_multiscale(targets, outputs, 1.0)
    np.testing.assert_allclose(jax.jit(metrics.ms_ssim)(outputs, targets), expected, atol=1e-4)


@pytest.mark.parametrize("side", [11, 22, 28, 80])
def test_ms_ssim_uses_the_scales_that_there_is_room_for(side):
    targets = RANDOM.random((2, side, side, 1), np.float32)
    ms_ssim = jax.jit(metrics.ms_ssim)
    np.testing.assert_allclose(ms_ssim(targets, targets), 1.0, atol=1e-5)
    assert (ms_ssim(1 - targets, targets) < 0.1).all()


def test_losses_are_their_formulas():
    targets, outputs = RANDOM.random((2, 3, 28, 28, 1), np.float32)
    error = outputs.astype(np.float64) - targets
    expected = {
        "mse": (error**2).mean(axis=(1, 2, 3)),
        "mae": np.abs(error).mean(axis=(1, 2, 3)),
        "charbonnier": np.sqrt(error**2 + 1e-6).mean(axis=(1, 2, 3)),
    }
    expected["log_mse"] = np.log(expected["mse"] + 2e-3)
    expected["ms_ssim_l1"] = 0.84 * (1 - np.asarray(jax.jit(metrics.ms_ssim)(outputs, targets))) + (
        0.16 * expected["mae"]
    )
    assert expected.keys() == losses.LOSSES.keys()
    for name, values in expected.items():
        loss = jax.jit(losses.LOSSES[name])
        np.testing.assert_allclose(loss(outputs, targets), values, rtol=1e-5)


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("outputs", ["equal", "opposite", "flat"])
def test_gradients_of_losses_are_finite_everywhere(name, outputs):
    targets = RANDOM.random((2, 28, 28, 1), np.float32)
    values = {"equal": targets, "opposite": 1 - targets, "flat": np.zeros_like(targets)}[outputs]
    gradient = jax.jit(jax.grad(lambda x: losses.LOSSES[name](x, targets).sum()))(values)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", [*losses.LOSSES, "psnr", "ssim", "ms_ssim"])
@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        ((2, 16, 16, 1), (2, 16, 16, 3)),
        ((1, 16, 16, 3), (2, 16, 16, 3)),
        ((2, 16, 16, 3), (16, 16, 3)),
        ((2, 16, 1, 3), (2, 16, 16, 3)),
        ((16, 16, 3), (16, 16, 3)),
    ],
)
def test_arrays_that_would_be_broadcast_are_refused(name, outputs, targets):
    compare = losses.LOSSES.get(name) or getattr(metrics, name)
    message = f"outputs of shape {outputs} can't be compared with targets of shape {targets}"
    with pytest.raises(ImageError, match=re.escape(message)):
        compare(np.zeros(outputs, np.float32), np.zeros(targets, np.float32))


@pytest.mark.parametrize("compare", [metrics.ssim, metrics.ms_ssim, losses.LOSSES["ms_ssim_l1"]])
@pytest.mark.parametrize("size", [(10, 16), (16, 4)])
def test_images_smaller_than_the_window_are_refused(compare, size):
    images = np.zeros((1, *size, 3), np.float32)
    with pytest.raises(ImageError, match=f"{size[0]}x{size[1]} .* at least 11 pixels"):
        compare(images, images)


FLOATS = np.zeros((2, 16, 16, 3), np.float32)


@pytest.mark.parametrize(
    "compare",
    [*losses.LOSSES.values(), metrics.psnr, metrics.ssim, metrics.ms_ssim, metrics.psnr_within],
)
@pytest.mark.parametrize(
    ("array", "what"),
    [
        (FLOATS.astype(np.uint8), "of dtype uint8"),
        (FLOATS.astype(np.int32), "of dtype int32"),
        (FLOATS.tolist(), "of type list"),
        (None, "of type NoneType"),
    ],
)
def test_only_arrays_of_floats_are_compared(compare, array, what):
    sizes = (np.full((2, 2), 16),) if compare is metrics.psnr_within else ()
    for pair, name in (((array, FLOATS), "outputs"), ((FLOATS, array), "targets")):
        with pytest.raises(ImageError, match=f"{name} {what} are no array of floats; pass one of"):
            compare(*pair, *sizes)


def test_a_tensor_is_no_array_of_floats():
    torch = pytest.importorskip("torch")
    with pytest.raises(ImageError, match="outputs of type Tensor are no array"):
        metrics.psnr(torch.zeros(2, 16, 16, 3), FLOATS)


def test_luma_is_that_of_rgb_alone():
    np.testing.assert_allclose(metrics.luma(FLOATS[0]), 16 / 255)
    for channels in (1, 4):
        with pytest.raises(ImageError, match=rf"\(16, 16, {channels}\) have no luma; pass RGB"):
            metrics.luma(np.zeros((16, 16, channels), np.float32))
    with pytest.raises(ImageError, match="images of dtype uint8 are no array of floats"):
        metrics.luma(FLOATS.astype(np.uint8))


@pytest.mark.parametrize("name", ["mse_within", "psnr_within", "ssim_within"])
def test_sizes_may_be_a_list_of_one_for_each_image(name):
    outputs, targets = RANDOM.random((2, 2, 16, 16, 3), np.float32)
    compare, whole = getattr(metrics, name), name.removesuffix("_within")
    scores = compare(outputs, targets, [[12, 13], [16, 16]])
    parts = (slice(0, 1), slice(12), slice(13)), (slice(1, 2),)
    expected = [
        float(getattr(metrics, whole, losses.mse)(outputs[part], targets[part])[0])
        for part in parts
    ]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    for sizes in ([12, 13], [[12, 13]], 12):
        with pytest.raises(ImageError, match="don't fit 2 images; pass rows and columns of each"):
            compare(outputs, targets, sizes)
