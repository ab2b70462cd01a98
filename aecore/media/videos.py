"""Restores video files, frame by frame; frames are `(N, H, W, 3)` uint8 RGB.

Frames are decoded, restored and encoded one batch at a time. Sound, subtitles and other streams are
copied unchanged.
"""

import collections
import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
from etils import epath

from aecore.errors import ImageError
from aecore.storage import is_disk_full, reason

_FORMATS = {
    ".avi": "avi",
    ".m2ts": "mpegts",
    ".m4v": "mp4",
    ".mkv": "matroska",
    ".mov": "mov",
    ".mp4": "mp4",
    ".mts": "mpegts",
    ".ts": "mpegts",
    ".webm": "webm",
}
"""FFmpeg's name of the container format for each file ending."""

SUFFIXES = frozenset(_FORMATS)
"""Endings, in lower case, of files that are treated as videos. All can be read and written."""

# The encoder for each codec. FFmpeg may have several; these need no special hardware.
_ENCODERS = {
    "av1": "libsvtav1",
    "h264": "libx264",
    "hevc": "libx265",
    "vp8": "libvpx",
    "vp9": "libvpx-vp9",
}

# The loss is hardly visible, since the frames are compressed for the second time.
_QUALITY = {
    "libsvtav1": {"crf": "18", "preset": "6"},
    "libvpx": {"crf": "6", "cpu-used": "2"},
    "libvpx-vp9": {"crf": "16", "cpu-used": "4", "row-mt": "1"},
    "libx264": {"crf": "16"},
    # libx265 writes to stderr on its own.
    "libx265": {"crf": "16", "x265-params": "log-level=none"},
}
# Other lossy codecs take a quantiser from 2 to 31, in units of 118.
_OTHER_QUALITY = {"flags": "+qscale", "global_quality": "236"}

_SUBSAMPLED_AGAIN = ("yuv444p", "yuv420p")
"""Pixel formats to try if an encoder doesn't accept the source's, or not at its size."""

_MATRICES = (1, 2, 4, 5, 6, 7, 9)
"""FFmpeg's numbers of the YUV matrices that its scaler supports; 2 is unspecified."""
_BT709 = 1
_LIMITED = 1

_STALE_CONTAINER_KEYS = ("major_brand", "minor_version", "compatible_brands", "encoder")
_STALE_STREAM_KEYS = ("encoder", "alpha_mode", "duration", "bps", "number_of", "_statistics")


def restore(
    source: epath.Path,
    target: epath.Path,
    function: Callable[[np.ndarray], np.ndarray],
    *,
    batch_size: int,
    scale: int = 1,
) -> tuple[str, ...]:
    """Restores all frames of a video file.

    Every frame keeps its time, as precisely as the container stores it: Matroska and WebM in
    milliseconds, AVI in frames. Sound is copied without decoding it. If the container changes, the
    whole video may start some milliseconds later. Subtitles, chapters, metadata, rotation, pixel
    shape and colour description are kept where the container can hold them. The codec is kept if
    this FFmpeg can encode the frames with it; otherwise it becomes H.264, or VP9 in WebM. Frames
    have at most 8 bits.

    If the file ends in the middle of its last frame, that frame is left out. More damage is an
    error, since half a video is no use.

    Args:
      source: the video, on a local disk.
      target: where to write; its ending, one of `SUFFIXES`, determines the container. It may be
        `source`. The file appears whole or not at all.
      function: restores `(batch_size, H, W, 3)` uint8 RGB frames as they are stored, before the
        video's rotation. The last batch is filled up by repeating the last frame.
      batch_size: frames to restore, and hold in memory, at a time.
      scale: how many times larger `function` makes frames.

    Returns:
      Notes, one line each: what the new video lacks, or what differs from the source.

    Raises:
      ImageError: PyAV is missing, the source is damaged or not a video, or the target can't be
        written.
      OSError: the disk, or a quota, is full; see `aecore.storage.is_disk_full`.
    """
    try:
        import av
        import av.logging
    except ImportError as error:
        raise ImageError(f"{source}: videos need PyAV: pip install 'aecore[video]'") from error
    container = _FORMATS.get(target.suffix.lower())
    if container is None:
        raise ImageError(
            f"{target}: videos can't be written with the ending {target.suffix!r}; "
            f"use one of {', '.join(sorted(SUFFIXES))}"
        )
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    # The only way to keep SVT-AV1 from writing to stderr.
    os.environ.setdefault("SVT_LOG", "0")
    level = av.logging.get_level()
    av.logging.set_level(None)
    try:
        video = _probe(av, source)
        notes = list(video.notes)
        restored = dataclasses.replace(
            video, width=scale * video.width, height=scale * video.height
        )
        with (
            _open(av, source) as reader,
            _Writer(av, temporary, target, container, reader, restored, notes) as writer,
        ):
            batch = []
            for item in _decode(av, source, reader, video, notes):
                if isinstance(item, av.Packet):
                    writer.copy(item)
                    continue
                batch.append(item)
                if len(batch) == batch_size:
                    writer.write(batch, function(_pixels(batch)))
                    batch = []
            if batch:
                filled = batch + batch[-1:] * (batch_size - len(batch))
                writer.write(batch, function(_pixels(filled))[: len(batch)])
        notes += _lost(video, _probe(av, temporary), target)
        try:
            temporary.replace(target)
        except OSError as error:
            raise _unwritable(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)
        av.logging.set_level(level)
    return tuple(notes)


@dataclasses.dataclass(frozen=True)
class _Video:
    """Properties of a video file, its video stream and its first frame."""

    index: int
    codec: str
    pixels: str
    width: int
    height: int
    rate: Fraction
    time_base: Fraction
    aspect: Fraction
    """Width by height of a pixel."""
    matrix: bytes
    """How players rotate the frames; empty for no rotation."""
    color_range: int
    color_primaries: int
    color_trc: int
    colorspace: int
    metadata: Mapping[str, str]
    chapters: int
    notes: tuple[str, ...]


def _local(path: epath.Path) -> str:
    # Otherwise FFmpeg takes what precedes a colon in a name for a protocol.
    return f"file:{os.fspath(path)}"


def _metadata_options(av: ModuleType) -> dict[str, str]:
    """Options that keep text in other encodings than UTF-8; PyAV 19 and newer always do."""
    return {"metadata_errors": "surrogateescape"} if int(av.__version__.split(".")[0]) < 19 else {}


@contextlib.contextmanager
def _open(av: ModuleType, path: epath.Path) -> Iterator[Any]:
    """Opens a video for reading."""
    try:
        reader = av.open(
            _local(path),
            # A file may be a playlist in disguise, which must not open anything on the network.
            container_options={"protocol_whitelist": "file"},
            **_metadata_options(av),
        )
    except (OSError, av.FFmpegError) as error:
        if isinstance(error, OSError):
            raise ImageError(f"{path} can't be read: {error.strerror}") from error
        raise ImageError(
            f"{path} is damaged, or not a video in a format that FFmpeg knows: {error.strerror}"
        ) from error
    with reader:
        yield reader


def _probe(av: ModuleType, path: epath.Path) -> _Video:
    """Describes a video after decoding its first picture."""
    with _open(av, path) as reader:
        streams = [
            stream
            for stream in reader.streams.video
            if not stream.disposition & av.stream.Disposition.attached_pic
        ]
        if not streams:
            raise ImageError(f"{path} has no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise ImageError(f"{path}: this FFmpeg has no decoder for its video")
        try:
            frame = next(reader.decode(stream), None)
        except av.FFmpegError as error:
            raise _damaged(path, f"no frame can be decoded: {error.strerror}") from error
        if frame is None:
            raise _damaged(path, "it contains no frame")
        notes = []
        components = frame.format.components
        if (bits := max(component.bits for component in components)) > 8:
            notes.append(f"{bits} bits became 8")
        alpha = any(component.is_alpha for component in components)
        if alpha or "alpha_mode" in stream.metadata:
            notes.append("transparency was dropped")
        if frame.interlaced_frame:
            notes.append("interlaced frames were restored, and are stored, as whole frames")
        if len(streams) > 1:
            notes.append(f"only the first of {len(streams)} videos in the file was restored")
        matrix = frame.side_data.get("DISPLAYMATRIX")
        return _Video(
            index=stream.index,
            codec=stream.codec_context.codec.canonical_name,
            pixels=frame.format.name,
            width=frame.width,
            height=frame.height,
            rate=stream.average_rate or stream.guessed_rate or Fraction(25),
            time_base=stream.time_base,
            aspect=stream.sample_aspect_ratio or Fraction(1),
            matrix=b"" if matrix is None else bytes(matrix),
            color_range=int(frame.color_range),
            color_primaries=int(frame.color_primaries),
            color_trc=int(frame.color_trc),
            colorspace=int(frame.colorspace),
            metadata=dict(reader.metadata),
            chapters=len(reader.chapters()),
            notes=tuple(notes),
        )


def _decode(
    av: ModuleType, source: epath.Path, reader: Any, video: _Video, notes: list[str]
) -> Iterator[Any]:
    """The packets of the other streams, and of the video pairs of time and RGB frame.

    A time is the beginning and the duration in ticks of the video's time base.
    """
    stream = reader.streams[video.index]
    to_rgb = av.video.reformatter.VideoReformatter()
    damage, packets, end, previous = "", 0, Fraction(0), None
    slots = collections.deque()
    try:
        for packet in reader.demux():
            if packet.size and packet.pts is not None:
                end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
            if packet.stream.index != video.index:
                if packet.size:
                    yield packet
                continue
            if packet.size:
                packets += 1
                if damage:
                    raise _damaged(source, damage)
                if reader.format.name == "avi":
                    # Has times for packets alone. Shown in another order, pictures take the same.
                    slots.append(packet.dts)
                if packet.is_corrupt:
                    damage = f"frame {packets} is cut off"
                    continue
            try:
                frames = stream.decode(packet)
            except av.error.InvalidDataError as error:
                damage = f"frame {packets} can't be decoded: {error.strerror}"
                continue
            for frame in frames:
                if frame.is_corrupt:
                    damage = f"a frame near number {packets} can't be decoded"
                    continue
                begin = slots.popleft() if slots else frame.pts
                if begin is None:
                    begin = 0 if previous is None else previous[0] + max(previous[1], 1)
                previous = begin, frame.duration
                rgb = to_rgb.reformat(
                    frame,
                    width=video.width,
                    height=video.height,
                    format="rgb24",
                    interpolation=_interpolation(av),
                )
                yield previous, rgb
    except av.FFmpegError as error:
        raise _damaged(source, str(error.strerror)) from error
    shown = Fraction(0)
    if previous is not None:
        shown = (sum(previous) - (stream.start_time or 0)) * video.time_base
    _check_end(source, reader, stream, packets, shown, end)
    if damage:
        notes.append("the last frame is incomplete in the file, and was left out")


def _interpolation(av: ModuleType) -> int:
    # Rounds, and interpolates colours between the pixels that have them; the default does neither.
    flags = av.video.reformatter.Interpolation
    return (flags.BICUBIC | flags.ACCURATE_RND | flags.FULL_CHR_H_INT | flags.FULL_CHR_H_INP).value


def _view(frame: Any) -> np.ndarray:
    """The pixels of an RGB frame, `(H, W, 3)` uint8, for reading and writing."""
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(frame.height, plane.line_size)
    return rows[:, : frame.width * 3].reshape(frame.height, frame.width, 3)


def _pixels(batch: list[tuple[Any, Any]]) -> np.ndarray:
    return np.stack([_view(frame) for _, frame in batch])


def _check_end(
    source: epath.Path, reader: Any, stream: Any, packets: int, shown: Fraction, end: Fraction
) -> None:
    """Raises if the file is shorter than it claims, as when it was cut off between packets."""
    if reader.format.name.startswith("mov"):
        # The index leaves out what edit lists do, unlike the number of frames.
        announced = len(stream.index_entries)
        if packets < announced - 1:
            raise _damaged(source, f"it ends after {packets} of {announced} frames")
    elif reader.format.name == "avi":
        # Not by the number of packets, which a picture that stays has none of.
        _check_length(source, shown, stream.frames * stream.time_base)
    if reader.duration:
        begin = Fraction(reader.start_time or 0, 1_000_000)
        _check_length(source, end - begin, Fraction(reader.duration, 1_000_000))


def _check_length(source: epath.Path, actual: Fraction, announced: Fraction) -> None:
    # Lengths may be rounded, or lack the last picture's.
    if actual < announced - min(Fraction(1), announced / 10):
        raise _damaged(
            source, f"it ends after {float(actual):.1f} of {float(announced):.1f} seconds"
        )


def _damaged(path: epath.Path, why: str) -> ImageError:
    return ImageError(f"{path} is damaged: {why}")


def _unwritable(path: epath.Path, error: Exception) -> Exception:
    if is_disk_full(error):
        return OSError(error.errno, error.strerror, os.fspath(path))
    return ImageError(f"{path} can't be written: {reason(error)}")


class _Writer:
    """A video file being written: one stream is encoded, the others are copied."""

    def __init__(
        self,
        av: ModuleType,
        path: epath.Path,
        target: epath.Path,
        container: str,
        reader: Any,
        video: _Video,
        notes: list[str],
    ):
        self._av = av
        self._target = target
        self._video = video
        self._notes = notes
        self._copies: dict[int, Any] = {}
        self._to_pixels = av.video.reformatter.VideoReformatter()
        self._larger = av.video.reformatter.VideoReformatter()
        self._last = None
        self._durations: dict[int, int] = {}
        self._moved = 0
        # AVI numbers its pictures, at a rate.
        self._time_base = 1 / video.rate if container == "avi" else video.time_base
        encoder, pixels = self._choose(container)
        yuv = not av.VideoFormat(pixels).is_rgb
        self._pixels = pixels
        self._color_range, self._colorspace = video.color_range, video.colorspace
        if yuv and av.VideoFormat(video.pixels).is_rgb:
            self._color_range = _LIMITED
        if yuv and self._colorspace not in _MATRICES:
            self._colorspace = _BT709
        try:
            with self._errors():
                self._open(path, container, reader, encoder)
        except BaseException:
            self._abandon()
            raise

    def _open(self, path: epath.Path, container: str, reader: Any, encoder: str) -> None:
        metadata = {
            key: value
            for key, value in reader.metadata.items()
            if key.lower() not in _STALE_CONTAINER_KEYS
        }
        options = {}
        if container in ("mov", "mp4") and any("." in key for key in metadata):
            # The names that phones give, such as com.apple.quicktime.model.
            options["movflags"] = "use_metadata_tags"
        if self._target.suffix.lower() in (".m2ts", ".mts"):
            options["mpegts_m2ts_mode"] = "1"  # Packets as cameras and Blu-rays have them.
        self._output = self._av.open(
            _local(path),
            "w",
            format=container,
            container_options=options,
            **_metadata_options(self._av),
        )
        self._output.metadata.update(metadata)
        if reader.chapters():
            self._output.set_chapters(reader.chapters())
        for stream in reader.streams:
            if stream.index == self._video.index:
                self._encoded = self._add_encoded(encoder, container, stream)
            elif self._takes(container, stream):
                copy = self._output.add_stream_from_template(stream, opaque=True)
                copy.metadata.update(stream.metadata)
                copy.disposition = stream.disposition
                self._copies[stream.index] = copy
            elif "timecode" not in stream.metadata:  # Which is written anew.
                name = getattr(stream.codec_context, "name", None) or stream.metadata.get(
                    "filename", "unknown"
                )
                self._notes.append(
                    f"stream {stream.index} ({stream.type}, {name}) was dropped: "
                    f"{self._target.suffix} can't hold it"
                )
        self._output.start_encoding()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            with self._errors():
                self._output.mux(self._encoded_packets(None))
                self._output.close()
        except BaseException:
            self._abandon()
            raise
        if self._moved:
            self._notes.append(
                f"{self._moved} frames moved by more than 1 ms: "
                f"{self._target.suffix} can't hold their exact times"
            )

    def _abandon(self) -> None:
        # An open container is closed when it is collected, and then complains on stderr.
        with contextlib.suppress(Exception):
            self._output.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, self._av.FFmpegError) as error:
            raise _unwritable(self._target, error) from error

    def _choose(self, container: str) -> tuple[str, str]:
        """The first encoder and pixel format that work for the video."""
        codec = self._video.codec
        other = "libvpx-vp9" if container == "webm" else "libx264"
        for encoder in (_ENCODERS.get(codec, codec), other):
            if not self._holds(container, encoder):
                continue
            for pixels in self._pixel_formats(encoder):
                context = self._av.CodecContext.create(encoder, "w")
                self._configure(context, encoder, pixels)
                try:
                    context.open()
                except self._av.FFmpegError:
                    continue
                if context.codec.canonical_name != codec:
                    self._notes.append(f"the codec {codec} became {context.codec.canonical_name}")
                return encoder, pixels
        raise ImageError(
            f"{self._target} can't be written: no encoder accepts frames of "
            f"{self._video.width} × {self._video.height}"
        )

    def _holds(self, container: str, encoder: str) -> bool:
        try:
            with self._av.open(io.BytesIO(), "w", format=container) as output:
                output.add_stream(encoder)
        except ValueError:  # Either there is no such encoder, or the container refuses it.
            return False
        return True

    def _pixel_formats(self, encoder: str) -> list[str]:
        """Pixel formats worth trying, the best first; of 8 bits, if the encoder has any."""
        formats = self._av.Codec(encoder, "w").video_formats
        if formats is None:
            return [self._video.pixels]
        shallow = [f.name for f in formats if max(c.bits for c in f.components) <= 8]
        if self._video.pixels in shallow:
            best = self._video.pixels
        else:
            # Those with a j are full range by name, which is for sources that are.
            names = [name for name in shallow if not name.startswith("yuvj")]
            names = names or [f.name for f in formats]
            find = self._av.codec.codec.find_best_pix_fmt_of_list
            best = find(names, self._video.pixels)[0].name
        return [best, *(name for name in _SUBSAMPLED_AGAIN if name in shallow and name != best)]

    def _configure(self, context: Any, encoder: str, pixels: str) -> None:
        video = self._video
        context.width, context.height = video.width, video.height
        context.pix_fmt = pixels
        context.time_base = self._time_base
        context.framerate = video.rate
        context.sample_aspect_ratio = video.aspect
        # Slices alone, PyAV's default, cost quality.
        context.thread_type = "AUTO"
        context.options = dict(_QUALITY.get(encoder, _OTHER_QUALITY))
        if encoder == "libvpx":
            # VP8 has no quality without a limit to the rate: here one that is never met.
            context.bit_rate = int(video.width * video.height * max(video.rate, 1) * 4)
        if self._target.suffix.lower() == ".avi":
            context.max_b_frames = 0  # As pictures that are shown in another order have no time.

    def _add_encoded(self, encoder: str, container: str, template: Any) -> Any:
        stream = self._output.add_stream(encoder)
        context = stream.codec_context
        self._configure(context, encoder, self._pixels)
        context.color_range = self._color_range
        context.color_primaries = self._video.color_primaries
        context.color_trc = self._video.color_trc
        context.colorspace = self._colorspace
        stream.metadata.update(
            {
                key: value
                for key, value in template.metadata.items()
                if not key.lower().startswith(_STALE_STREAM_KEYS)
            }
        )
        stream.disposition = template.disposition
        if self._video.matrix:
            stream.set_display_matrix(np.frombuffer(self._video.matrix, np.int32).tolist())
        context.open()
        return stream

    def _takes(self, container: str, stream: Any) -> bool:
        """Whether the container can hold a stream, found by writing a header."""
        if stream.type not in ("audio", "subtitle", "video", "attachment"):
            return False
        attached = self._av.stream.Disposition.attached_pic
        if container == "matroska" and stream.disposition & attached:
            return False  # It would become a video of one picture.
        output = self._av.open(io.BytesIO(), "w", format=container)
        try:
            copy = output.add_stream_from_template(stream, opaque=True)
            copy.metadata.update(stream.metadata)
            output.start_encoding()
        except (ValueError, self._av.FFmpegError):
            return False
        finally:
            with contextlib.suppress(self._av.FFmpegError):
                output.close()
        return True

    def copy(self, packet: Any) -> None:
        """Copies a packet of a stream that isn't restored."""
        stream = self._copies.get(packet.stream.index)
        if stream is not None:
            with self._errors():
                packet.stream = stream
                self._output.mux(packet)

    def write(self, batch: list[tuple[tuple[int, int], Any]], pictures: np.ndarray) -> None:
        """Encodes `(N, H, W, 3)` uint8 pictures in place of the N decoded frames.

        The decoded frames' pixels are replaced, because they hold things that PyAV can't set on
        new ones: where in a pixel its colour was sampled, and closed captions.
        """
        for ((begin, duration), frame), picture in zip(batch, pictures, strict=True):
            exact = begin * self._video.time_base
            time = round(exact / self._time_base)
            if self._last is not None:
                time = max(time, self._last + 1)
            self._moved += abs(time * self._time_base - exact) > Fraction(1, 1000)
            self._last = time
            self._durations[time] = round(duration * self._video.time_base / self._time_base)
            if (frame.height, frame.width) != picture.shape[:2]:
                frame = self._larger.reformat(frame, picture.shape[1], picture.shape[0])
            frame.make_writable()
            _view(frame)[:] = picture
            frame.colorspace = self._colorspace
            frame = self._to_pixels.reformat(
                frame,
                format=self._pixels,
                dst_color_range=self._color_range,
                interpolation=_interpolation(self._av),
            )
            frame.pict_type = 0  # The encoder decides.
            frame.pts, frame.time_base = time, self._time_base
            with self._errors():
                self._output.mux(self._encoded_packets(frame))

    def _encoded_packets(self, frame: Any) -> list[Any]:
        packets = self._encoded.encode(frame)
        for packet in packets:
            # Encoders know none, and nothing else tells how long the last picture is shown.
            packet.duration = self._durations.pop(packet.pts, 0)
        return packets


def _lost(video: _Video, written: _Video, target: epath.Path) -> list[str]:
    """What the container silently dropped when it was written, as notes."""
    notes = []
    if written.matrix != video.matrix:
        notes.append(f"the rotation was dropped: {target.suffix} can't hold it")
    if written.aspect != video.aspect:
        notes.append(f"the pixel shape {video.aspect} was dropped: {target.suffix} can't hold it")
    if written.chapters != video.chapters:
        notes.append(f"chapters were dropped: {target.suffix} can't hold them")
    kept = {key.lower() for key in written.metadata}
    lost = [
        key
        for key in video.metadata
        if key.lower() not in kept and key.lower() not in _STALE_CONTAINER_KEYS
    ]
    if lost:
        notes.append(f"metadata was dropped, as {target.suffix} can't hold it: {', '.join(lost)}")
    return notes
