import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib

import cv2
import jax
import numpy as np
import pytest
from conftest import save_pictures
from etils import epath
from PIL import ExifTags, Image, ImageCms

import aecore
from aecore import cli, storage
from aecore.errors import ConfigError, ImageError
from aecore.media import images, videos
from aecore.models import Autoencoder, Upscaler, register
from aecore.restoring import bulk, files
from aecore.saved import exported
from aecore.saved.trained import TrainedNetwork

RANDOM = np.random.default_rng(0)


@register
class Unchanged(Autoencoder):
    """The identity, in a registered model, with a parameter as checkpoints have some."""

    channels: int = 3
    stride: int = 2

    def setup(self):
        self.unused = self.param("unused", lambda key: np.zeros(1, np.float32))

    def encode(self, images):
        return images

    def decode(self, codes):
        return codes


def save_unchanged(path, channels=3):
    """Writes an identity as an exported file."""
    params = {"unused": np.zeros(1, np.float32)}
    exported.save(epath.Path(path), TrainedNetwork.of(Unchanged(channels), params))
    return str(path)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    return save_unchanged(tmp_path_factory.mktemp("model") / "unchanged.aecore")


def run(capfd, *args):
    """Exit status, standard output and standard error of `aecore restore`."""
    with pytest.raises(SystemExit) as exited:
        cli.run(["restore", *map(str, args)])
    output = capfd.readouterr()
    return exited.value.code or 0, output.out, output.err


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_folders_keep_their_structure(unchanged, tmp_path, capfd):
    source, out = tmp_path / "in", tmp_path / "out"
    save_pictures(source, 2)
    save_pictures(source / "deep" / "er", 2, (21, 18))
    save_pictures(source / "colour", 1, mode="RGB")
    (source / ".hidden.png").write_text("text")
    (source / "notes.txt").write_text("text")
    args = [source, "-o", out, "-m", unchanged]
    assert run(capfd, *args)[::2] == (0, "")
    assert names(out) == ["0.png", "1.png"]
    assert run(capfd, *args, "--recursive", "--if-exists", "skip")[::2] == (0, "")
    assert names(out) == [
        "0.png",
        "1.png",
        "colour/0.png",
        "deep/er/0.png",
        "deep/er/1.png",
    ]
    for name in names(out):
        np.testing.assert_array_equal(Image.open(out / name), Image.open(source / name))


def test_patterns_keep_structure_below_their_fixed_part(unchanged, tmp_path, capfd):
    for name in ("a", "b"):
        save_pictures(tmp_path / "in" / name, 2)
    out = tmp_path / "out"
    pattern = tmp_path / "in" / "*" / "0.png"
    assert run(capfd, pattern, "-o", out, "-m", unchanged)[0] == 0
    assert names(out) == ["a/0.png", "b/0.png"]


def test_names_endings_and_comparisons(unchanged, tmp_path, capfd):
    save_pictures(tmp_path / "in", 1, mode="RGB")
    out = tmp_path / "out"
    args = [tmp_path / "in", "-o", out, "-m", unchanged, "--suffix", "_new", "--ext", "tiff"]
    status, output, _ = run(capfd, *args, "--dry-run")
    assert status == 0
    assert output == f"{tmp_path}/in/0.png -> {out}/0_new.tiff\n"
    assert not out.exists()
    report = tmp_path / "report.json"
    assert run(capfd, *args, "--compare", "--report", report)[0] == 0
    assert names(out) == ["0_new.tiff", "0_new_compare.png"]
    source = np.asarray(Image.open(tmp_path / "in" / "0.png"))
    both = np.concatenate([source, source], axis=1)
    np.testing.assert_array_equal(Image.open(out / "0_new_compare.png"), both)
    assert json.loads(report.read_text())["files"] == [
        {
            "source": f"{tmp_path}/in/0.png",
            "target": f"{out}/0_new.tiff",
            "status": "restored",
            "notes": [],
        }
    ]


def test_an_input_is_overwritten_only_if_it_is_named(unchanged, tmp_path, capfd):
    save_pictures(tmp_path, 2)
    picture = tmp_path / "0.png"
    overwrite = ["-m", unchanged, "--if-exists", "overwrite"]
    hint = ", or use --if-exists overwrite"
    status, _, errors = run(capfd, tmp_path, "-o", tmp_path, *overwrite)
    assert status == 2 and "0.png would be overwritten" in errors and hint not in errors
    status, _, errors = run(capfd, picture, "-o", picture, "-m", unchanged)
    assert status == 2 and f"{picture} would be overwritten" in errors and hint in errors
    assert run(capfd, tmp_path / "1.png", "-o", picture, "-m", unchanged)[0] == 2
    before = picture.stat().st_mtime_ns
    assert run(capfd, picture, "-o", picture, *overwrite)[0] == 0
    assert picture.stat().st_mtime_ns != before


@pytest.mark.parametrize("output", ["trail.png/", "out.v3/", "out//"])
def test_a_slash_at_the_end_of_an_output_means_a_folder(output, tmp_path):
    save_pictures(tmp_path / "in", 2)
    for inputs in (["in"], ["in/0.png"], ["in/0.png", "in/1.png"]):
        inputs = [str(tmp_path / name) for name in inputs]
        jobs, _ = files.find(
            inputs, f"{tmp_path}/{output}", recursive=False, suffix="", extension="auto"
        )
        assert jobs[0].target == tmp_path / output / "0.png"


def test_an_empty_input_is_refused(tmp_path):
    for inputs in ([""], [str(tmp_path), ""]):
        with pytest.raises(ConfigError, match="an input is empty; name pictures or folders"):
            files.find(inputs, str(tmp_path), recursive=False, suffix="", extension="auto")


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_report_may_lie_in_a_folder_that_restoring_makes(
    is_broken, unchanged, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "in", 1)
    if is_broken:
        (tmp_path / "in/0.png").write_bytes(b"no picture")
    words = ["in", "-o", "out/b", "-m", unchanged, "--report"]
    for report in ("out/rep.json", tmp_path / "out/b/rep.json"):
        status, _, errors = run(capfd, *words, report, "--if-exists", "overwrite")
        assert status == is_broken, errors
        (entry,) = json.loads((tmp_path / report).read_text())["files"]
        assert entry["status"] == ("failed" if is_broken else "restored")
        shutil.rmtree(tmp_path / "out")
    status, _, errors = run(capfd, *words, "elsewhere/rep.json")
    assert status == 2 and "its folder is missing" in errors
    assert names(tmp_path) == ["in/0.png"]


def test_alpha_may_be_dropped(unchanged, tmp_path, capfd):
    pixels = RANDOM.integers(0, 256, (6, 7, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for alpha, kept in (("keep", pixels), ("drop", pixels[..., :3])):
        out = tmp_path / f"{alpha}.png"
        status, *_ = run(capfd, tmp_path / "a.png", "-o", out, "-m", unchanged, "--alpha", alpha)
        assert status == 0
        np.testing.assert_array_equal(Image.open(out), kept)


def pictures_of_all_modes(folder):
    """One picture of each mode and depth that files have."""

    def noise(*shape, dtype=np.uint8):
        return RANDOM.integers(0, np.iinfo(dtype).max + 1, (9, 14, *shape), dtype)

    folder.mkdir()
    for mode, shape in (("L", ()), ("LA", (2,)), ("RGB", (3,)), ("RGBA", (4,))):
        Image.fromarray(noise(*shape)).save(folder / f"{mode}.png")
    Image.fromarray(noise(3)).quantize(20).save(folder / "P.png")
    Image.fromarray(noise(3)).quantize(20).save(folder / "P-transparent.png", transparency=3)
    Image.fromarray(noise()).convert("1").save(folder / "1.png")
    Image.fromarray(noise(3)).convert("CMYK").save(folder / "CMYK.tif")
    for ending in ("png", "tif"):
        Image.fromarray(noise(dtype=np.uint16)).save(folder / f"I16-{ending}.{ending}")
        cv2.imwrite(str(folder / f"RGB16-{ending}.{ending}"), noise(3, dtype=np.uint16))
    cv2.imwrite(str(folder / "RGBA16.png"), noise(4, dtype=np.uint16))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_identity_changes_no_pixel_of_any_mode(tmp_path, capfd, channels):
    model = save_unchanged(tmp_path / "unchanged.aecore", channels)
    source, out = tmp_path / "in", tmp_path / "out"
    pictures_of_all_modes(source)
    status, output, errors = run(capfd, source, "-o", out, "-m", model)
    assert (status, errors) == (0, "")
    assert "CMYK became RGB" in output
    assert names(out) == names(source)
    for name in names(source):
        before, after = (images.read_picture(folder / name).frames[0] for folder in (source, out))
        assert after.mode == before.mode
        np.testing.assert_array_equal(after.values, before.values)
        if before.alpha is not None:
            np.testing.assert_array_equal(after.alpha, before.alpha)
    kept = {"L.png": "L", "LA.png": "LA", "1.png": "1", "I16-png.png": "I;16", "RGBA.png": "RGBA"}
    for name, mode in kept.items():
        with Image.open(source / name) as before, Image.open(out / name) as after:
            assert after.mode == before.mode == mode
            np.testing.assert_array_equal(after, before)
    for name in ("RGB16-png.png", "RGB16-tif.tif", "RGBA16.png"):
        before, after = (
            cv2.imread(str(folder / name), cv2.IMREAD_UNCHANGED) for folder in (source, out)
        )
        assert after.dtype == np.uint16
        np.testing.assert_array_equal(after, before)


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 60,000 pixels high and wide."""

    def chunk(kind, data):
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    head = (60_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0" * 99))


def break_files(folder):
    """Makes twelve of a folder's pictures unreadable, each in another way."""
    whole = (folder / "0.png").read_bytes()
    damage = {
        "empty.png": b"",
        "text.png": b"This is a text.",
        "truncated.png": whole[: len(whole) // 2],
        "header.png": whole[:20],
        "flipped.png": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:],
        "zeros.jpg": bytes(1000),
        "bomb.png": bomb(),
        "truncated.gif": b"GIF89a\x10\x00\x10\x00",
        "riff.webp": b"RIFF\x00\x01\x00\x00WEBPVP8 ",
    }
    for name, data in damage.items():
        (folder / name).write_bytes(data)
    (folder / "folder.jpg").mkdir()
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    return {*damage, "folder.jpg", "loop.png", "gone.png"}


@pytest.mark.parametrize("as_files", [False, True])
def test_bad_files_are_named_and_the_others_restored(unchanged, tmp_path, capfd, as_files):
    source, out = tmp_path / "in", tmp_path / "out"
    save_pictures(source, 188)
    broken = break_files(source)
    inputs = sorted(source.iterdir()) if as_files else [source]
    status, output, errors = run(capfd, *inputs, "-o", out, "-m", unchanged)
    assert status == 1
    assert names(out) == sorted(f"{index}.png" for index in range(188))
    lines = errors.splitlines()
    assert {line.split(": ")[0] for line in lines} == {str(source / name) for name in broken}
    assert len(lines) == len(broken) == 12
    assert "188 restored, 12 failed, 0 skipped" in output

    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    skipping = run(capfd, *inputs, "-o", out, "-m", unchanged, "--if-exists", "skip")
    assert skipping[0] == 1
    assert sorted(skipping[2].splitlines()) == sorted(lines)
    assert "0 restored, 12 failed, 188 skipped" in skipping[1]
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_stopping_at_the_first_failure(unchanged, tmp_path, capfd):
    (tmp_path / "bad.png").write_text("text")
    args = [tmp_path / "bad.png", tmp_path / "worse.png", "-o", tmp_path / "out"]
    status, _, errors = run(capfd, *args, "-m", unchanged, "--on-error", "stop")
    assert status == 1
    assert len(errors.splitlines()) == 1


def test_a_full_disk_stops_and_leaves_nothing_half_written(unchanged, tmp_path, capfd, monkeypatch):
    save_pictures(tmp_path / "in", 20)
    write = images.write_picture
    written = []

    def full(picture, path, **options):
        if len(written) == 5:
            raise OSError(28, os.strerror(28), str(path))
        written.append(path)
        return write(picture, path, **options)

    monkeypatch.setattr(images, "write_picture", full)
    status, _, errors = run(capfd, tmp_path / "in", "-o", tmp_path / "out", "-m", unchanged)
    assert status == 1
    assert errors.count("\n") == 1
    assert "No space left on device" in errors
    assert len(names(tmp_path / "out")) <= 6


def test_what_a_picture_is_unlike_is_said_once(trained, tmp_path, capfd):
    save_pictures(tmp_path / "in", 5, (100, 90), mode="RGB")
    status, output, errors = run(capfd, tmp_path / "in", "-o", tmp_path / "out", "-m", trained)
    assert (status, errors) == (0, "")
    notes = [line for line in output.splitlines() if line.startswith("note: ")]
    more = [line for line in notes if line.startswith("note: 4 more files: ")]
    assert (len(notes) - len(more), len(more)) == (3, 2)
    assert "channel by channel" in output
    assert "much larger than the 16x16 pixels" in output
    assert "less noise or fine detail" in output


def test_of_how_many_more_files_a_note_is_true_is_said_at_the_end(
    unchanged, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(bulk, "_write", lambda job, *_: ("the same", f"only {job.source.stem}"))

    def lines(count, *more):
        save_pictures(tmp_path / str(count), count)
        out = tmp_path / f"out{count}"
        status, output, errors = run(
            capfd, tmp_path / str(count), "-o", out, "-m", unchanged, *more
        )
        assert (status, errors) == (0, "")
        return [line for line in output.splitlines() if "more file" in line]

    assert lines(20) == ["note: 19 more files: the same (--report FILE lists them)"]
    report = ("--report", tmp_path / "report.json")
    assert lines(2, *report) == ["note: 1 more file: the same (listed in the report)"]
    assert lines(1) == []


def test_an_interruption_leaves_what_was_finished(unchanged, tmp_path):
    save_pictures(tmp_path / "in", 400, (300, 300), mode="RGB")
    command = [sys.executable, "-m", "aecore", "restore", tmp_path / "in"]
    process = subprocess.Popen(
        [
            *map(str, command),
            *("-o", str(tmp_path / "out"), "-m", unchanged),
            *("--report", str(tmp_path / "report.json")),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "out").exists() or len(list((tmp_path / "out").iterdir())) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("interrupted: ")
    assert (
        "of 400 files are done; to continue, run the same command with --if-exists skip" in errors
    )
    written = names(tmp_path / "out")
    assert 3 <= len(written) < 400
    assert f"{len(written)} of 400 files are done" in errors
    reported = json.loads((tmp_path / "report.json").read_text())["files"]
    assert sorted(entry["target"] for entry in reported) == [
        str(tmp_path / "out" / name) for name in written
    ]
    for name in written:
        np.testing.assert_array_equal(
            Image.open(tmp_path / "out" / name), Image.open(tmp_path / "in" / name)
        )


def test_pictures_of_many_sizes_compile_few_shapes(trained, tmp_path):
    for index in range(80):
        size = tuple(RANDOM.integers(4, 120, 2))
        save_pictures(tmp_path / str(index), 1, size)
    jobs, _ = files.find(
        [str(tmp_path)], str(tmp_path / "out"), recursive=True, suffix="", extension="auto"
    )
    assert len(jobs) == 80
    restorer = aecore.Restorer.load(trained)
    assert all(isinstance(done, bulk.Done) for done in bulk.restore(jobs, restorer))
    assert len(restorer._engine.programs.compiled) <= 4


def test_collisions_are_found_before_anything_is_done(tmp_path):
    for ending in ("png", "jpg"):
        Image.new("L", (4, 4)).save(tmp_path / f"a.{ending}")
    jobs, _ = files.find(
        [str(tmp_path)], str(tmp_path / "out"), recursive=False, suffix="", extension="png"
    )
    with pytest.raises(ConfigError, match="would both become"):
        files.check(jobs, comparing=False, overwrite=True, report=None)


def test_an_output_folder_within_the_input_is_no_input(unchanged, tmp_path, capfd):
    save_pictures(tmp_path / "in", 2)
    out = tmp_path / "in" / "out"
    args = [tmp_path / "in", "-o", out, "-m", unchanged, "--recursive", "--if-exists", "overwrite"]
    for _ in range(2):
        status, output, errors = run(capfd, *args)
        assert (status, errors) == (0, "")
        assert "2 restored" in output
    suffixed = [tmp_path / "in", "-o", tmp_path / "in", "-m", unchanged, "--suffix", "_new"]
    for _ in range(2):
        status, output, errors = run(capfd, *suffixed, "--if-exists", "overwrite")
        assert (status, errors) == (0, "")
        assert "2 restored" in output


def test_patterns_find_no_outputs(tmp_path):
    source, out = tmp_path / "in", tmp_path / "in" / "out"
    for folder in (source, source / "a", out, out / "a"):
        save_pictures(folder, 1)
    (source / "a" / "link.png").symlink_to(out / "0.png")

    def found(pattern, output, **options):
        return [str(job.source.relative_to(source)) for job in find(pattern, output, **options)]

    assert found(source / "**" / "*.png", out) == ["0.png", "a/0.png", "a/link.png"]
    assert found(source / "*" / "0.png", source / "a" / ".." / "out") == ["a/0.png"]
    # Who names the output folder itself means the files in it.
    assert found(out / "**" / "*.png", out, suffix="_new") == ["out/0.png", "out/a/0.png"]
    assert found(out / "a" / "*.png", out) == ["out/a/0.png"]
    assert found(out / "0.png", out, suffix="_new") == ["out/0.png"]


def test_an_input_named_twice_is_restored_once(unchanged, tmp_path, capfd):
    save_pictures(tmp_path / "in", 2)
    source = tmp_path / "in" / "0.png"
    twice = [source, tmp_path / "in" / ".." / "in" / "0.png", tmp_path / "in" / "*0.png"]
    status, output, _ = run(capfd, *twice, "-o", tmp_path / "out", "-m", unchanged)
    assert status == 0
    assert "1 restored" in output
    # A pattern that matches one file, or a file named like a pattern, is one file.
    status, *_ = run(capfd, tmp_path / "in" / "0*", "-o", tmp_path / "b.png", "-m", unchanged)
    assert status == 0
    assert (tmp_path / "b.png").is_file()


def test_what_is_no_regular_file_is_not_replaced(unchanged, tmp_path, capfd):
    save_pictures(tmp_path / "in", 1)
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    args = [tmp_path / "in" / "0.png", "-o", pipe, "-m", unchanged, "--if-exists", "overwrite"]
    status, _, errors = run(capfd, *args)
    assert status == 2
    assert "not a regular file" in errors
    assert pipe.is_fifo()


def test_names_of_files_stay_in_one_line(unchanged, tmp_path, capfd):
    source = tmp_path / "a\nb.png"
    source.write_text("text")
    status, _, errors = run(capfd, source, "-o", tmp_path / "out", "-m", unchanged)
    assert status == 1
    assert errors.count("\n") == 1
    assert "a\\nb.png: is not a picture" in errors


def test_animations_and_pages_come_back_whole(unchanged, tmp_path, capfd):
    frames = [Image.fromarray(RANDOM.integers(0, 256, (9, 8, 3), np.uint8)) for _ in range(4)]
    source = tmp_path / "in"
    source.mkdir()
    frames[0].save(
        source / "a.png", save_all=True, append_images=frames[1:], duration=[40, 60, 80, 100]
    )
    frames[0].save(source / "a.tif", save_all=True, append_images=frames[1:])
    assert run(capfd, source, "-o", tmp_path / "out", "-m", unchanged)[::2] == (0, "")
    for name in ("a.png", "a.tif"):
        with Image.open(tmp_path / "out" / name) as restored:
            assert restored.n_frames == 4
            for index, frame in enumerate(frames):
                restored.seek(index)
                np.testing.assert_array_equal(restored.convert("RGB"), frame)
                assert restored.info.get("duration", 40 + 20 * index) == 40 + 20 * index


def save_video(av, path):
    """20 frames of 32×24 pixels, each lighter than the one before."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", 10)
        stream.width, stream.height = 32, 24
        for index in range(20):
            array = np.full((24, 32, 3), 12 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, "rgb24")))
        container.mux(stream.encode())


@pytest.mark.every_room
def test_videos_are_restored_too(unchanged, tmp_path, capfd):
    av = pytest.importorskip("av")
    save_video(av, tmp_path / "a.mp4")
    args = [tmp_path / "a.mp4", "-o", tmp_path / "b.mp4", "-m", unchanged]
    assert run(capfd, *args)[::2] == (0, "")
    with av.open(str(tmp_path / "b.mp4")) as container:
        restored = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(restored) == 20
    assert np.abs(restored[10].mean() - 120) < 3


def test_what_is_being_written_when_restoring_stops_is_reported(unchanged, tmp_path, monkeypatch):
    save_pictures(tmp_path / "in", 6)
    write = images.write_picture

    def slow(picture, path, **options):
        time.sleep(0.2)
        return write(picture, path, **options)

    monkeypatch.setattr(images, "write_picture", slow)
    jobs = find(tmp_path / "in", tmp_path / "out")
    outcomes = []
    results = bulk.restore(jobs, aecore.Restorer.load(unchanged), late=outcomes.append)
    outcomes.append(next(results))
    results.close()
    assert sorted(done.job.target.name for done in outcomes) == names(tmp_path / "out")


def find(source, output, **options):
    """The jobs of a command with a folder as its input."""
    options = dict(recursive=False, suffix="", extension="auto") | options
    return files.find([str(source)], str(output), **options)[0]


def test_a_list_may_be_cut_off(tmp_path):
    save_pictures(tmp_path / "in", 3000, (1, 1))
    args = [sys.executable, "-m", "aecore", "restore", str(tmp_path / "in"), "-m", "none"]
    process = subprocess.Popen(
        [*args, "-o", str(tmp_path / "out"), "--dry-run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert b" -> " in process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0


def test_shards_divide_the_inputs(unchanged, tmp_path, capfd):
    save_pictures(tmp_path / "in", 20)
    save_pictures(tmp_path / "in" / "deep", 20)
    (tmp_path / "in" / "broken.png").write_text("text")
    args = [tmp_path / "in", tmp_path / "missing.png", "-o", tmp_path / "out", "-m", unchanged]
    args += ["--recursive", "--report", tmp_path / "report.json"]
    sources = []
    for shard in ("1/3", "2/3", "3/3"):
        # Outputs of the other shards are neither in the way nor looked at.
        run(capfd, *args, "--shard", shard)
        entries = json.loads((tmp_path / "report.json").read_text())["files"]
        assert 5 < len(entries) < 25
        assert not any(entry["status"] == "skipped" for entry in entries)
        sources += [entry["source"] for entry in entries]
    assert len(sources) == len(set(sources)) == 42
    assert len(names(tmp_path / "out")) == 40


@pytest.mark.parametrize("name", ["{}.png", "frame{:02}.png", "videos/{:05}.mp4"])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_shards_of_numbered_files_are_about_equal(name, count):
    failures = [files.Failure(name.format(number), "") for number in range(100)]
    shards = [files.Shard(number, count) for number in range(1, count + 1)]
    sizes = [sum(map(shard.holds, failures)) for shard in shards]
    assert sum(sizes) == 100
    # Three standard deviations of a random division.
    assert np.abs(np.array(sizes) - 100 / count).max() < 3 * (100 / count) ** 0.5


@pytest.mark.parametrize("text", ["3/2", "0/2", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_impossible_shards(unchanged, tmp_path, capfd, text):
    status, _, errors = run(capfd, tmp_path, "-o", tmp_path, "-m", unchanged, f"--shard={text}")
    assert status == 2
    assert errors == (
        f"error: shard {text} is not possible; use I/N with I from 1 to N, such as 1/4 to 4/4\n"
    )


def test_skipping_takes_linear_time(tmp_path, monkeypatch):
    hashed = []
    real = files.Job.__hash__
    monkeypatch.setattr(files.Job, "__hash__", lambda job: hashed.append(1) or real(job))
    jobs = [
        files.Job(epath.Path(f"{index}.png"), epath.Path(tmp_path) / f"{index % 2}.png")
        for index in range(300)
    ]
    (tmp_path / "0.png").touch()
    done = files.to_do(jobs, comparing=False, if_exists="skip")
    assert done == (jobs[1::2], jobs[::2])
    assert len(hashed) < 5 * len(jobs)


def test_a_picture_that_exists_is_skipped_but_not_a_comparison_alone(unchanged, tmp_path, capfd):
    save_pictures(tmp_path / "in", 2)
    out = tmp_path / "out"
    args = [tmp_path / "in", "-o", out, "-m", unchanged]
    assert run(capfd, *args)[0] == 0
    (out / "1_compare.png").write_text("kept")
    _, _, errors = run(capfd, *args, "--compare")
    assert f"{out / '0.png'} exists, and 2 more" in errors
    (out / "0.png").unlink()
    (out / "1.png").unlink()
    _, _, errors = run(capfd, *args, "--compare")
    assert f"{out / '1_compare.png'} exists; use" in errors
    (out / "1.png").write_text("kept")
    _, output, _ = run(capfd, *args, "--compare", "--if-exists", "skip")
    assert "1 restored, 0 failed, 1 skipped" in output
    assert names(out) == ["0.png", "0_compare.png", "1.png", "1_compare.png"]
    assert (out / "1.png").read_text() == "kept"
    (out / "0_compare.png").unlink()
    _, output, _ = run(capfd, *args, "--compare", "--if-exists", "skip")
    assert "0 restored, 0 failed, 2 skipped" in output
    (out / "1.png").unlink()
    _, output, _ = run(capfd, *args, "--compare", "--if-exists", "skip")
    assert "1 restored, 0 failed, 1 skipped" in output
    assert names(out) == ["0.png", "1.png", "1_compare.png"]


def test_a_picture_is_written_after_its_comparison(unchanged, tmp_path, capfd, monkeypatch):
    save_pictures(tmp_path / "in", 1)
    args = [tmp_path / "in", "-o", tmp_path / "out", "-m", unchanged, "--compare"]
    write = images.write_picture
    written = []

    def ended_after_one(picture, path, **options):
        if written:
            raise OSError(28, os.strerror(28), str(path))
        written.append(path)
        return write(picture, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(images, "write_picture", ended_after_one)
        assert run(capfd, *args)[0] == 1
    assert names(tmp_path / "out") == ["0_compare.png"]
    assert run(capfd, *args, "--if-exists", "skip")[0] == 0
    assert names(tmp_path / "out") == ["0.png", "0_compare.png"]


def test_a_video_has_no_comparison(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("v.mp4", "v_compare.png"):
        (tmp_path / "in" / name).touch()
    jobs = find(tmp_path / "in", tmp_path / "out")
    files.check(jobs, comparing=True, overwrite=False, report=None)
    save_pictures(tmp_path / "in", 1)
    (tmp_path / "in" / "0_compare.png").touch()
    with pytest.raises(ConfigError, match="would both become"):
        files.check(
            find(tmp_path / "in", tmp_path / "out"), comparing=True, overwrite=False, report=None
        )


def test_a_folder_in_the_home_directory_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_pictures(tmp_path / "pics", 1)
    (job,) = find("~/pics", tmp_path / "out")
    assert job.target == tmp_path / "out" / "0.png"
    with pytest.raises(ConfigError, match="name a folder instead"):
        find("~/pics", tmp_path / "out.png")


def test_a_pattern_without_pictures_is_named_also_where_the_output_is_a_file(
    tmp_path, unchanged, capfd
):
    status, _, errors = run(
        capfd, tmp_path / "none*.png", "-o", tmp_path / "out.png", "-m", unchanged
    )
    assert status == 1
    assert "none*.png: matches no file" in errors


def test_typescript_is_no_video(unchanged, tmp_path, capfd):
    pytest.importorskip("av")
    save_pictures(tmp_path / "in", 1)
    (tmp_path / "in" / "code.ts").write_text("export const a: number = 1;\n" * 100)
    status, output, errors = run(capfd, tmp_path / "in", "-o", tmp_path / "out", "-m", unchanged)
    assert status == 1
    assert errors.count("\n") == 1
    assert "code.ts: is damaged, or not a video" in errors
    assert "1 restored, 1 failed" in output


def test_quality(unchanged, tmp_path, capfd):
    save_pictures(tmp_path / "in", 1, (90, 80), mode="RGB")
    args = [tmp_path / "in", "-o", tmp_path / "out", "-m", unchanged, "--ext", "jpg"]
    args += ["--if-exists", "overwrite"]
    sizes = []
    for quality in ("10", "60", None):
        assert run(capfd, *args, *(["--quality", quality] if quality else []))[0] == 0
        sizes.append((tmp_path / "out" / "0.jpg").stat().st_size)
    assert sizes == sorted(set(sizes))
    status, _, errors = run(capfd, *args, "--quality", "101")
    assert status == 2
    assert errors == "error: quality 101 is out of range; use 1 to 100\n"
    with pytest.raises(ConfigError, match="quality 0 is out of range"):
        bulk.WriteOptions(quality=0)


@pytest.mark.parametrize("extension", [".jpg", "jpgg", "mp4", "psd", ""])
def test_an_ending_that_no_picture_can_have_is_refused(tmp_path, extension):
    with pytest.raises(ConfigError, match=f"extension {extension!r}; use 'auto', or"):
        find(tmp_path, tmp_path / "out", extension=extension)
    for possible in ("auto", "png", "JPG", "tif", "avif"):
        assert find(tmp_path, tmp_path / "out", extension=possible) == []


@pytest.mark.parametrize("kind", ["path", "picture"])
def test_a_photograph_comes_back_upright_with_its_profile(unchanged, tmp_path, kind):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Phone"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    save_pictures(tmp_path, 1, (20, 30), mode="RGB")
    with Image.open(tmp_path / "0.png") as image:
        image.save(tmp_path / "0.jpg", exif=exif, icc_profile=profile, dpi=(300, 300))
    expected = np.asarray(images.read(epath.Path(tmp_path / "0.jpg")))
    restorer = aecore.Restorer.load(unchanged)
    if kind == "path":
        restored = restorer(tmp_path / "0.jpg")
    else:
        with Image.open(tmp_path / "0.jpg") as image:
            restored = restorer(image)
    assert restored.size == (20, 30)
    np.testing.assert_array_equal(restored, expected)
    assert restored.info["icc_profile"] == profile
    assert restored.info["dpi"] == (300, 300)
    assert restored.getexif()[ExifTags.Base.Make] == "Phone"
    assert ExifTags.Base.Orientation not in restored.getexif()


def test_addresses_are_refused_in_one_line(unchanged, tmp_path, capfd):
    address = "https://example.org/a.png"
    with pytest.raises(ImageError, match="download the file first"):
        aecore.Restorer.load(unchanged)(address)
    for args in ([address, "-o", tmp_path / "a.png"], [tmp_path / "a.png", "-o", address]):
        status, _, errors = run(capfd, *args, "-m", unchanged)
        assert status == 2
        assert errors == (
            f"error: {address}: https:// addresses can't be read; download the file first\n"
        )


def test_a_path_means_the_same_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert str(storage.absolute("a/b")) == str(storage.absolute("~/a/b")) == f"{tmp_path}/a/b"
    assert str(storage.absolute("gs://bucket/a")) == "gs://bucket/a"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_full_disk_names_the_path(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "a.json"
    real = type(path).open
    monkeypatch.setattr(type(path), "open", lambda _, mode: real(epath.Path("/dev/full"), mode))
    with pytest.raises(OSError) as caught:
        storage.write_json(path, {"a": 1})
    assert storage.is_disk_full(caught.value)
    assert caught.value.filename == str(path)


def test_a_file_that_cannot_be_written_is_named_as_it_was_asked_for(tmp_path):
    path = tmp_path / "missing" / "a.json"
    with pytest.raises(FileNotFoundError) as caught:
        storage.write_json(path, {"a": 1})
    assert caught.value.filename == str(path)
    assert "tmp" not in str(caught.value).replace(str(path), "")


# ---- Networks that enlarge


@pytest.fixture(scope="module", params=[2, 3])
def enlarging(request, tmp_path_factory):
    """An untrained `Upscaler`, which is a bicubic interpolation, as an exported file."""
    model = Upscaler(4, 1, scale=request.param)
    params = model.init(jax.random.key(0), np.zeros((1, 8, 8, 3)))["params"]
    path = epath.Path(tmp_path_factory.mktemp("model") / "larger.aecore")
    exported.save(path, TrainedNetwork.of(model, params))
    return str(path), request.param


def bicubic(image, scale):
    """By Pillow, which between rows and columns rounds and clips all but floats."""
    size = (scale * image.width, scale * image.height)
    bands = [band.convert("F").resize(size, Image.Resampling.BICUBIC) for band in image.split()]
    larger = np.rint(np.dstack(bands)).clip(0, 255).astype(np.int64)
    return larger[..., 0] if len(bands) == 1 else larger


def test_pictures_of_any_mode_come_back_larger(enlarging, tmp_path, capfd):
    model, scale = enlarging
    source, out = tmp_path / "in", tmp_path / "out"
    pictures_of_all_modes(source)
    assert run(capfd, source, "-o", out, "-m", model)[::2] == (0, "")
    assert names(out) == names(source)
    for name in names(source):
        before, after = (images.read_picture(folder / name).frames[0] for folder in (source, out))
        assert after.mode == before.mode
        assert after.values.shape[:2] == (9 * scale, 14 * scale)
        if name.startswith("1."):
            continue
        one_of_255 = 257 if before.values.dtype == np.uint16 else 1
        expected = images.enlarged(before.values, scale).astype(np.int64)
        assert np.abs(after.values - expected).max() <= one_of_255
        if before.alpha is not None:
            np.testing.assert_array_equal(after.alpha, images.enlarged(before.alpha, scale))
    with Image.open(source / "RGBA.png") as picture, Image.open(out / "RGBA.png") as restored:
        channels = zip(picture.split(), restored.split(), strict=True)
        for before, after in channels:
            assert np.abs(np.asarray(after, np.int64) - bicubic(before, scale)).max() <= 1


def test_resolution_profile_and_comparison_of_larger_pictures(enlarging, tmp_path, capfd):
    model, scale = enlarging
    picture = Image.fromarray(RANDOM.integers(0, 256, (9, 14, 3), np.uint8))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "aecore"
    exif.get_ifd(ExifTags.IFD.Exif).update(
        {ExifTags.Base.ExifImageWidth: 14, ExifTags.Base.ExifImageHeight: 9}
    )
    picture.save(tmp_path / "a.png", dpi=(100, 100), icc_profile=profile, exif=exif)
    args = [tmp_path / "a.png", "-o", tmp_path / "b.png", "-m", model, "--compare"]
    assert run(capfd, *args)[::2] == (0, "")
    with Image.open(tmp_path / "b.png") as restored:
        assert restored.info["dpi"] == pytest.approx((100 * scale,) * 2, rel=1e-3)
        details = restored.getexif().get_ifd(ExifTags.IFD.Exif)
        sides = ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight
        assert tuple(details[side] for side in sides) == restored.size
        assert restored.info["icc_profile"] == profile
        assert restored.getexif()[ExifTags.Base.Make] == "aecore"
        assert restored.size == (14 * scale, 9 * scale)
    with Image.open(tmp_path / "b_compare.png") as both:
        assert both.size == (2 * 14 * scale, 9 * scale)
        left, right = np.split(np.asarray(both, np.int64), 2, axis=1)
        assert np.abs(left - right).max() <= 1


@pytest.mark.parametrize("width", ["wide", b"\x0e", (14, 9)])
def test_a_width_in_exif_that_is_no_number_stops_nothing(tmp_path, width):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "aecore"
    exif.get_ifd(ExifTags.IFD.Exif).update(
        {ExifTags.Base.ExifImageWidth: width, ExifTags.Base.ExifImageHeight: 9}
    )
    Image.new("RGB", (14, 9)).save(tmp_path / "a.png", exif=exif)
    frame = images.read_picture(tmp_path / "a.png").frames[0]
    larger = Image.Exif()
    larger.load(frame.restored(np.zeros((18, 28, 3), np.uint8)).carried["exif"])
    assert larger.get_ifd(ExifTags.IFD.Exif) == {
        ExifTags.Base.ExifImageWidth: width,
        ExifTags.Base.ExifImageHeight: 18,
    }


def test_a_picture_that_cannot_be_enlarged_stops_no_other(enlarging, tmp_path, capfd, monkeypatch):
    save_pictures(tmp_path / "in", 3)
    enlarge = images.Frame.restored

    def restored(frame, values):
        if frame.carried.get("comment"):
            raise ImageError("values and alpha don't make a picture")
        return enlarge(frame, values)

    monkeypatch.setattr(images.Frame, "restored", restored)
    with Image.open(tmp_path / "in" / "1.png") as picture:
        picture.save(tmp_path / "in" / "1.gif", comment="odd")
    args = [tmp_path / "in", "-o", tmp_path / "out", "-m", enlarging[0]]
    status, output, errors = run(capfd, *args)
    assert status == 1
    assert errors == f"{tmp_path}/in/1.gif: values and alpha don't make a picture\n"
    assert "3 restored, 1 failed" in output


def test_animations_come_back_larger(enlarging, tmp_path, capfd):
    model, scale = enlarging
    frames = [Image.fromarray(RANDOM.integers(0, 256, (9, 8, 3), np.uint8)) for _ in range(3)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], duration=40)
    args = [tmp_path / "a.png", "-o", tmp_path / "b.png", "-m", model]
    assert run(capfd, *args)[::2] == (0, "")
    with Image.open(tmp_path / "b.png") as restored:
        assert (restored.n_frames, restored.size) == (3, (8 * scale, 9 * scale))
        for index, frame in enumerate(frames):
            restored.seek(index)
            got = np.asarray(restored.convert("RGB"), np.int64)
            assert np.abs(got - bicubic(frame, scale)).max() <= 1


def test_videos_come_back_larger(enlarging, tmp_path, capfd):
    av = pytest.importorskip("av")
    model, scale = enlarging
    save_video(av, tmp_path / "a.mp4")
    args = [tmp_path / "a.mp4", "-o", tmp_path / "b.mp4", "-m", model]
    assert run(capfd, *args)[::2] == (0, "")
    with av.open(str(tmp_path / "b.mp4")) as container:
        restored = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(restored) == 20
    assert restored[0].shape == (24 * scale, 32 * scale, 3)
    assert np.abs(restored[10].mean() - 120) < 3


def test_what_waits_to_be_written_counts_as_large_as_it_became(enlarging, tmp_path, monkeypatch):
    model, scale = enlarging
    save_pictures(tmp_path / "in", 6, (9, 14))
    restorer = aecore.Restorer.load(model)
    write, many = images.write_picture, restorer.many
    restored, written, waiting = [], [], []

    def slow(picture, path, **options):
        time.sleep(0.05)
        notes = write(picture, path, **options)
        written.append(path)
        return notes

    def counted(*args, **options):
        for item in many(*args, **options):
            restored.append(item)
            waiting.append(len(restored) - len(written))
            yield item

    monkeypatch.setattr(images, "write_picture", slow)
    monkeypatch.setattr(restorer, "many", counted)
    monkeypatch.setattr(bulk, "_MOST_PIXELS", scale**2 * 9 * 14)
    assert len(list(bulk.restore(find(tmp_path / "in", tmp_path / "out"), restorer))) == 6
    assert max(waiting) <= 2


def test_frames_that_become_larger_are_fewer_at_a_time(unchanged, enlarging, tmp_path, monkeypatch):
    model, scale = enlarging
    (tmp_path / "a.mp4").touch()
    taken = []
    monkeypatch.setattr(
        videos, "restore", lambda *_, batch_size, scale: taken.append(batch_size) or ()
    )
    for network in (unchanged, model):
        jobs = find(tmp_path / "a.mp4", tmp_path / "out")
        list(bulk.restore(jobs, aecore.Restorer.load(network)))
    assert taken == [16, {2: 4, 3: 1}[scale]]


def test_a_reader_that_leaves_does_not_stop_the_work(unchanged, tmp_path):
    pictures_of_all_modes(tmp_path / "in")
    command = [sys.executable, "-m", "aecore", "restore", "in", "-o", "out", "-m", unchanged]
    restoring = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    restoring.stdout.close()
    assert restoring.stderr.read() == ""
    assert restoring.wait(timeout=120) == 0
    assert names(tmp_path / "out") == names(tmp_path / "in")
