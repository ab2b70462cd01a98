import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from aecore import losses, metrics


@pytest.mark.parametrize("shape", [(4, 28, 28, 1), (3, 80, 80, 3), (2, 11, 17, 3)])
@pytest.mark.parametrize("strength", [0.005, 0.1, 0.5])
def test_metrics_agree_with_scikit_image(shape, strength):
    random = np.random.default_rng(0)
    targets = random.random(shape, np.float32)
    targets[:, : shape[1] // 2] = 1.0  # Flat areas are where variances cancel.
    noise = strength * random.standard_normal(shape, np.float32)
    outputs = np.clip(targets + noise, 0, 1)
    pairs = list(zip(targets.astype(np.float64), outputs.astype(np.float64), strict=True))

    psnr = [peak_signal_noise_ratio(target, output, data_range=1) for target, output in pairs]
    np.testing.assert_allclose(metrics.psnr(outputs, targets), psnr, atol=1e-4)
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
    np.testing.assert_allclose(metrics.ssim(outputs, targets), ssim, atol=1e-4)
    mse = [((target - output) ** 2).mean() for target, output in pairs]
    np.testing.assert_allclose(losses.mse(outputs, targets), mse, rtol=1e-5)
