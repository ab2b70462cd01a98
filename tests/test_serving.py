"""The server and its page, asked over HTTP and used in a browser."""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest
from conftest import open_page, random_params, save_pictures
from etils import epath
from PIL import Image

import aecore
import aecore.serving
from aecore import cli
from aecore.media import encoders
from aecore.models import NoiseReducer, UNet
from aecore.networks.network import LinenNetwork
from aecore.saved import exported
from aecore.saved.descriptions import Description
from aecore.saved.trained import TrainedNetwork
from aecore.serving.limits import Limits

uvicorn = pytest.importorskip("uvicorn")
server = pytest.importorskip("aecore.serving.server")


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Files of a network for gray and of one for colour."""
    folder = tmp_path_factory.mktemp("networks")
    for name, model in {"gray": NoiseReducer((4,)), "colour": UNet((4, 6), channels=3)}.items():
        described = {"type": type(model).__name__, **dataclasses.asdict(model)}
        trained = TrainedNetwork(
            LinenNetwork(model), random_params(model), Description(model=described)
        )
        exported.save(epath.Path(folder / name), trained, with_functions=False)
    return folder


@contextlib.contextmanager
def serving(restorers, **limits):
    """The address of a server that runs meanwhile."""
    listening = socket.create_server(("127.0.0.1", 0))
    app = server.application(restorers, Limits(**limits))
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def restorers(networks):
    return {name: aecore.Restorer.load(networks / name) for name in ("colour", "gray")}


@pytest.fixture(scope="module")
def address(restorers):
    with serving(restorers, megabytes=1, megapixels=1) as address:
        yield address


def ask(address, path, data=None):
    """Status, headers and body of an answer."""
    try:
        with urllib.request.urlopen(f"{address}/{path}", data) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def one_picture(folder, name="0.png", size=(24, 30), mode="RGB", **settings):
    save_pictures(folder, 1, size, mode)
    with Image.open(folder / "0.png") as picture:
        picture.load()
    picture.save(folder / name, **settings)
    return folder / name


def save_jpeg(folder):
    exif = Image.Exif()
    exif[271], exif[274] = "a camera", 6
    return one_picture(folder, "a.jpg", exif=exif, dpi=(300, 300), quality=70)


def save_16_bits(folder):
    values = np.random.default_rng(0).integers(0, 2**16, (9, 12), np.uint16)
    Image.fromarray(values).save(folder / "a.tif")
    return folder / "a.tif"


def save_animation(folder):
    save_pictures(folder, 3)
    frames = [Image.open(folder / f"{index}.png") for index in range(3)]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:], duration=50)
    return folder / "a.gif"


@pytest.mark.parametrize("save", [save_jpeg, one_picture, save_16_bits, save_animation])
@pytest.mark.parametrize("network", ["colour", "gray"])
@pytest.mark.every_room
def test_a_file_comes_back_as_the_command_restores_it(save, network, networks, address, tmp_path):
    path = save(tmp_path)
    out = tmp_path / f"out{path.suffix}"
    model = str(networks / network)
    words = ["restore", str(path), "-o", str(out), "-m", model, "--strength", "0.5"]
    with pytest.raises(SystemExit) as exited:
        cli.run(words)
    assert not exited.value.code
    query = f"restore?network={network}&strength=0.5"
    status, headers, body = ask(address, query, path.read_bytes())
    assert status == 200
    assert body == out.read_bytes()
    assert headers["Content-Disposition"] == f'attachment; filename="restored{path.suffix}"'
    assert headers["Content-Type"].startswith("image/")


def test_notes_come_in_a_header(address, tmp_path):
    with Image.open(one_picture(tmp_path)) as picture:
        picture.quantize(8).save(tmp_path / "palette.png")
    _, headers, _ = ask(address, "restore", (tmp_path / "palette.png").read_bytes())
    assert json.loads(headers["X-Notes"]) == ["a palette became RGB"]


def test_any_picture_can_be_previewed(address, tmp_path):
    status, headers, body = ask(address, "preview", save_16_bits(tmp_path).read_bytes())
    assert (status, headers["Content-Type"]) == (200, "image/png")
    (tmp_path / "preview.png").write_bytes(body)
    with (
        Image.open(tmp_path / "preview.png") as preview,
        Image.open(tmp_path / "a.tif") as original,
    ):
        np.testing.assert_array_equal(np.asarray(preview), np.asarray(original))


def bomb(side):
    """A PNG of side × side black pixels in some kilobytes."""
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    pixels = zlib.compress(bytes(side * (1 + side // 8)))
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(encoders.png_chunk(*chunk) for chunk in chunks)


@pytest.mark.parametrize(
    ("path", "data", "status", "sentence"),
    [
        ("restore", b"", 400, "The request has no picture; send a file as its body."),
        ("restore", b"text", 400, "The file is not a picture in a format that Pillow knows."),
        ("preview", b"text", 400, "The file is not a picture in a format that Pillow knows."),
        ("restore?network=no", b"", 404, "There is no network no; use colour or gray."),
        ("restore?strength=2", b"", 400, "The strength must be a number from 0 to 1."),
        ("restore?strength=x", b"", 400, "The strength must be a number from 0 to 1."),
        ("restore?strength=nan", b"", 400, "The strength must be a number from 0 to 1."),
        ("restore?strenght=0.5", b"", 400, "There is no parameter 'strenght'; use network or "),
        ("preview?strength=1", b"", 400, "There is no parameter 'strength'; use visit."),
        ("restore", None, 405, "Send a picture by POST, as the body of the request."),
        ("preview", None, 405, "Send a picture by POST, as the body of the request."),
        ("restore", bytes(2_000_000), 413, "The file is too large; the most that this server"),
        ("restore", bomb(4_000), 413, "The picture has 16.0 million pixels; the most that this"),
        ("preview", bomb(4_000), 413, "The picture has 16.0 million pixels; the most that this"),
        ("restore", bomb(20_000), 400, "The file can't be read: it has more than 178,956,970 pix"),
        ("progress?visit=no", None, 404, "No picture of this name is being restored."),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_whatever_fails_is_answered_by_a_sentence(address, path, data, status, sentence):
    was, headers, body = ask(address, path, data)
    assert was == status
    assert headers["Content-Type"].startswith("text/plain")
    assert body.decode().startswith(sentence)
    assert body.decode().endswith(".") and "\n" not in body.decode()


def test_a_form_is_answered_by_how_to_send_the_file(address):
    form = {"Content-Type": "multipart/form-data; boundary=a"}
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(urllib.request.Request(f"{address}/restore", b"--a--", form))
    with raised.value as answer:
        assert answer.code == 415
        assert (
            "send the file itself as its body, with curl by --data-binary @"
            in answer.read().decode()
        )


def test_a_damaged_picture_gets_a_sentence_without_a_path(address, tmp_path):
    content = save_jpeg(tmp_path).read_bytes()
    status, _, body = ask(address, "restore", content[: len(content) // 2])
    assert status == 400
    assert re.fullmatch(r"The file can't be read: [^/]*\.", body.decode())


class Counting(aecore.Restorer):
    """Counts its calls and the images of each."""

    def __call__(self, image, *, progress=None):
        self.calls = [*getattr(self, "calls", []), len(image)]
        return super().__call__(image, progress=progress)


def test_fifty_visitors_at_once_share_calls(networks, restorers, tmp_path):
    save_pictures(tmp_path, 50, (16, 20))
    restorer = Counting.load(networks / "gray")
    with serving({"gray": restorer}) as address, concurrent.futures.ThreadPoolExecutor(50) as pool:
        pictures = [(tmp_path / f"{index}.png").read_bytes() for index in range(50)]
        answers = list(pool.map(lambda picture: ask(address, "restore", picture), pictures))
    assert {status for status, _, _ in answers} == {200}
    assert sum(restorer.calls) == 50
    assert len(restorer.calls) < 25
    for index in (0, 31, 49):
        (tmp_path / "restored.png").write_bytes(answers[index][2])
        expected = restorers["gray"](tmp_path / f"{index}.png")
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / "restored.png")), np.asarray(expected)
        )


class Slow(aecore.Restorer):
    """Restores large pictures in no less than ten seconds, unless it is stopped."""

    stopped = 0

    def __call__(self, image, *, progress=None):
        if image.shape[1] < 100:
            return super().__call__(image, progress=progress)
        try:
            for step in range(1000):
                time.sleep(0.01)
                progress(step / 1000)
        except Exception:
            self.stopped += 1
            raise
        return image


def begin(address, data, visit):
    """Sends a picture without waiting for the answer."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    connection.request("POST", f"/restore?visit={visit}", data)
    wait_for(lambda: ask(address, f"progress?visit={visit}")[0] == 200)
    return connection


def test_the_work_for_a_visitor_who_leaves_is_stopped(networks, tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    restorer = Slow.load(networks / "gray")
    with serving({"gray": restorer}) as address:
        large = one_picture(large, size=(100, 100)).read_bytes()
        leaving = begin(address, large, "first")
        wait_for(lambda: json.loads(ask(address, "progress?visit=first")[2]).get("share"))
        waiting = begin(address, large, "second")
        assert json.loads(ask(address, "progress?visit=second")[2]) == {"share": 0, "ahead": 1}
        start = time.monotonic()
        leaving.close()
        waiting.close()
        assert ask(address, "restore", one_picture(small).read_bytes())[0] == 200
        assert time.monotonic() - start < 5
        wait_for(lambda: ask(address, "progress?visit=first")[0] == 404)
        assert restorer.stopped in (1, 2)


def test_who_leaves_in_the_middle_of_the_upload_leaves_nothing(networks, restorers):
    with serving(restorers, pictures=1) as address:
        host, port = address.removeprefix("http://").split(":")
        for _ in range(3):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(b"POST /restore?visit=a HTTP/1.1\r\nHost: a\r\n")
                connection.sendall(b"Content-Length: 1000\r\n\r\nbegun")
                wait_for(lambda: ask(address, "progress?visit=a")[0] == 200)
            wait_for(lambda: ask(address, "progress?visit=a")[0] == 404)


def test_too_many_pictures_and_too_long_a_time_are_refused(networks, tmp_path):
    large = one_picture(tmp_path, size=(100, 100)).read_bytes()
    restorer = Slow.load(networks / "gray")
    with serving({"gray": restorer}, pictures=1, seconds=1) as address:
        first = begin(address, large, "first")
        status, _, body = ask(address, "restore", large)
        assert (status, body) == (503, b"Too many pictures are waiting; try again in a minute.")
        answer = first.getresponse()
        assert answer.status == 503
        assert answer.read().startswith(b"The picture took longer than 1 seconds")
        first.close()


def test_a_failure_of_ours_is_logged_and_gets_a_sentence(networks, tmp_path, caplog, monkeypatch):
    restorer = aecore.Restorer.load(networks / "gray")
    monkeypatch.setattr(aecore.Restorer, "__call__", lambda *_, **__: 1 / 0)
    with serving({"gray": restorer}) as address:
        status, _, body = ask(address, "restore", one_picture(tmp_path).read_bytes())
    assert (status, body) == (500, b"Something failed on the server; its log says what.")
    assert "ZeroDivisionError" in caplog.text


# ---- The command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "nothing"], "nothing does not exist; name a run directory"),
        ([], "no network; name one, as by -m photo-denoise"),
        (["-m", "fashion-mnist-denoise", "--port", "99999"], "choose another --host or --port"),
        (["-m", "fashion-mnist-denoise", "--limits.seconds", "0"], "limits.seconds 0.0 is out of"),
        (
            ["-m", "fashion-mnist-denoise", "--limits.megabytes", "inf"],
            "inf is not possible; use a",
        ),
    ],
)
def test_wrong_usage_gets_one_line_and_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as exited:
        cli.run(["serve", *words])
    errors = capsys.readouterr().err
    assert exited.value.code == 2
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "aecore.serving.server")
    monkeypatch.delattr(aecore.serving, "server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit) as exited:
        cli.run(["serve", "-m", "fashion-mnist-denoise"])
    assert exited.value.code == 2
    assert capsys.readouterr().err == (
        'error: serving needs the package uvicorn: pip install "aecore[serve]"\n'
    )


def test_the_command_listens_on_this_machine_alone_until_it_is_interrupted():
    words = ["serve", "-m", "fashion-mnist-denoise", "-m", "photo-denoise", "--port", "0"]
    # Where the tests run in the background, a shell may have told them to ignore Ctrl-C.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from aecore.cli import run; run()"
    with subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        said = process.stdout.readline()
        address = re.match(r"(http://127\.0\.0\.1:\d+)/", said).group(1)
        known = json.loads(ask(address, "networks")[2])["networks"]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert [network["name"] for network in known] == ["fashion-mnist-denoise", "photo-denoise"]
    assert (process.returncode, errors) == (130, "interrupted\n")


# ---- The page


@pytest.fixture
def page(address, chromium):
    with open_page(chromium, address) as page:
        yield page


def restored(page):
    """Waits until a picture is restored."""
    page.wait_for_selector("#download[href]")


def test_a_picture_is_dropped_compared_and_downloaded(page, networks, tmp_path):
    path = save_jpeg(tmp_path)
    page.set_input_files("#file", path)
    restored(page)
    before, after = (
        page.eval_on_selector(f"#{name}", "image => image.src") for name in ("before", "after")
    )
    assert before != after
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "a-restored.jpg"
    assert not list(tmp_path.glob("restored*"))
    out = tmp_path / "out.jpg"
    with pytest.raises(SystemExit):
        cli.run(["restore", str(path), "-o", str(out), "-m", str(networks / "colour")])
    assert download.value.path().read_bytes() == out.read_bytes()


def test_the_divider_and_the_zoom(page, tmp_path):
    page.set_input_files("#file", one_picture(tmp_path, size=(300, 400)))
    restored(page)

    def clipped():
        """How many pixels of the picture before are not seen, nor of that after."""
        texts = [
            page.eval_on_selector(f"#{name}", "image => image.style.clipPath")
            for name in ("before", "after")
        ]
        return [max(map(float, re.findall(r"[\d.]+", text))) for text in texts]

    assert clipped() == pytest.approx([200, 200], abs=1)
    box = page.locator("#line").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] - 50, middle[1])
    page.mouse.up()
    assert clipped() == pytest.approx([250, 150], abs=1)
    page.click("#in")
    assert "scale(2)" in page.eval_on_selector("#after", "image => image.style.transform")
    page.click("#fit")
    assert "scale(1)" in page.eval_on_selector("#after", "image => image.style.transform")
    page.focus("#divider")
    page.keyboard.press("End")
    assert clipped()[0] == 0 and clipped()[1] >= 400


def test_strength_and_network_can_be_chosen(page, restorers, tmp_path):
    path = one_picture(tmp_path)
    page.set_input_files("#file", path)
    restored(page)
    page.select_option("#network", "gray")
    page.fill("#strength", "0.25")
    page.dispatch_event("#strength", "change")
    assert page.text_content("#strength-shown") == "25 %"
    restored(page)
    with page.expect_download() as download:
        page.click("#download")
    expected = restorers["gray"].with_strength(0.25)(path)
    with Image.open(download.value.path()) as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


HOLD = """() => {
  window.decode ??= HTMLImageElement.prototype.decode;
  window.held = [];
  HTMLImageElement.prototype.decode = function () {
    return new Promise((resolve) => held.push(resolve)).then(() => decode.call(this));
  };
}"""
"""From now on, images are decoded only when what is held is resolved."""

DECODE = "() => { HTMLImageElement.prototype.decode = decode; }"
RELEASE = "() => held.forEach((resolve) => resolve())"


def test_a_picture_that_opens_late_is_not_shown(page, tmp_path):
    late = one_picture(tmp_path / "late", size=(24, 31))
    page.evaluate(HOLD)
    page.set_input_files("#file", late)
    page.wait_for_function("held.length === 1")
    page.click("#another")
    page.evaluate(DECODE)
    page.evaluate(RELEASE)
    page.wait_for_timeout(300)
    assert page.is_visible("#drop")
    assert page.is_hidden("#pictures")
    assert page.text_content("#message") == ""
    page.evaluate(HOLD)
    page.set_input_files("#file", late)
    page.wait_for_function("held.length === 1")
    page.evaluate(DECODE)
    page.set_input_files("#file", one_picture(tmp_path / "next", size=(24, 30)))
    restored(page)
    page.evaluate(RELEASE)
    page.wait_for_timeout(300)
    assert page.eval_on_selector("#before", "image => image.naturalWidth") == 30
    assert page.is_hidden("#drop")


def test_addresses_of_pictures_are_given_up(page, tmp_path):
    page.evaluate(
        """() => {
          window.kept = new Set();
          const { createObjectURL, revokeObjectURL } = URL;
          URL.createObjectURL = (object) => {
            const address = createObjectURL.call(URL, object);
            kept.add(address);
            return address;
          };
          URL.revokeObjectURL = (address) => {
            kept.delete(address);
            revokeObjectURL.call(URL, address);
          };
        }"""
    )
    page.set_input_files("#file", one_picture(tmp_path))
    for strength in ("0.25", "0.5", "0.75"):
        restored(page)
        page.wait_for_function("kept.size === 3")  # Before, after, and the download.
        page.fill("#strength", strength)
        page.dispatch_event("#strength", "change")
    restored(page)
    page.wait_for_function("kept.size === 3")
    page.click("#another")
    assert page.evaluate("kept.size") == 0


def test_pictures_that_browsers_do_not_know_are_shown_too(page, tmp_path):
    page.set_input_files("#file", save_16_bits(tmp_path))
    restored(page)
    assert page.eval_on_selector("#after", "image => image.naturalWidth") == 12


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"text", "The file is not a picture in a format that Pillow knows."),
        (bytes(2_000_000), "The file is too large; the most that this server takes are 1 million"),
        (bomb(4_000), "The picture has 16.0 million pixels"),
    ],
    ids=["text", "too large", "bomb"],
)
def test_a_bad_file_is_named_and_another_can_be_chosen(page, tmp_path, content, sentence):
    (tmp_path / "bad.png").write_bytes(content)
    page.set_input_files("#file", tmp_path / "bad.png")
    page.wait_for_selector("#message.wrong")
    assert page.text_content("#message").startswith(sentence)
    if page.is_enabled("#another"):
        page.click("#another")
    page.set_input_files("#file", one_picture(tmp_path))
    restored(page)
    assert page.text_content("#message") == ""
