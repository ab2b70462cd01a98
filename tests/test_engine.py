"""Which tiles are chosen, what they compute twice, and how much memory they take."""

import math

import jax
import numpy as np
import pytest
from conftest import random_params

from aecore.models import UNet
from aecore.networks.network import LinenNetwork
from aecore.networks.receptive_field import ReceptiveField
from aecore.restoring import passes, programs, tiling
from aecore.restoring.engine import Engine


class Seeing:
    """A network, as far as choosing tiles needs it."""

    name, channels, scale = "Seeing", 1, 1

    def __init__(self, field, stride):
        self.field, self.stride = field, stride

    def receptive_field(self, params):
        return self.field

    def in_precision(self, precision):
        return self


def engine_of(network, params=(), **settings):
    settings = {"tile": "auto", "batch_size": None, "precision": "float32", **settings}
    return Engine(network, params, devices=jax.local_devices()[:1], **settings)


def computed(windows):
    return sum(math.prod(window.size) for window in windows)


@pytest.mark.parametrize(
    ("field", "stride", "most"),
    [
        (ReceptiveField(72, 72), 8, 2.2),
        (ReceptiveField(4, 8), 4, 1.3),
        (ReceptiveField(12, 12), 8, 1.3),
        (ReceptiveField(200, 200), 8, 2.2),
    ],
)
@pytest.mark.parametrize("size", [(3000, 4000), (4032, 3024)])
def test_little_of_a_photograph_is_computed_twice(field, stride, most, size):
    windows = engine_of(Seeing(field, stride)).windows(size)
    assert len(windows) > 1
    assert computed(windows) <= most * math.prod(size)
    # What is kept covers each pixel once.
    kept = sum(
        (rows.last - rows.first) * (columns.last - columns.first) for rows, columns, _ in windows
    )
    assert kept == math.prod(-(-side // stride) * stride for side in size)


def test_pixels_computed_for_each_that_is_kept():
    # 512 of which 512 - 144 are kept, along both axes.
    assert tiling.computed_per_kept(512, ReceptiveField(72, 72)) == pytest.approx(1.936, abs=1e-3)


def test_networks_that_see_little_keep_tiles_that_fit_caches():
    assert max(engine_of(Seeing(ReceptiveField(4, 8), 4)).windows((3000, 4000))[0].size) <= 384


def test_memory_stays_bounded(monkeypatch):
    model = UNet((4, 6), channels=1)
    params = random_params(model)
    network = LinenNetwork(model)
    image = np.random.default_rng(0).random((1, 900, 700, 1), np.float32)
    (whole,) = passes.restore(engine_of(network, params, tile=0), [image])
    compiled = []
    for limit in (2**30, 2**22):
        monkeypatch.setattr(programs, "_CPU_MEMORY", limit)
        tiled = engine_of(network, params)
        (restored,) = passes.restore(tiled, [image])
        np.testing.assert_allclose(restored, whole, atol=1e-5)
        needed = [
            program.memory_analysis().temp_size_in_bytes
            for program in tiled.programs.compiled.values()
        ]
        assert max(needed) <= limit
        compiled.append(max(needed))
    assert compiled[1] < compiled[0]


def test_where_memory_is_short_tiles_shrink_no_more_than_they_must(monkeypatch):
    field = ReceptiveField(72, 72)
    chosen = engine_of(Seeing(field, 8))
    first = chosen.windows((3000, 4000))[0].size
    kind = programs.BatchKind(first, np.dtype(np.uint8), 1)
    chosen.shrink(chosen.tile, programs.OutOfMemoryError(kind, share=0.8))
    smaller = chosen.windows((3000, 4000))[0].size
    assert 0.5 <= math.prod(smaller) / math.prod(first) <= 0.9
