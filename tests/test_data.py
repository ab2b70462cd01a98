import gc
import gzip
import io
import itertools
import struct
import threading
import time
import weakref

import numpy as np
import pytest
from conftest import run_program, save_pictures
from PIL import Image

from aecore import Data
from aecore.data import sources, tfds
from aecore.data.batches import evaluation_batches, training_batches
from aecore.data.grouping import GroupedPictures
from aecore.data.headers import readable_shapes
from aecore.degradations import Compose, GaussianNoise, Pixelate
from aecore.errors import DataError, ImageError
from aecore.media import images

# Each image is filled with its own index, so that a batch shows which images it holds.
NUMBERED = np.broadcast_to(np.arange(50, dtype=np.uint8)[:, None, None, None], (50, 12, 12, 1))


NOISE = GaussianNoise(0.1)


def take(array, count, degradation=NOISE, **options):
    options = {"batch_size": 8, "seed": 0} | options
    batches = training_batches(array, degradation, **options)
    return list(itertools.islice(batches, count))


def indices(batches):
    return [tuple(np.rint(batch.original[:, 0, 0, 0] * 255).astype(int)) for batch in batches]


def test_each_epoch_is_a_fresh_permutation():
    epochs = np.reshape(indices(take(NUMBERED, 18)), (3, 48))
    for epoch in epochs:
        assert len(set(epoch)) == 48
    assert not (epochs[0] == epochs[1]).all()
    # What an epoch leaves over differs from one to the next.
    assert len({tuple(sorted(set(range(50)) - set(epoch))) for epoch in epochs}) > 1


@pytest.mark.every_room
def test_batches_are_functions_of_seed_and_step():
    whole = take(NUMBERED, 15)
    for start in (1, 5, 6, 11):
        for expected, batch in zip(
            whole[start:], take(NUMBERED, 4, start_step=start), strict=False
        ):
            np.testing.assert_array_equal(batch.original, expected.original)
            np.testing.assert_array_equal(batch.degraded, expected.degraded)
    other = take(NUMBERED, 1, seed=1)[0]
    assert not (other.original == whole[0].original).all()


def test_noise_is_drawn_anew_at_each_step():
    gray = np.full((8, 12, 12, 1), 128, np.uint8)
    noise = [batch.degraded - batch.original for batch in take(gray, 3)]
    correlation = np.corrcoef([values.ravel() for values in noise])
    assert np.abs(correlation - np.eye(3)).max() < 0.1


def test_batches_are_float32_in_0_1():
    for batch in take(NUMBERED, 1, Compose((Pixelate(0.5), GaussianNoise(1.0)))):
        for array in batch:
            assert array.dtype == np.float32
            assert array.shape == (8, 12, 12, 1)
            assert array.min() >= 0
            assert array.max() <= 1


def test_evaluation_batches_count_each_image_once():
    for batch_size in (1, 7, 50, 64):
        batches = list(evaluation_batches(NUMBERED, batch_size))
        assert {len(batch.images) for batch in batches} == {batch_size}
        counted = np.concatenate([batch.indices[: batch.count] for batch in batches])
        np.testing.assert_array_equal(counted, np.arange(50))
        for batch in batches:
            np.testing.assert_array_equal(batch.images, NUMBERED[batch.indices])


def test_what_does_not_fit_in_memory_is_read_by_index_from_a_file(pictures):
    settings = dict(dataset="folder", data_dir=str(pictures))
    held = sources.load(Data(**settings))
    on_disk = sources.load(Data(**settings, memory_limit=0))
    assert isinstance(on_disk.train.array, np.memmap)
    assert on_disk.fingerprint() == held.fingerprint()
    for expected, batch in zip(
        take(held.train.array, 6), take(on_disk.train.array, 6), strict=True
    ):
        np.testing.assert_array_equal(batch.degraded, expected.degraded)


# ---- Sources


def test_sample():
    sample = sources.load(Data())
    assert sample.train.array.shape == (6000, 28, 28, 1)
    assert sample.validation.array.shape == (1000, 28, 28, 1)
    assert sample.train.array.dtype == np.uint8


def test_resizing_and_channels_of_the_sample():
    sample = sources.load(Data(image_size=(32, 20), channels=3))
    assert sample.image_shape == (32, 20, 3)
    assert np.ptp(sample.train.array, axis=-1).max() == 0  # Gray, three times.


def idx_file(array):
    return struct.pack(">iiii", 2051, *array.shape) + array.tobytes()


@pytest.mark.parametrize("compressed", [False, True])
def test_fashion_mnist_from_idx_files(tmp_path, compressed):
    random = np.random.default_rng(0)
    expected = {}
    for name, count in (("train", 20), ("t10k", 5)):
        expected[name] = random.integers(0, 256, (count, 28, 28), np.uint8)
        content = idx_file(expected[name])
        path = tmp_path / f"{name}-images-idx3-ubyte{'.gz' * compressed}"
        path.write_bytes(gzip.compress(content) if compressed else content)
    loaded = sources.load(Data(dataset="fashion_mnist", data_dir=str(tmp_path)))
    np.testing.assert_array_equal(loaded.train.array[..., 0], expected["train"])
    np.testing.assert_array_equal(loaded.validation.array[..., 0], expected["t10k"])


@pytest.mark.parametrize("content", [b"", b"too short", b"\x1f\x8b broken", bytes(100)])
def test_broken_idx_files_are_named(tmp_path, content):
    for name in ("train", "t10k"):
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz is not an IDX file"):
        sources.load(Data(dataset="fashion_mnist", data_dir=str(tmp_path)))


def test_folder_with_nested_folders_differing_sizes_and_gray_among_colour(tmp_path, caplog):
    save_pictures(tmp_path, 3, (40, 30), "L")
    save_pictures(tmp_path / "a", 4, (20, 50), "RGB", seed=1)
    save_pictures(tmp_path / "a" / "b", 3, (16, 16), "RGB", seed=2)
    (tmp_path / "a" / "broken.png").write_text("not a picture")
    (tmp_path / ".hidden").write_text("not looked at")
    loaded = sources.load(Data(dataset="folder", data_dir=str(tmp_path), image_size=(24, 16)))
    assert loaded.image_shape == (24, 16, 3)
    assert len(loaded.train) == 9
    assert len(loaded.validation) == 1
    assert [r.message for r in caplog.records] == [
        f"skipped: {tmp_path}/a/broken.png is not a picture in a format that Pillow knows"
    ]
    gray = sources.load(
        Data(dataset="folder", data_dir=str(tmp_path), image_size=(24, 16), channels=1)
    )
    assert gray.image_shape == (24, 16, 1)

    with pytest.raises(DataError, match="differ in size; choose one with --data.image-size"):
        sources.load(Data(dataset="folder", data_dir=str(tmp_path)))


def test_shapes_and_warnings_come_in_the_order_of_the_pictures(caplog):
    def shape_of(name):
        time.sleep((ord(name) * 7 % 5) / 100)
        if name in "bcx":
            raise ImageError(f"{name} is broken")
        return ord(name), 1, 1

    found = list(readable_shapes(shape_of, "abcdefxyz"))
    assert found == [(name, (ord(name), 1, 1)) for name in "adefyz"]
    assert [r.message for r in caplog.records] == [f"skipped: {name} is broken" for name in "bcx"]


@pytest.mark.parametrize("use", ["at one size", "grouped"])
def test_a_bucket_is_asked_for_several_headers_at_once(use, tmp_path, monkeypatch):
    save_pictures(tmp_path, 8)
    together, read_shape = threading.Barrier(8), images.read_shape

    def read_together(path):
        together.wait(5)
        return read_shape(path)

    monkeypatch.setattr(images, "read_shape", read_together)
    data = Data(dataset="folder", data_dir=str(tmp_path))
    if use == "grouped":
        (group,) = GroupedPictures(sources.pictures(data)).groups
        assert group.members == [*range(8)]
    else:
        assert len(sources.load(data).train) == 7


def test_truncated_pictures_are_skipped(tmp_path, caplog):
    save_pictures(tmp_path, 5, (64, 64))
    content = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(content[: len(content) // 2])
    loaded = sources.load(Data(dataset="folder", data_dir=str(tmp_path)))
    assert len(loaded.train) + len(loaded.validation) == 4
    assert "2.png can't be read" in caplog.text


def test_pictures_of_16_bits_are_scaled_to_8(tmp_path):
    ramp = np.linspace(0, 65535, 16 * 16).reshape(16, 16)
    for index in range(2):
        Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / f"{index}.png")
    loaded = sources.load(Data(dataset="folder", data_dir=str(tmp_path)))
    np.testing.assert_allclose(loaded.train.array[0, ..., 0], ramp / 257, atol=0.6)


def test_pictures_are_turned_upright_and_cropped_to_the_middle(tmp_path):
    # Left half black, right half white, marked as turned by 90 degrees clockwise.
    array = np.zeros((20, 40), np.uint8)
    array[:, 20:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    for index in range(2):
        Image.fromarray(array).save(tmp_path / f"{index}.png", exif=exif)
    loaded = sources.load(Data(dataset="folder", data_dir=str(tmp_path)))
    assert loaded.image_shape == (40, 20, 1)
    assert (loaded.train.array[0, :20] == 0).all()
    assert (loaded.train.array[0, 20:] == 255).all()
    squares = sources.load(Data(dataset="folder", data_dir=str(tmp_path), image_size=(20, 20)))
    assert (squares.train.array[0, :10] == 0).all()
    assert (squares.train.array[0, 10:] == 255).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(dataset="no_such_dataset"), "unknown dataset 'no_such_dataset'; use sample"),
        (dict(dataset="fashion-mnist"), "unknown dataset 'fashion-mnist'"),
        (dict(dataset="lfw/no_such_config"), "unknown dataset"),
        (dict(dataset="../x"), "unknown dataset"),
        (dict(dataset="folder"), "use --data.data-dir"),
        (
            dict(dataset="folder", data_dir="/no/such/folder"),
            "/no/such/folder is not a folder; name one",
        ),
    ],
)
def test_missing_sources(settings, message):
    with pytest.raises(DataError, match=message):
        sources.load(Data(**settings))


def test_a_folder_without_pictures(tmp_path, caplog):
    with pytest.raises(DataError, match="holds no pictures"):
        sources.load(Data(dataset="folder", data_dir=str(tmp_path)))
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(DataError, match="holds no pictures"):
        sources.load(Data(dataset="folder", data_dir=str(tmp_path)))
    assert "text.jpg is not a picture" in caplog.text
    save_pictures(tmp_path, 1)
    with pytest.raises(DataError, match=r"1 image\(s\) can't be split .*-fraction 0.1; add"):
        sources.load(Data(dataset="folder", data_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("dataset", "ways"),
    [
        ("fashion_mnist", ["--data.data-dir", "dataset-fashion-mnist", "tfds build", "sample"]),
        ("lfw", ["--data.data-dir", "tfds build lfw", "sample"]),
    ],
)
def test_no_network_and_nothing_prepared_says_all_the_ways(tmp_path, monkeypatch, dataset, ways):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(tfds.socket, "create_connection", refuse)
    monkeypatch.setattr(tfds.urllib.request, "getproxies", dict)
    with pytest.raises(DataError) as raised:
        sources.load(Data(dataset=dataset, data_dir=str(tmp_path)))
    for way in ways:
        assert way in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.fixture
def made_tfds(tmp_path):
    """TFDS's LFW in small, prepared as TFDS does it: 12 people, 1 to 6 pictures each."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    builder = tfds.builder("lfw", data_dir=str(tmp_path))
    folder = builder.data_dir
    tf.io.gfile.makedirs(folder)
    random = np.random.default_rng(0)
    examples = []
    for person in range(12):
        for _ in range(1 + person % 6):
            color = [10 * person, random.integers(256), random.integers(256)]
            encoded = io.BytesIO()
            Image.fromarray(np.full((250, 250, 3), color, np.uint8)).save(encoded, "png")
            examples.append((f"person_{person}", encoded.getvalue()))
    order = random.permutation(len(examples))
    features = builder.info.features
    with tf.io.TFRecordWriter(f"{folder}/lfw-train.tfrecord-00000-of-00001") as writer:
        for index in order:
            label, image = examples[index]
            writer.write(features.serialize_example({"label": label, "image": io.BytesIO(image)}))
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[len(examples)],
        num_bytes=1,
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="lfw", split="train", filetype_suffix="tfrecord"
        ),
    )
    builder.info.set_splits(tfds.core.splits.SplitDict([split]))
    builder.info.write_to_directory(folder)
    return tmp_path


@pytest.mark.parametrize("name", ["lfw", "LFW", "lfw:0.1.1"])
def test_lfw_from_prepared_tfds_is_split_by_person(made_tfds, name):
    loaded = sources.load(
        Data(dataset=name, data_dir=str(made_tfds), image_size=(20, 20), validation_fraction=0.3)
    )
    assert len(loaded.train) + len(loaded.validation) == 42
    assert 13 <= len(loaded.validation) <= 18
    people = [set(part.array[:, 0, 0, 0]) for part in (loaded.train, loaded.validation)]
    assert len(people[0] | people[1]) == 12
    assert not people[0] & people[1]


def test_pictures_of_one_size_are_taken_as_they_are(made_tfds, monkeypatch):
    monkeypatch.setattr(tfds, "RUN", 5)
    settings = dict(dataset="lfw", data_dir=str(made_tfds), validation_fraction=0.3)
    resized = sources.load(Data(**settings, image_size=(20, 20)))
    whole = sources.load(Data(**settings))
    for part in ("train", "validation"):  # Each picture has one color.
        small, large = (getattr(dataset, part).array for dataset in (resized, whole))
        np.testing.assert_array_equal(large, np.broadcast_to(small[:, :1, :1], large.shape))


@pytest.fixture
def tuned(monkeypatch):
    """Whether tf.data tunes each pipeline that is read."""
    import tensorflow as tf

    whether, read = [], tf.data.Dataset.as_numpy_iterator

    def noted(dataset):
        whether.append(dataset.options().autotune.enabled)
        return read(dataset)

    monkeypatch.setattr(tf.data.Dataset, "as_numpy_iterator", noted)
    return whether


def test_who_lets_go_of_batches_does_not_wait_for_a_tuner(tuned):
    take(NUMBERED, 1)
    assert tuned == [False]


@pytest.mark.parametrize("closing", [True, False])
@pytest.mark.parametrize("kind", ["in memory", "in a file", "crops"])
def test_nothing_keeps_images_whose_batches_are_done_with(kind, closing, pictures, tmp_path):
    if kind == "crops":
        data = Data("folder", str(pictures), crop=8)
        examples = sources.load(data, progress=False).examples()
    elif kind == "in a file":
        examples = np.memmap(tmp_path / "images", np.uint8, "w+", shape=NUMBERED.shape)
    else:
        examples = NUMBERED.view(type("Array", (np.ndarray,), {}))
    there = weakref.ref(examples)
    batches = training_batches(examples, NOISE, batch_size=8, seed=0)
    next(batches)
    if closing:
        batches.close()
    del examples, batches
    gc.collect()
    assert there() is None


@pytest.mark.parametrize("size", [None, (20, 20)])
def test_who_lets_go_of_tfds_does_not_wait_for_a_tuner(size, tuned, made_tfds):
    sources.load(Data(dataset="lfw", data_dir=str(made_tfds), image_size=size))
    assert set(tuned) == {False}


def test_damaged_tfds_is_named(made_tfds):
    (record,) = made_tfds.rglob("*.tfrecord*")
    record.write_bytes(record.read_bytes()[:-100])
    with pytest.raises(DataError, match="lfw/0.1.1 is damaged"):
        sources.load(Data(dataset="lfw", data_dir=str(made_tfds), image_size=(20, 20)))


@pytest.fixture(scope="module")
def made_photographs(tmp_path_factory):
    """A TFDS dataset of pictures of several sizes in each of two formats."""
    import tensorflow_datasets

    class MadePhotographs(tensorflow_datasets.core.GeneratorBasedBuilder):
        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):
            image = tensorflow_datasets.features.Image(shape=(None, None, 3))
            features = tensorflow_datasets.features.FeaturesDict({"image": image})
            return tensorflow_datasets.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            random = np.random.default_rng(0)
            for index in range(12):
                yield index, {"image": random.integers(0, 256, (20 + index, 30, 3), np.uint8)}

    folders = {}
    for kind in ("tfrecord", "array_record"):
        folders[kind] = str(tmp_path_factory.mktemp(kind))
        builder = MadePhotographs(data_dir=folders[kind], file_format=kind)
        builder.download_and_prepare()
    return folders


def test_tfds_pictures_are_the_same_in_every_format(made_photographs):
    read = {}
    for kind, folder in made_photographs.items():
        data = Data(dataset="made_photographs", data_dir=folder, image_size=(16, 16))
        whole = sources.load(data)
        cropped = sources.load(Data(dataset="made_photographs", data_dir=folder, crop=16))
        assert (len(cropped.train), len(cropped.validation)) == (10, 2)
        pictures = [cropped.train[index] for index in range(10)]
        assert len({picture.shape for picture in pictures}) == 10
        assert [picture.shape for picture in pictures] == [
            cropped.train.shape(i) for i in range(10)
        ]
        crops = cropped.examples().read(np.arange(10), seed=0, epoch=0)[0]
        read[kind] = (*(part.tobytes() for part in (whole.train.array, *pictures)), crops.tobytes())
    assert read["tfrecord"] == read["array_record"]


def test_tfds_pictures_by_index_are_read_when_they_are_needed(made_photographs, monkeypatch):
    read = []
    real = tfds._image_of
    monkeypatch.setattr(tfds, "_image_of", lambda *args: read.append(args[1]) or real(*args))
    data = Data(dataset="made_photographs", data_dir=made_photographs["array_record"], crop=16)
    dataset = sources.load(data)
    dataset.fingerprint()
    assert not read
    _ = dataset.train[3]
    assert len(read) == 1


def test_tfds_pictures_that_can_only_be_read_in_order_must_fit_in_memory(made_photographs):
    data = Data(
        dataset="made_photographs",
        data_dir=made_photographs["tfrecord"],
        crop=16,
        memory_limit=1e-6,
    )
    with pytest.raises(DataError, match="can't be read by index; prepare it with tfds build"):
        sources.load(data)


def test_prepared_fashion_mnist(tfds_dir):
    loaded = sources.load(Data(dataset="fashion_mnist", data_dir=tfds_dir))
    assert loaded.train.array.shape == (60_000, 28, 28, 1)
    assert loaded.validation.array.shape == (10_000, 28, 28, 1)


def test_prepared_lfw(tfds_dir):
    loaded = sources.load(Data(dataset="lfw", data_dir=tfds_dir, image_size=(80, 80)))
    assert loaded.image_shape == (80, 80, 3)
    total = len(loaded.train) + len(loaded.validation)
    assert len(loaded.validation) / total == pytest.approx(0.1, abs=0.01)


def test_images_that_fit_nowhere_are_refused(tmp_path):
    save_pictures(tmp_path, 4)
    data = Data("folder", str(tmp_path), image_size=(4_000_000, 4_000_000))
    with pytest.raises(DataError, match=r"4 images of 4000000x4000000 need .* GB, more than"):
        sources.load(data)


def test_threads_that_import_tensorflow_at_once_leave_the_error_stream(tmp_path):
    (tmp_path / "tensorflow.py").write_text("import time\ntime.sleep(0.5)\n")
    program = """
import sys, threading
from aecore.data import tensorflow
def load():
    try:
        tensorflow.import_tensorflow()
    except AttributeError:  # The module above has no devices.
        pass
threads = [threading.Thread(target=load) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("still here", file=sys.stderr)
"""
    done = run_program(program, tmp_path)
    assert done.returncode == 0
    assert "still here" in done.stderr


def test_native_lines_of_an_import_are_dropped_and_python_ones_are_not(tmp_path):
    (tmp_path / "tensorflow.py").write_text(
        "import os, sys\nos.write(2, b'native\\n')\nprint('python', file=sys.stderr)\n"
    )
    program = """
from aecore.data.tensorflow import import_tensorflow
try:
    import_tensorflow()
except AttributeError:  # The module above has no devices.
    raise SystemExit("after") from None
"""
    assert run_program(program, tmp_path).stderr == "python\nafter\n"


def test_tensorflow_leaves_keras_to_those_who_use_it():
    program = """
import sys
from aecore.data.tensorflow import import_tensorflow
tf = import_tensorflow()
assert "keras" not in sys.modules
import keras.optimizers
assert tf.keras.optimizers.Adam is keras.optimizers.Adam
"""
    assert run_program(program).returncode == 0
