"""Videos in and out: every picture, its time, and what comes with it."""

import errno
import gc
import os
import pathlib
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from aecore.errors import ImageError
from aecore.media import videos
from aecore.storage import is_disk_full

av = pytest.importorskip("av")

QUALITY = {
    "ffv1": {},
    "libx265": {"crf": "10", "x265-params": "log-level=none"},
    "mjpeg": {"qmin": "1", "qmax": "2"},
    "mpeg4": {"qmin": "1", "qmax": "2"},
}
SIZE = (32, 24)
COUNT = 20
UNEVEN = np.cumsum([0, *[40, 80, 20, 50] * 5])[:COUNT].tolist()
"""Milliseconds, as of a video without a constant frame rate."""


def pictures(size=SIZE, count=COUNT):
    """Smooth, as compression then keeps them: `(count, H, W, 3)` uint8."""
    width, height = size
    t, y, x = np.mgrid[0:count, 0:height, 0:width].astype(np.float32)
    channels = [128 + 90 * np.sin(x / 9 + t / 7), 40 + 6 * y + t, 200 - 4 * x + 2 * t]
    return np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)


def make(
    path,
    codec="libx264",
    *,
    size=SIZE,
    pixels="yuv420p",
    times=None,
    sound="aac",
    metadata=None,
    count=COUNT,
    container_options=None,
    change=lambda stream: None,
):
    """Writes a video of `pictures(size)`: at 25 per second, or at `times` in milliseconds."""
    with av.open(str(path), "w", container_options=container_options or {}) as output:
        output.metadata.update(metadata or {})
        base = Fraction(1, 25) if times is None else Fraction(1, 1000)
        stream = output.add_stream(codec, rate=25, time_base=base)
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        stream.options = QUALITY.get(codec, {"crf": "10"})
        change(stream)
        track = output.add_stream(sound, rate=48000) if sound else None
        if track:
            track.format = "flt" if sound == "libopus" else "fltp"
        output.start_encoding()
        if track:
            noise = np.random.default_rng(0).standard_normal((48000 * count // 25, 2)) / 8
            length = track.codec_context.frame_size
            for start in range(0, len(noise) - length + 1, length):
                part = noise[start : start + length].astype(np.float32)
                part = part.reshape(1, -1) if sound == "libopus" else part.T.copy()
                frame = av.AudioFrame.from_ndarray(part, track.format.name, "stereo")
                frame.sample_rate, frame.pts = 48000, start
                output.mux(track.encode(frame))
            output.mux(track.encode(None))
        for time, picture in zip(times or range(count), pictures(size, count), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = time, base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def read(path):
    """Times in seconds, `(N, H, W, 3)` pictures."""
    with av.open(str(path)) as reader:
        frames = list(reader.decode(video=0))
        times = [frame.time for frame in frames]
        # FFmpeg's default conversion is off by one on average.
        flags = av.video.reformatter.Interpolation
        options = {"interpolation": (flags.BICUBIC | flags.ACCURATE_RND | flags.FULL_CHR_H_INT)}
        arrays = [frame.to_ndarray(format="rgb24", **options) for frame in frames]
        return times, np.stack(arrays)


def sound_packets(path):
    with av.open(str(path)) as reader:
        return [
            (bytes(packet), float(packet.pts * packet.time_base))
            for packet in reader.demux(audio=0)
            if packet.size
        ]


def same(batch):
    return batch


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("suffix", "codec", "size", "pixels", "times", "sound"),
    [
        (".mp4", "libx264", SIZE, "yuv420p", None, "aac"),
        (".mp4", "libx264", SIZE, "yuv420p", UNEVEN, "aac"),
        (".mp4", "libx265", SIZE, "yuv420p", None, "aac"),
        (".mp4", "mpeg4", (33, 25), "yuv420p", None, "libmp3lame"),
        (".m4v", "libx264", (33, 25), "yuv444p", None, None),
        (".mov", "libx264", (40, 30), "yuv422p", UNEVEN, "aac"),
        (".mov", "mjpeg", SIZE, "yuvj420p", None, None),
        (".mkv", "libx264", (40, 30), "yuv420p", UNEVEN, "libopus"),
        (".mkv", "ffv1", (33, 25), "bgr0", None, "libmp3lame"),
        (".webm", "libvpx-vp9", (33, 25), "yuv420p", None, "libopus"),
        (".webm", "libvpx", (33, 25), "yuv420p", UNEVEN, "libopus"),
        (".avi", "mpeg4", SIZE, "yuv420p", None, "libmp3lame"),
        (".avi", "libx264", SIZE, "yuv420p", None, None),
    ],
)
@pytest.mark.every_room
def test_everything_stays_where_nothing_is_restored(
    tmp_path, capfd, suffix, codec, size, pixels, times, sound
):
    source = make(
        tmp_path / f"source{suffix}",
        codec,
        size=size,
        pixels=pixels,
        times=times,
        sound=sound,
        metadata={"title": "Ein Bär"},
        change=lambda s: setattr(s, "max_b_frames", 0) if suffix == ".avi" else None,
    )
    target = tmp_path / f"target{suffix}"
    capfd.readouterr()

    notes = videos.restore(source, target, same, batch_size=8)

    assert capfd.readouterr() == ("", "")
    assert notes == ()
    expected_times, expected = read(source)
    actual_times, actual = read(target)
    assert len(actual) == COUNT
    assert actual.shape == expected.shape
    assert actual_times == expected_times
    error = np.abs(actual.astype(int) - expected)
    assert error.mean() < 2
    with av.open(str(source)) as a, av.open(str(target)) as b:
        assert b.metadata["title"] == "Ein Bär"
        assert len(a.streams) == len(b.streams)
        first, second = a.streams.video[0], b.streams.video[0]
        assert first.codec_context.name == second.codec_context.name
        assert first.codec_context.pix_fmt == second.codec_context.pix_fmt
        assert first.time_base == second.time_base
        assert float(a.duration) == pytest.approx(float(b.duration), abs=50_000)
    if sound:
        assert len(sound_packets(source)) > 10
        assert sound_packets(source) == sound_packets(target)
    assert leftovers(tmp_path) == [source.name, target.name]


@pytest.mark.parametrize("suffix", [".ts", ".mts", ".m2ts"])
def test_transport_streams(tmp_path, suffix):
    source, target = make(tmp_path / f"source{suffix}", "libx264"), tmp_path / f"target{suffix}"
    assert videos.restore(source, target, same, batch_size=8) == ()
    (expected_times, expected), (actual_times, actual) = read(source), read(target)
    assert actual_times == pytest.approx(expected_times)
    assert np.abs(actual.astype(int) - expected).mean() < 2
    assert len(sound_packets(source)) > 10
    assert sound_packets(source) == sound_packets(target)
    # Transport streams have packets of 188 bytes; cameras and Blu-rays put a time before each.
    content, length = target.read_bytes(), 188 if suffix == ".ts" else 192
    assert {content[place] for place in range(length - 188, len(content), length)} == {0x47}


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv422p", "yuv444p"])
def test_conversion_to_rgb_and_back_loses_nothing(tmp_path, monkeypatch, pixels):
    monkeypatch.setitem(videos._QUALITY, "libx264", {"qp": "0"})
    source = make(tmp_path / "s.mkv", pixels=pixels, sound=None)
    videos.restore(source, tmp_path / "t.mkv", same, batch_size=8)
    error = read(tmp_path / "t.mkv")[1].astype(int) - read(source)[1]
    assert np.abs(error).mean() < 0.2
    assert np.abs(error.mean((0, 1, 2))).max() < 0.05


def test_the_codec_that_has_a_voice_of_its_own_is_silent(tmp_path):
    # In a process of its own, as SVT-AV1 asks only once whether to be silent.
    script = """
import os, pathlib, sys
import test_videos
from aecore.media import videos
from aecore.storage import is_disk_full
folder = pathlib.Path(sys.argv[1])
test_videos.make(folder / "source.mkv", "libx264", sound=None)
videos._ENCODERS["h264"] = "libsvtav1"
videos.restore(folder / "source.mkv", folder / "target.mkv", lambda x: x, batch_size=5)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=pathlib.Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    with av.open(str(tmp_path / "target.mkv")) as reader:
        assert reader.streams.video[0].codec_context.codec.canonical_name == "av1"


@pytest.mark.parametrize(("count", "batch_size"), [(20, 8), (16, 8), (3, 8), (5, 1)])
def test_batches_have_one_shape_and_order(tmp_path, count, batch_size):
    source = make(tmp_path / "source.mkv", "ffv1", pixels="bgr0", sound=None, count=count)
    target = tmp_path / "target.mkv"
    seen = []

    def invert(batch):
        assert (batch.dtype, batch.shape) == (np.uint8, (batch_size, 24, 32, 3))
        seen.append(batch)
        return 255 - batch

    assert videos.restore(source, target, invert, batch_size=batch_size) == ()

    expected = pictures(count=count)
    np.testing.assert_array_equal(np.concatenate(seen)[:count], expected)
    filled = np.concatenate(seen)[count:]
    np.testing.assert_array_equal(filled, np.broadcast_to(expected[-1], filled.shape))
    np.testing.assert_array_equal(read(target)[1], 255 - expected)


def test_pictures_are_not_gathered(tmp_path):
    """The first batch is restored before the last packet is read."""
    source = make(tmp_path / "source.mkv", "ffv1", pixels="bgr0", sound=None, count=COUNT)
    data = source.read_bytes()
    source.write_bytes(data[: len(data) // 2])
    batches = []
    with pytest.raises(ImageError, match="ends after"):
        videos.restore(source, tmp_path / "t.mkv", lambda b: batches.append(1) or b, batch_size=4)
    assert len(batches) >= 2


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_what_describes_the_pictures_is_kept(tmp_path, suffix):
    def describe(stream):
        stream.set_display_rotation(90)
        context = stream.codec_context
        context.sample_aspect_ratio = Fraction(4, 3)
        context.color_range, context.color_primaries = 2, 9
        context.color_trc, context.colorspace = 14, 9

    source = make(tmp_path / f"s{suffix}", change=describe, sound=None)
    target = tmp_path / f"t{suffix}"
    assert videos.restore(source, target, same, batch_size=8) == ()
    with av.open(str(target)) as reader:
        stream = reader.streams.video[0]
        frame = next(reader.decode(stream))
        assert frame.rotation == 90
        assert stream.sample_aspect_ratio == Fraction(4, 3)
        assert (frame.color_range, frame.color_primaries) == (2, 9)
        assert (frame.color_trc, frame.colorspace) == (14, 9)
    colors = [read(path)[1].mean((0, 1, 2)) for path in (target, source)]
    np.testing.assert_allclose(*colors, atol=1.2)


def test_a_container_that_lacks_something_is_noted(tmp_path):
    source = make(
        tmp_path / "s.mp4",
        pixels="yuv420p10le",
        change=lambda s: s.set_display_rotation(90),
        times=UNEVEN,
    )
    notes = videos.restore(source, tmp_path / "t.webm", same, batch_size=8)
    assert [n.split(",")[0] for n in notes] == [
        "10 bits became 8",
        "the codec h264 became vp9",
        "stream 1 (audio",
    ]
    notes = videos.restore(source, tmp_path / "t.avi", same, batch_size=8)
    assert [n.split(",")[0] for n in notes[1:]] == [
        f"{COUNT - 1} frames moved by more than 1 ms: .avi can't hold their exact times",
        "the rotation was dropped: .avi can't hold it",
    ]
    assert len(read(tmp_path / "t.avi")[0]) == COUNT


def test_a_codec_that_needs_even_sides_keeps_odd_ones(tmp_path):
    source = make(tmp_path / "s.webm", "libvpx", size=(33, 25), sound=None)
    target = tmp_path / "t.mp4"
    assert videos.restore(source, target, same, batch_size=8) == ("the codec vp8 became h264",)
    assert read(target)[1].shape == (COUNT, 25, 33, 3)


def test_several_tracks_subtitles_and_chapters(tmp_path):
    source = tmp_path / "s.mkv"
    plain = make(tmp_path / "plain.mkv", sound="aac")
    with av.open(str(plain)) as reader, av.open(str(source), "w") as output:
        copies = [output.add_stream_from_template(s, opaque=True) for s in reader.streams]
        second = output.add_stream_from_template(reader.streams[1], opaque=True)
        second.metadata["language"] = "ger"
        subtitles = output.add_mux_stream("subrip")
        subtitles.time_base = Fraction(1, 1000)
        output.add_attachment("font.ttf", "font/ttf", b"letters")
        output.set_chapters(
            [
                {
                    "id": 1,
                    "start": 0,
                    "end": 400,
                    "time_base": Fraction(1, 1000),
                    "metadata": {"title": "One"},
                }
            ]
        )
        line = av.Packet(b"Hello")
        line.stream, line.pts, line.dts, line.duration = subtitles, 100, 100, 300
        line.time_base = Fraction(1, 1000)
        output.mux(line)
        for packet in reader.demux():
            if packet.size:
                index = packet.stream.index
                packet.stream = copies[index]
                output.mux(packet)
                if index == 1:
                    packet.stream = second
                    output.mux(packet)
    assert videos.restore(source, tmp_path / "t.mkv", same, batch_size=8) == ()
    with av.open(str(source)) as a, av.open(str(tmp_path / "t.mkv")) as b:
        assert [s.type for s in b.streams] == [s.type for s in a.streams]
        assert b.streams[2].metadata["language"] == "ger"
        assert b.streams[4].data == b"letters"
        assert b.chapters() == a.chapters()

        def others(reader):
            streams = [s for s in reader.streams if s.type in ("audio", "subtitle")]
            return sorted(
                (p.stream.index, p.pts, p.duration, bytes(p))
                for p in reader.demux(streams)
                if p.size
            )

        expected = others(a)
        assert len(expected) > 40
        assert others(b) == expected

    notes = videos.restore(source, tmp_path / "t.mp4", same, batch_size=8)
    assert [note.split(" was ")[0] for note in notes] == [
        "stream 3 (subtitle, srt)",
        "stream 4 (attachment, font.ttf)",
    ]


def write_sound(path):
    with av.open(str(path), "w") as output:
        track = output.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        frame.sample_rate, frame.pts = 48000, 0
        output.mux(track.encode(frame))
        output.mux(track.encode(None))


def cut(share, **options):
    def write(path):
        data = make(path, sound=None, **options).read_bytes()
        path.write_bytes(data[: int(share * len(data))])

    return write


def spoil(path):
    data = bytearray(make(path, sound=None).read_bytes())
    with av.open(str(path)) as reader:
        packet = [packet for packet in reader.demux(video=0) if packet.size][COUNT // 2]
    data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)


FASTSTART = {"container_options": {"movflags": "faststart"}}


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("s.mp4", lambda path: None, "can't be read: No such file"),
        ("s.mp4", lambda path: path.mkdir(), "can't be read: Is a directory"),
        ("s.mp4", lambda path: path.write_bytes(b""), "is damaged, or not a video"),
        (
            "s.mp4",
            lambda path: path.write_text("Dear reader,\n" * 99),
            "is damaged, or not a video",
        ),
        ("s.mkv", lambda path: path.write_bytes(bytes(9999)), "is damaged, or not a video"),
        ("s.m4v", write_sound, "has no video stream"),
        ("s.mp4", cut(0.5), "is damaged, or not a video"),
        ("s.mp4", cut(0.9, **FASTSTART), "ends after .. of 20 frames"),
        ("s.mov", cut(0.6, codec="mjpeg", pixels="yuvj420p", **FASTSTART), "ends after"),
        ("s.mkv", cut(0.7), "ends after"),
        ("s.webm", cut(0.6, codec="libvpx-vp9"), "ends after"),
        ("s.avi", cut(0.8, codec="mpeg4"), "ends after"),
        ("s.mp4", spoil, "is damaged: .*can't be decoded"),
    ],
)
def test_a_source_that_is_no_whole_video(tmp_path, capfd, name, write, message):
    folder = tmp_path / "videos"
    folder.mkdir()
    source = folder / name
    write(source)
    before = leftovers(folder)
    capfd.readouterr()
    with pytest.raises(ImageError, match=message) as caught:
        videos.restore(source, folder / f"t{source.suffix}", same, batch_size=4)
    assert str(caught.value).startswith(str(source))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert leftovers(folder) == before


def test_a_file_that_ends_within_its_last_picture(tmp_path):
    source = make(tmp_path / "s.mov", "mjpeg", pixels="yuvj420p", sound=None, **FASTSTART)
    source.write_bytes(source.read_bytes()[:-100])
    notes = videos.restore(source, tmp_path / "t.mov", same, batch_size=8)
    assert notes == ("the last frame is incomplete in the file, and was left out",)
    assert len(read(tmp_path / "t.mov")[0]) == COUNT - 1


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("call", [1, 3])
def test_what_is_interrupted_leaves_what_was_there(tmp_path, capfd, failure, call):
    source = make(tmp_path / "s.mp4")
    target = tmp_path / "t.mp4"
    target.write_bytes(b"before")
    calls = []

    def fail(batch):
        assert leftovers(tmp_path) == [f".t.mp4.{os.getpid()}.tmp", "s.mp4", "t.mp4"]
        calls.append(1)
        if len(calls) == call:
            raise failure
        return batch

    capfd.readouterr()
    with pytest.raises(failure):
        videos.restore(source, target, fail, batch_size=8)
    gc.collect()
    assert capfd.readouterr() == ("", "")
    assert leftovers(tmp_path) == ["s.mp4", "t.mp4"]
    assert target.read_bytes() == b"before"


def test_a_video_may_replace_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = make(tmp_path / "s.mp4").rename("a:b.mp4")
    assert videos.restore(source, source, lambda x: 255 - x, batch_size=8) == ()
    assert leftovers(tmp_path) == [source.name]
    assert np.abs(read(tmp_path / source)[1].astype(int) - (255 - pictures())).mean() < 4


def test_key_frames_are_those_of_the_new_codec(tmp_path, monkeypatch):
    monkeypatch.setitem(videos._ENCODERS, "ffv1", "libx264")
    source = make(tmp_path / "s.mkv", "ffv1", pixels="yuv420p", sound=None)
    videos.restore(source, tmp_path / "t.mkv", same, batch_size=8)
    with av.open(str(tmp_path / "t.mkv")) as reader:
        packets = [packet for packet in reader.demux(video=0) if packet.size]
    assert sum(packet.is_keyframe for packet in packets) == 1


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "mpeg4"), (".mkv", "libx264")])
def test_the_last_picture_stays_as_long(tmp_path, suffix, codec):
    plain = make(tmp_path / f"plain{suffix}", codec, sound=None)
    source, target = tmp_path / f"s{suffix}", tmp_path / f"t{suffix}"
    with av.open(str(plain)) as reader, av.open(str(source), "w") as output:
        copy = output.add_stream_from_template(reader.streams[0], opaque=True)
        for packet in reader.demux():
            if packet.size:
                if packet.pts * packet.time_base == Fraction(COUNT - 1, 25):
                    packet.duration = round(Fraction(1, 2) / packet.time_base)
                packet.stream = copy
                output.mux(packet)
    assert videos.restore(source, target, same, batch_size=8) == ()
    with av.open(str(source)) as a, av.open(str(target)) as b:
        assert a.duration == pytest.approx(1_260_000, abs=50_000)
        assert b.duration == a.duration


@pytest.mark.parametrize("name", ["t.txt", "t", "missing/t.mp4", "folder.mp4"])
def test_a_target_that_can_not_be_written(tmp_path, name):
    source = make(tmp_path / "s.mp4")
    (tmp_path / "folder.mp4").mkdir()
    target = tmp_path / name
    with pytest.raises(ImageError) as caught:
        videos.restore(source, target, same, batch_size=8)
    assert str(caught.value).startswith(str(target))
    assert leftovers(tmp_path) == ["folder.mp4", "s.mp4"]


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_full_disk_is_told_as_such(tmp_path, capfd, suffix):
    source = make(tmp_path / f"s{suffix}", "mpeg4", sound=None)
    target = tmp_path / f"t{suffix}"
    (tmp_path / f".t{suffix}.{os.getpid()}.tmp").symlink_to("/dev/full")
    capfd.readouterr()
    with pytest.raises(OSError, match="No space left") as caught:
        videos.restore(source, target, same, batch_size=8)
    assert caught.value.errno == errno.ENOSPC
    assert capfd.readouterr() == ("", "")
    assert leftovers(tmp_path) == [source.name]


def test_a_file_that_may_not_grow_is_told_as_a_full_disk(tmp_path):
    resource = pytest.importorskip("resource")
    source = make(tmp_path / "s.avi", "mpeg4", sound=None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            videos.restore(source, tmp_path / "t.avi", same, batch_size=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert is_disk_full(caught.value)
    assert leftovers(tmp_path) == [source.name]


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImageError, match=r"need PyAV: pip install 'aecore\[video\]'"):
        videos.restore(tmp_path / "s.mp4", tmp_path / "t.mp4", same, batch_size=8)


def test_the_level_of_logging_is_as_before(tmp_path, caplog):
    av.logging.set_level(av.logging.VERBOSE)
    try:
        with pytest.raises(ImageError):
            videos.restore(tmp_path / "s.mp4", tmp_path / "t.mp4", same, batch_size=8)
        assert av.logging.get_level() == av.logging.VERBOSE
        assert not caplog.records
    finally:
        av.logging.set_level(None)
