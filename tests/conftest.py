"""Eight virtual CPU devices for all tests, and data that several of them share."""

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

# All must be set before JAX is imported; processes that run tests side by side inherit them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    # The cache spares compiling the same network in each test.
    _CACHE = tempfile.TemporaryDirectory(prefix="aecore-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Most of the tests' time goes into compiling small programs, and most of that into making their
    # machine code fast.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    _FLAGS = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    if version("jaxlib").startswith("0.10.") and find_spec("libtpu") is None:
        # Later ones, and libtpu, only know the newer way of making machine code, with which
        # compiling what the tests do takes 1.7 times as long.
        _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(_FLAGS)

ONE_DEVICE = {
    "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1",
}
"""The environment of a program that is to have one device.

Of a flag that comes twice, the later one counts."""

import jax

import aecore
from aecore.degradations import GaussianNoise
from aecore.models import NoiseReducer
from aecore.networks.base import abstract_params

# Tracing makes many objects, few of them garbage; looking for it after every 700 would take a tenth
# of the tests' time.
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees what a module has compiled, which otherwise grows to several GB."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many `-n auto` is: each takes 2 GB or so, and uses several cores at times."""
    return min(4, os.cpu_count() or 1)


_FIRST = ("processes", "ray", "remote", "training", "steps", "photographs", "restoring")
"""Modules that take minutes: the earlier they begin, the sooner all workers are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}.py": place for place, name in enumerate(_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each module's tests run in one worker, which makes what they share, and compiles it, once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.fixture(scope="session")
def tfds_dir() -> str:
    """A folder of prepared TFDS data, where there is one."""
    return _test_data("tfds")


@pytest.fixture(scope="session")
def photos_dir() -> str:
    """A folder of photographs and benchmarks, where there is one."""
    return _test_data("photos")


def _test_data(name: str) -> str:
    folder = Path(os.environ.get("AECORE_TEST_DATA", ""), name)
    if "AECORE_TEST_DATA" not in os.environ or not folder.is_dir():
        pytest.skip(f"AECORE_TEST_DATA does not name a folder that holds {name}")
    return str(folder)


def run_program(text: str, *folders: Path) -> subprocess.CompletedProcess:
    """Runs a Python program in a process of its own, which also imports from these folders."""
    path = os.pathsep.join([*map(str, folders), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", text],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium, where there is one.

    It is closed after each module, as asyncio can't be used in this thread meanwhile.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium; Debian's package is called chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def open_page(chromium, address):
    """A page, of which it is checked at the end that all that it loaded came from its address."""
    context = chromium.new_context(viewport={"width": 1000, "height": 700})
    page, loaded, failures = context.new_page(), [], []
    page.on("request", lambda request: loaded.append(request.url))
    page.on("pageerror", lambda error: failures.append(error))
    page.goto(address)
    page.wait_for_selector("[data-ready]")
    yield page
    context.close()
    assert not failures
    assert len(loaded) > 4
    assert all(url.startswith((f"{address}/", f"blob:{address}/")) for url in loaded)


def save_pictures(folder: Path, count: int, size=(16, 16), mode="L", seed=0) -> None:
    """Writes smooth random pictures `0.png`, `1.png`, …"""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        coarse = random.integers(0, 256, (4, 4) if mode == "L" else (4, 4, 3), np.uint8)
        picture = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
        picture.save(folder / f"{index}.png")


def random_params(model, seed=0):
    """Parameters with which biases and borders matter, and values keep their magnitude."""
    random = np.random.default_rng(seed)

    def values(leaf):
        scale = 0.3 if leaf.ndim == 1 else (2 / np.prod(leaf.shape[:-1])) ** 0.5
        return random.normal(0, scale, leaf.shape).astype(np.float32)

    side = 2 * model.stride
    return jax.tree.map(values, abstract_params(model, (side, side, model.channels)))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of 40 gray pictures of 16×16."""
    folder = tmp_path_factory.mktemp("pictures")
    save_pictures(folder, 40)
    return folder


@pytest.fixture
def tiny(pictures, tmp_path) -> aecore.Experiment:
    """An experiment of 4 steps an epoch, 2 epochs, on 8 devices."""
    return aecore.Experiment(
        name="tiny",
        model=NoiseReducer(features=(4,)),
        degradation=GaussianNoise(0.2),
        data=aecore.Data(dataset="folder", data_dir=str(pictures), validation_fraction=0.15),
        training=aecore.Training(batch_size=8, epochs=2, log_every=2),
        run_dir=str(tmp_path / "run"),
    )


@pytest.fixture(scope="session")
def trained(pictures, tmp_path_factory) -> Path:
    """The directory of a finished run: NoiseReducer (stride 4) on gray pictures."""
    run = tmp_path_factory.mktemp("trained") / "run"
    aecore.train(
        aecore.Experiment(
            name="trained",
            model=NoiseReducer(),
            degradation=GaussianNoise(0.2),
            data=aecore.Data(dataset="folder", data_dir=str(pictures)),
            training=aecore.Training(batch_size=8, epochs=3),
            run_dir=str(run),
        ),
        progress=False,
    )
    return run
