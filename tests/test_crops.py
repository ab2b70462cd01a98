"""Crops of photographs: which they are, that they are read right, and what is read."""

import errno
import io
import itertools
import os
import threading

import numpy as np
import pytest
from conftest import save_pictures
from etils import epath
from PIL import Image

from aecore import Data
from aecore.data import jpeg, sources
from aecore.data.batches import epoch_order, training_batches
from aecore.data.crops import Crop, Crops, central, turned
from aecore.data.grouping import GroupedPictures
from aecore.data.indexed import ArraySource, Cache, FileSource, Pairs
from aecore.data.shapes import shared_shapes, smallest_containing
from aecore.degradations import Compose, GaussianNoise
from aecore.errors import ConfigError, DataError, ImageError
from aecore.media import images

NOISE = GaussianNoise(0.1)


class Made:
    """Pictures of several sizes, each pixel of which tells its picture, row and column."""

    channels = 3

    def __init__(self, sizes, broken=()):
        self.sizes = sizes
        self.broken = broken
        self.read = []
        self.lock = threading.Lock()

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index, /):
        with self.lock:
            self.read.append(index)
        if index in self.broken:
            raise ImageError(f"picture {index} is broken")
        height, width = self.sizes[index]
        rows, columns = np.indices((height, width))
        return np.stack([np.full_like(rows, index), rows, columns], -1).astype(np.uint8)

    def shape(self, index):
        return (*self.sizes[index], 3)

    def window(self, index, top, left, height, width):
        return self[index][top : top + height, left : left + width]

    def checksum(self, crc):
        return crc


SIZES = [(40 + index % 7, 30 + index % 5) for index in range(30)]


def take(examples, count, degradation=None, **options):
    options = {"batch_size": 8, "seed": 0} | options
    return list(itertools.islice(training_batches(examples, degradation, **options), count))


def crops_of(source, size=(16, 16), grid=1, **options):
    return Crops(source, Crop(size, **options), grid)


def test_crops_lie_within_their_pictures_and_are_all_there_in_an_epoch():
    crops = crops_of(Made(SIZES), (16, 12), per_image=3)
    assert len(crops) == 90
    batches = np.concatenate(take(crops, 11))
    assert batches.shape == (88, 16, 12, 3)
    images, tops, lefts = batches[:, 0, 0].T
    rows, columns = np.indices((16, 12))
    for crop, image, top, left in zip(batches, images, tops, lefts, strict=True):
        np.testing.assert_array_equal(crop[..., 1], top + rows)
        np.testing.assert_array_equal(crop[..., 2], left + columns)
        assert top + 16 <= SIZES[image][0]
        assert left + 12 <= SIZES[image][1]
    counts = np.bincount(images, minlength=30)
    assert counts.max() == 3
    assert counts.sum() == 88
    # All places are possible: the first and the last row among them.
    assert tops.min() == 0
    assert len(set(zip(images, tops, lefts, strict=True))) > 80


def test_crops_are_functions_of_seed_epoch_and_index():
    crops = crops_of(Made(SIZES), turn=True)
    whole = take(crops, 9)  # 3 steps an epoch.
    for start in (1, 3, 4, 8):
        for expected, batch in zip(whole[start:], take(crops, 3, start_step=start), strict=False):
            np.testing.assert_array_equal(batch, expected)
    assert not (take(crops, 1, seed=1)[0] == whole[0]).all()
    first, second = ({tuple(c.ravel()) for b in whole[n : n + 3] for c in b} for n in (0, 3))
    assert len(first & second) < 3  # Another epoch takes other crops.


@pytest.mark.parametrize("degradation", [None, NOISE])
def test_shares_are_parts_of_the_batch(degradation):
    whole = take(crops_of(Made(SIZES), turn=True), 4, degradation)
    for part in (slice(0, 4), slice(4, 8)):
        shared = take(crops_of(Made(SIZES), turn=True), 4, degradation, share=part)
        for expected, batch in zip(whole, shared, strict=True):
            if degradation is None:
                expected, batch = [expected], [batch]
            for a, b in zip(expected, batch, strict=True):
                np.testing.assert_array_equal(a[part], b)


def test_each_process_reads_its_own_pictures_only():
    sources_read = []
    for part in (slice(0, 4), slice(4, 8)):
        source = Made(SIZES)
        list(take(crops_of(source), 1, share=part))
        # The pipeline reads ahead, in order; these are the first step's.
        crops = crops_of(source)
        source.read.clear()
        for step in range(3):
            crops.read(epoch_order(0, 0, 30)[8 * step : 8 * step + 8][part], seed=0, epoch=0)
        assert len(source.read) == 12
        sources_read.append(set(source.read))
    assert not sources_read[0] & sources_read[1]


def test_turned_gives_all_eight_ways_once():
    image = np.arange(9).reshape(3, 3)
    ways = [turned(image, code) for code in range(8)]
    expected = [np.rot90(base, k) for base in (image, image[::-1]) for k in range(4)]
    assert {way.tobytes() for way in ways} == {way.tobytes() for way in expected}


def test_turning_and_flipping_leave_the_places():
    def drawn(**options):
        flip = options.pop("flip", False)
        return np.concatenate(take(crops_of(Made(SIZES), **options), 9, flip=flip))

    plain = drawn()
    for options, codes in ((dict(turn=True), range(8)), (dict(flip=True), range(2))):
        seen = set()
        for before, after in zip(plain, drawn(**options), strict=True):
            found = [code for code in range(8) if (turned(before, code) == after).all()]
            assert len(found) == 1
            seen |= set(found)
        assert seen == set(codes)


def test_crops_start_on_the_grid():
    crops = np.concatenate(take(crops_of(Made(SIZES), grid=8, per_image=4), 15))
    assert set(crops[:, 0, 0, 1]) == {0, 8, 16, 24}
    assert set(crops[:, 0, 0, 2]) == {0, 8, 16}


def test_small_pictures_are_left_out_with_one_note_that_counts_them(caplog):
    sizes = [*SIZES, (10, 60), (60, 10), (15, 15)]
    crops = crops_of(Made(sizes))
    assert len(crops) == 33
    batches = np.concatenate(take(crops, 13))
    assert set(batches[:, 0, 0, 0]) == set(range(30))
    notes = [record.message for record in caplog.records]
    assert notes == [
        "skipped: 3 of 33 pictures are smaller than the crop of 16x16; --data.small pad keeps them"
    ]


def test_small_pictures_are_mirrored():
    sizes = [(10, 60), (60, 10), (3, 3), (1, 40)]
    source = Made(sizes)
    batches = np.concatenate(take(crops_of(source, small="pad"), 8, batch_size=4))
    assert set(batches[:, 0, 0, 0]) == {0, 1, 2, 3}
    for crop in batches:
        if crop[0, 0, 0] == 2:
            rows = np.array([0, 1, 2, 2, 1, 0] * 3)[:16]
            np.testing.assert_array_equal(crop[..., 1], np.broadcast_to(rows[:, None], (16, 16)))
            np.testing.assert_array_equal(crop[..., 2], np.broadcast_to(rows, (16, 16)))


def test_others_take_the_place_of_what_is_broken_however_it_is_read(caplog):
    source = Made(SIZES, broken={3, 4})
    crops = crops_of(source)
    whole = take(crops, 6)
    assert not set(np.concatenate(whole)[:, 0, 0, 0]) & {3, 4}
    assert sorted(r.message for r in caplog.records) == [
        "skipped: picture 3 is broken",
        "skipped: picture 4 is broken",
    ]
    # A run that starts later, and knows of none, takes the same.
    later = take(crops_of(Made(SIZES, {3, 4})), 2, start_step=4)
    for expected, batch in zip(whole[4:], later, strict=True):
        np.testing.assert_array_equal(batch, expected)
    together = crops_of(Made(SIZES, {3, 4})).read(np.arange(30), seed=0, epoch=0)[0]
    for example in (3, 4, 5):
        (alone,) = crops_of(Made(SIZES, {3, 4})).read(np.array([example]), seed=0, epoch=0)
        np.testing.assert_array_equal(alone[0], together[example])
    sound = np.concatenate(take(crops_of(Made(SIZES)), 6))
    changed = (np.concatenate(whole) != sound).any(axis=(1, 2, 3))
    assert set(sound[changed][:, 0, 0, 0]) == {3, 4}


def test_pictures_of_which_none_can_be_used_are_an_error():
    with pytest.raises(DataError, match="too few of the 5 pictures .* one is 8x9, smaller"):
        take(crops_of(Made([(8, 9)] * 5)), 1, batch_size=5)
    with pytest.raises(DataError, match=r"picture \d+ is broken"):
        take(crops_of(Made(SIZES, broken=range(30))), 1)


# ---- Files


def save_noise(folder, sizes, seed=0, kind="png"):
    """Pictures in which any two places differ."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    for index, (height, width) in enumerate(sizes):
        arrays.append(random.integers(0, 256, (height, width, 3), np.uint8))
        Image.fromarray(arrays[-1]).save(folder / f"{index:02}.{kind}")
    return arrays


def folder(path, **options):
    options = {"crop": 16} | options
    return sources.load(Data(dataset="folder", data_dir=str(path), **options))


def test_a_folder_is_listed_without_opening_a_file(tmp_path, monkeypatch):
    save_noise(tmp_path, SIZES[:12])
    monkeypatch.setattr(type(epath.Path(tmp_path)), "open", None)
    dataset = folder(tmp_path, crop=(16, 12), crops_per_image=2)
    assert dataset.image_shape == (16, 12, 3)
    assert (len(dataset.train), len(dataset.validation)) == (10, 2)
    assert len(dataset.examples()) == 20
    dataset.fingerprint()


@pytest.mark.every_room
def test_crops_of_files_are_their_pixels(tmp_path):
    arrays = save_noise(tmp_path, SIZES[:12])
    dataset = folder(tmp_path)
    windows = {
        array[top : top + 16, left : left + 16].tobytes()
        for array in arrays
        for top in range(array.shape[0] - 15)
        for left in range(array.shape[1] - 15)
    }
    for crop in np.concatenate(take(dataset.examples(), 3, batch_size=5)):
        assert crop.tobytes() in windows
    for part in (dataset.train, dataset.validation):
        for index in range(len(part)):
            assert part.shape(index) == part[index].shape
            assert part[index].tobytes() in {array.tobytes() for array in arrays}


@pytest.mark.parametrize("limit", [0, 1e-5, 1])
def test_memory_changes_no_crop(tmp_path, limit):
    save_noise(tmp_path, SIZES[:12])
    expected = take(folder(tmp_path).examples(), 4, batch_size=5)
    found = take(folder(tmp_path, memory_limit=limit).examples(), 4, batch_size=5)
    np.testing.assert_array_equal(found, expected)


def test_gray_and_broken_files(tmp_path, caplog):
    save_pictures(tmp_path, 6, (40, 40))
    content = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.txt").write_text("is no picture, and says so")
    dataset = folder(tmp_path, channels=1, validation_fraction=0.01)
    assert len(dataset.train) == 5
    assert np.concatenate(take(dataset.examples(), 9, batch_size=5)).shape == (45, 16, 16, 1)
    assert folder(tmp_path).image_shape == (16, 16, 3)
    (message,) = {record.message for record in caplog.records}
    assert message.startswith(f"skipped: {tmp_path}/2.png can't be read")


def test_a_broken_picture_is_told_of_once_however_many_look_at_it(tmp_path, caplog):
    save_noise(tmp_path, SIZES[:4])
    content = (tmp_path / "02.png").read_bytes()
    (tmp_path / "01.png").write_bytes(b"text")
    (tmp_path / "02.png").write_bytes(content[: len(content) // 2])
    source = sources.pictures(Data(dataset="folder", data_dir=str(tmp_path)))
    assert len(central(source, (16, 16), 4)[0]) == 2
    for _ in range(2):
        list(GroupedPictures(source).batches(lambda group: 1))
    take(crops_of(source), 2, batch_size=4)
    told = sorted(record.message for record in caplog.records)
    assert len(told) == 2
    assert "01.png" in told[0]
    assert "02.png" in told[1]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EIO, OSError),
        (errno.EMFILE, OSError),
        (errno.ENOENT, ImageError),
        (errno.EACCES, ImageError),
    ],
)
def test_only_what_will_fail_again_is_left_out(tmp_path, monkeypatch, number, kind):
    save_noise(tmp_path, SIZES[:4])
    dataset = folder(tmp_path)

    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(type(epath.Path(tmp_path)), "open", fail)
    for read in (dataset.train.__getitem__, dataset.train.shape):
        with pytest.raises(kind, match=f"{tmp_path}/.*png"):
            read(0)
    if kind is OSError:
        with pytest.raises(OSError, match=os.strerror(number)):
            take(dataset.examples(), 1, batch_size=2)
        with pytest.raises(OSError, match=os.strerror(number)):
            sources.load(Data(dataset="folder", data_dir=str(tmp_path), image_size=(16, 16)))


def test_a_fingerprint_tells_folders_apart_by_names_and_sizes(tmp_path):
    save_noise(tmp_path, SIZES[:12])
    first = folder(tmp_path).fingerprint()
    assert folder(tmp_path, crop=8).fingerprint() == first
    assert folder(tmp_path, split_seed=1).fingerprint() != first
    (tmp_path / "00.png").rename(tmp_path / "0.png")
    renamed = folder(tmp_path).fingerprint()
    assert renamed != first
    with (tmp_path / "0.png").open("ab") as file:
        file.write(b"more")
    assert folder(tmp_path).fingerprint() not in (first, renamed)
    (tmp_path / "0.png").rename(tmp_path / os.fsdecode(b"\xff.png"))  # It is no UTF-8.
    assert folder(tmp_path).fingerprint() not in (first, renamed)


def test_the_cache_is_bounded_and_serves_threads():
    cache = Cache(10_000)
    made = []

    def decode(key):
        made.append(key)
        return np.full((30, 10, 10), key, np.uint8)

    def work():
        for key in range(8):
            image = cache.get(key, lambda key=key: decode(key))
            assert image[0, 0, 0] == key
            assert not image.flags.writeable

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.bytes == 9_000  # Three of 3,000 bytes.
    made.clear()
    work()
    assert len(made) == 5


def test_pictures_are_decoded_once_if_they_fit(tmp_path, monkeypatch):
    save_noise(tmp_path, SIZES[:12])
    for limit, decoded in ((1, 12), (0, 24)):
        source = sources.pictures(
            Data(dataset="folder", data_dir=str(tmp_path), memory_limit=limit)
        )
        count = 0
        read = images.read

        def counting(file, read=read):
            nonlocal count
            count += 1
            return read(file)

        with monkeypatch.context() as patch:
            patch.setattr(images, "read", counting)
            for _ in range(2):
                for index in range(12):
                    source[index]
        assert count == decoded


def test_arrays_are_cropped_too():
    dataset = sources.load(Data(crop=20, channels=3))
    assert dataset.image_shape == (20, 20, 3)
    assert isinstance(dataset.train, ArraySource)
    (batch,) = take(dataset.examples(), 1)
    whole = dataset.train.array[epoch_order(0, 0, 6000)[:8]]
    for crop, image in zip(batch, whole, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(image, (20, 20), axis=(0, 1))
        assert (windows.transpose(0, 1, 3, 4, 2) == crop).all(axis=(2, 3, 4)).any()


# ---- JPEG


def encoded(size, mode="RGB", **options):
    coarse = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()


def with_orientation(value, order="<"):
    exif = Image.Exif()
    exif.endian = order
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_and_its_parts_are_pillows_bit_for_bit(subsampling, progressive):
    random = np.random.default_rng(1)
    for size in ((203, 131), (64, 48)):
        content = encoded(
            size, quality=70, subsampling=subsampling, progressive=progressive, exif=b""
        )
        expected = np.asarray(Image.open(io.BytesIO(content)))
        np.testing.assert_array_equal(jpeg.decode(content, 3), expected)
        for _ in range(30):
            height, width = random.integers(1, 49, 2).tolist()
            top = int(random.integers(0, size[1] - height + 1))
            left = int(random.integers(0, size[0] - width + 1))
            part = jpeg.decode(content, 3, (top, left, height, width))
            window = expected[top : top + height, left : left + width]
            np.testing.assert_array_equal(part, window)


def test_what_pillow_would_decode_otherwise_is_left_to_it():
    assert jpeg.decode(encoded((30, 20), "L"), 1).shape == (20, 30, 1)
    assert jpeg.decode(encoded((30, 20), "L"), 3) is None
    assert jpeg.decode(encoded((30, 20)), 1) is None
    assert jpeg.decode(encoded((30, 20), "CMYK"), 3) is None
    assert jpeg.decode(encoded((30, 20))[:-200], 3) is None
    assert jpeg.decode(b"not a picture", 3) is None
    for order in "<>":
        for value in range(1, 9):
            found = jpeg.decode(encoded((30, 20), exif=with_orientation(value, order)), 3)
            assert (found is not None) == (value == 1)
    other = Image.Exif()
    other[0x010F] = "a camera"
    assert jpeg.decode(encoded((30, 20), exif=other), 3) is None


@pytest.mark.parametrize("limit", [0, 4e-5])
def test_parts_of_jpeg_files_are_those_of_whole_pictures(tmp_path, limit, monkeypatch):
    for index in range(12):
        exif = with_orientation(1 + index % 8)
        (tmp_path / f"{index:02}.jpg").write_bytes(encoded((90 + index, 70 - index), exif=exif))
    (tmp_path / "12.jpg").write_bytes(encoded((90, 70))[:-500])
    whole = take(folder(tmp_path, crop=24).examples(), 6, batch_size=5)
    parts = []
    real = jpeg.decode
    monkeypatch.setattr(jpeg, "decode", lambda *args: parts.append(len(args)) or real(*args))
    found = take(folder(tmp_path, crop=24, memory_limit=limit).examples(), 6, batch_size=5)
    np.testing.assert_array_equal(found, whole)
    assert 3 in parts


# ---- Pairs


def save_pairs(folder, sizes, scale=1):
    save_noise(folder / "original", [(scale * h, scale * w) for h, w in sizes], seed=1)
    for path in (folder / "original").iterdir():
        small = np.asarray(Image.open(path))[::scale, ::scale]
        (folder / "degraded").mkdir(exist_ok=True)
        Image.fromarray(255 - small).save(folder / "degraded" / f"{path.stem}.tif")


def pairs(path, **options):
    options = {"crop": 24} | options
    return sources.load(Data(dataset="pairs", data_dir=str(path), **options))


@pytest.mark.parametrize("scale", [1, 3])
def test_pairs_are_cropped_and_turned_together(tmp_path, scale):
    save_pairs(tmp_path, SIZES[:12], scale)
    (tmp_path / "original" / "note.txt").write_text("not looked at")
    dataset = pairs(tmp_path, turn=True, small="pad")
    assert isinstance(dataset.train, Pairs)
    assert dataset.scale == scale
    assert dataset.image_shape == (24, 24, 3)
    for batch in take(dataset.examples(), 4, batch_size=5):
        assert batch.original.shape == (5, 24, 24, 3)
        assert batch.degraded.shape == (5, 24 // scale, 24 // scale, 3)
        # Which of the pixels of a square was kept depends on how it was turned.
        blocks = batch.original.reshape(5, 24 // scale, scale, 24 // scale, scale, 3)
        corners = blocks[:, :, [0, -1]][:, :, :, :, [0, -1]].transpose(0, 2, 4, 1, 3, 5)
        same = corners == 255 - batch.degraded[:, None, None]
        assert same.all(axis=(3, 4, 5)).any(axis=(1, 2)).all()
    (batch,) = take(dataset.examples(), 1, NOISE, batch_size=5)
    (clean,) = take(dataset.examples(), 1, Compose(()), batch_size=5)
    np.testing.assert_array_equal(batch.original, clean.original)
    assert 0.05 < (batch.degraded - clean.degraded).std() < 0.1


def test_pairs_without_a_partner_are_named(tmp_path):
    save_pairs(tmp_path, SIZES[:4])
    (tmp_path / "degraded" / "01.tif").unlink()
    (tmp_path / "original" / "02.png").unlink()
    with pytest.raises(DataError) as raised:
        pairs(tmp_path)
    for problem in ("original/01.png has no partner in degraded", "degraded/02.tif has no partner"):
        assert problem in str(raised.value)
    with pytest.raises(
        DataError, match="no folder degraded; pairs need two, degraded and original"
    ):
        pairs(tmp_path / "original")
    save_pairs(tmp_path / "twice", SIZES[:2])
    Image.new("RGB", (30, 40)).save(tmp_path / "twice" / "degraded" / "01.png")
    with pytest.raises(DataError, match=r"01\.(tif|png) has the name of .*01\."):
        pairs(tmp_path / "twice")


def test_pairs_whose_sizes_do_not_fit(tmp_path, caplog):
    save_pairs(tmp_path, SIZES[:12])
    Image.new("RGB", (30, 40)).save(tmp_path / "degraded" / "05.tif")
    found = sources.pictures(Data(dataset="pairs", data_dir=str(tmp_path)))
    take(crops_of(found), 2, batch_size=6)
    (message,) = {record.message for record in caplog.records}
    assert "05.png is 45x30" in message
    assert "05.tif is 40x30; the first should be 1 times the second" in message
    Image.new("RGB", (20, 30)).save(tmp_path / "degraded" / "00.tif")
    with pytest.raises(DataError, match="00.png is 40x30, .*00.tif is 30x20; the original"):
        pairs(tmp_path)
    save_pairs(tmp_path / "small", SIZES[:4], 3)
    with pytest.raises(DataError, match="--data.crop 16 16 is not a multiple of 3"):
        pairs(tmp_path / "small", crop=16).examples()


def test_pictures_to_score_are_all_there_in_order(tmp_path):
    arrays = save_noise(tmp_path, SIZES[:5])
    found = sources.pictures(Data(dataset="folder", data_dir=str(tmp_path)))
    assert isinstance(found, FileSource)
    for expected, index in zip(arrays, range(len(found)), strict=True):
        np.testing.assert_array_equal(found[index], expected)


# ---- Whole pictures in batches


@pytest.mark.parametrize("most", [1, 3, 6, 100])
def test_each_picture_is_in_one_batch_of_few_shapes(most, caplog):
    random = np.random.default_rng(0)
    sizes = [tuple(size) for size in random.integers(20, 90, (40, 2)).tolist()] + [(33, 44)] * 9
    source = Made(sizes, broken={7})
    pictures = GroupedPictures(source, most_shapes=most, multiple=8)
    batches = list(pictures.batches(lambda group: 4))
    shapes = [batch.original.shape for batch in batches]
    assert len(set(shapes)) <= most
    assert all(height % 8 == width % 8 == 0 for _, height, width, _ in shapes)
    counted = [batch.indices[batch.sizes[:, 0] > 0].tolist() for batch in batches]
    assert sorted(itertools.chain(*counted)) == [index for index in range(49) if index != 7]
    for shape in set(shapes):
        parts = (c for c, s in zip(counted, shapes, strict=True) if s == shape)
        together = list(itertools.chain(*parts))
        assert together == sorted(together)
    for batch in batches:
        for image, index, size in zip(batch.original, batch.indices, batch.sizes, strict=True):
            if not size.any():
                continue
            assert tuple(size) == sizes[index]
            np.testing.assert_array_equal(image[: size[0], : size[1]], source[index])
            edge = image[: size[0] + 2, : size[1] + 2]
            whole = np.pad(source[index], ((0, 2), (0, 2), (0, 0)), "symmetric")
            np.testing.assert_array_equal(edge, whole[: edge.shape[0], : edge.shape[1]])
    assert [record.message for record in caplog.records] == ["skipped: picture 7 is broken"]


def test_shapes_that_are_few_are_not_changed():
    sizes = [(321, 481), (481, 321)]
    assert shared_shapes(sizes * 5, 2) == sizes
    many = [tuple(size) for size in np.random.default_rng(0).integers(200, 4000, (2000, 2))]
    shapes = shared_shapes(many, 6)
    assert len(shapes) == 6
    fitting = [smallest_containing(size, shapes) for size in many]
    assert None not in fitting
    assert np.prod(fitting, axis=1).sum() < 2 * np.prod(many, axis=1).sum()


def test_pairs_are_batched_together(tmp_path):
    save_pairs(tmp_path, SIZES[:7], 3)
    source = sources.pictures(Data(dataset="pairs", data_dir=str(tmp_path)))
    batches = list(GroupedPictures(source, most_shapes=2, multiple=8).batches(lambda group: 2))
    assert sum((batch.sizes[:, 0] > 0).sum() for batch in batches) == 7
    for batch in batches:
        assert batch.original.shape[1] % 24 == 0
        kept = batch.original[:, ::3, ::3]
        for degraded, original, size in zip(batch.degraded, kept, batch.sizes // 3, strict=True):
            expected = 255 - original[: size[0], : size[1]]
            np.testing.assert_array_equal(degraded[: size[0], : size[1]], expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(crop=0), "data.crop 0 is out of bounds; use at least 1"),
        (dict(crop=(8, 8, 8)), "data.crop .8, 8, 8. is not possible"),
        (dict(crop=8, image_size=(8, 8)), "data.crop 8 is for full resolution"),
        (dict(crops_per_image=2), "data.crops_per_image 2 is for crops"),
        (dict(turn=True), "data.turn True is for crops"),
        (dict(crop=(8, 9), turn=True), "data.turn needs square crops, not data.crop .8, 9."),
        (dict(crop=8, crops_per_image=0), "data.crops_per_image 0 is out of bounds"),
        (dict(crop=8, small="drop"), "data.small 'drop' is not possible; use skip or pad"),
    ],
)
def test_settings_that_can_not_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        Data(**settings)
