"""Which tiles are chosen, what they compute twice, and how much memory they take."""

import math

import jax
import numpy as np
import pytest
from conftest import random_params

from aecore.degradations import GaussianNoise
from aecore.models import UNet, Upscaler
from aecore.networks.network import LinenNetwork
from aecore.networks.receptive_field import ReceptiveField
from aecore.restoring import passes, programs, tiling
from aecore.restoring.engine import Engine
from aecore.restoring.tiled import in_tiles
from aecore.scoring.evaluation import Evaluator
from aecore.steps.devices import Devices


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


class Sources(list):
    """Pictures that an evaluation reads by index."""

    channels = 1

    def shape(self, index):
        return self[index].shape


@pytest.mark.parametrize(
    "model", [UNet((4, 6), channels=1), Upscaler(width=4, blocks=1, channels=1)]
)
def test_one_program_restores_a_large_picture_in_tiles_as_it_does_whole(model):
    network, params = LinenNetwork(model), random_params(model)
    images = np.random.default_rng(0).random((2, 200, 328, 1), np.float32)
    whole, tiled = (
        jax.jit(apply).lower(params, images).compile()
        for apply in (network.apply, in_tiles(network, 64))
    )
    restored = tiled(params, images)
    np.testing.assert_allclose(restored, whole(params, images), atol=1e-5)
    whole, tiled = (program.memory_analysis().temp_size_in_bytes for program in (whole, tiled))
    assert tiled < whole / 2


def test_evaluations_on_several_devices_score_large_pictures_in_tiles(monkeypatch):
    model = UNet((4, 6), channels=1)
    network, params = LinenNetwork(model), random_params(model)
    measured = []

    def receptive_field(*args):
        measured.append(args)
        return measure(*args)

    measure = LinenNetwork.receptive_field
    monkeypatch.setattr(LinenNetwork, "receptive_field", receptive_field)
    random = np.random.default_rng(0)
    pictures = Sources(
        random.integers(0, 256, (*size, 1), np.uint8) for size in [(180, 190), (64, 64), (200, 60)]
    )
    devices = Devices(jax.devices()[:2])
    values = [
        Evaluator(apply, GaussianNoise(0.1), devices, multiple=8).per_image(params, pictures)
        for apply in (network.apply, in_tiles(network, 64))
    ]
    for name, expected in values[0].items():
        np.testing.assert_allclose(values[1][name], expected, rtol=1e-4)
    assert len(measured) == 1  # Of both shapes that are large.
