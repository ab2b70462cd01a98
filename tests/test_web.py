"""The page with no server, used in a browser, against the restorer."""

import functools
import http.server
import threading

import numpy as np
import pytest
from conftest import open_page, random_params
from etils import epath
from PIL import Image

import aecore
from aecore import cli
from aecore.errors import ConfigError
from aecore.models import NoiseReducer, UNet, Upscaler
from aecore.serving import site

pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The file of npm's package, where npm can be reached."""
    path = tmp_path_factory.mktemp("npm") / site.PACKAGE
    try:
        path.write_bytes(site.download())
    except ConfigError as error:
        pytest.skip(str(error))
    return path


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """The address of the folder `site`."""
    handler = functools.partial(Quiet, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("model", "mode", "size", "strength"),
    [
        # Of several tiles, with sides that are no multiples of the stride.
        (UNet((4, 6), channels=3, patch=2), "RGB", (301, 530), 1),
        (UNet((4, 6), channels=3), "L", (40, 50), 0.5),
        (NoiseReducer((4,)), "RGB", (290, 70), 1),
        (Upscaler(scale=2), "RGB", (30, 270), 1),
    ],
    ids=["tiles", "gray for colour", "colour for gray", "enlarged"],
)
def test_the_browser_restores_as_the_restorer(
    model, mode, size, strength, package, served, chromium, tmp_path
):
    restorer = aecore.Restorer.of(model, random_params(model))
    folder = epath.Path(tmp_path / "site")
    site.write(folder, restorer.trained, name="network", package=str(package))
    random = np.random.default_rng(0)
    shape = size if mode == "L" else (*size, 3)
    pixels = random.integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    with open_page(chromium, served) as page:
        if strength != 1:
            page.fill("#strength", str(strength))
        page.set_input_files("#file", tmp_path / "picture.png")
        page.wait_for_selector("#download[href]")
        with page.expect_download() as download:
            page.click("#download")
        with Image.open(download.value.path()) as picture:
            restored = np.asarray(picture.convert(mode), np.int16)
    expected = np.asarray(restorer.with_strength(strength)(pixels), np.int16)
    assert restored.shape == expected.shape
    assert np.abs(restored - expected).max() <= 1
    assert expected.std() > 1  # Else a blank picture could agree, too.


@pytest.mark.parametrize("content", [None, b"something else"])
def test_a_wrong_runtime_gets_one_line(content, tmp_path, capsys):
    path = tmp_path / "package.tgz"
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "site"
    words = ["photo-denoise", "-o", str(out), "--format", "web", "--runtime", str(path)]
    with pytest.raises(SystemExit) as exited:
        cli.run(["export", *words])
    assert exited.value.code
    errors = capsys.readouterr().err
    assert str(path) in errors or "get it with npm pack" in errors
    assert len(errors.splitlines()) == 1
    assert not out.exists()


def test_without_a_network_it_says_how_to_get_the_runtime(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(site, "_ADDRESS", "http://127.0.0.1:9/runtime")
    with pytest.raises(SystemExit) as exited:
        cli.run(["export", "photo-denoise", "-o", str(tmp_path / "site"), "--format", "web"])
    assert exited.value.code == 2
    errors = capsys.readouterr().err
    assert "run npm pack onnxruntime-web@1.30.0, and name its file with --runtime" in errors
    assert len(errors.splitlines()) == 1
