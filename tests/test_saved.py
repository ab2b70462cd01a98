"""Exported files, and hostile ones; and hostile run directories."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from conftest import random_params
from etils import epath
from jax import export
from PIL import Image

import aecore
from aecore.degradations import JPEG, Downscale, Pixelate
from aecore.errors import CheckpointError, ConfigError
from aecore.models import Autoencoder, NoiseReducer, ResolutionEnhancer, UNet
from aecore.networks import network
from aecore.saved import exported, weights
from aecore.saved.descriptions import Description

RANDOM = np.random.default_rng(0)


def random_restorer(model):
    return aecore.Restorer.of(model, random_params(model))


def save(restorer, path, **options):
    exported.save(epath.Path(path), restorer.trained, **options)
    return path


@pytest.mark.parametrize(
    "model", [NoiseReducer(), ResolutionEnhancer((36, 34, 33)), UNet((4, 6), channels=3, patch=2)]
)
def test_an_exported_network_is_the_network(model, tmp_path):
    restorer = random_restorer(model)
    exported = aecore.Restorer.load(save(restorer, tmp_path / "net.aecore"))
    assert exported.receptive_field == restorer.receptive_field
    for shape in ((4, 4), (2, 21, 34, model.channels)):
        images = RANDOM.random(shape, np.float32)
        np.testing.assert_allclose(exported(images), restorer(images), atol=1e-5)
    codes = restorer.encode(images)
    np.testing.assert_allclose(exported.encode(images), codes, atol=1e-5)
    np.testing.assert_allclose(exported.decode(codes), restorer.decode(codes), atol=1e-5)


def test_an_exported_network_shares_shapes(tmp_path):
    restorer = random_restorer(NoiseReducer())
    exported = aecore.Restorer.load(save(restorer, tmp_path / "net.aecore"))
    images = [RANDOM.random((side, 40 - side, 1), np.float32) for side in range(8, 32, 4)]
    sizes = {index: image.shape[:2] for index, image in enumerate(images)}
    restored = dict(exported.many(sizes, lambda order: ((i, images[i]) for i in order)))
    for index, theirs in enumerate(restorer.each(images)):
        np.testing.assert_allclose(restored[index], theirs, atol=1e-5)
    assert any(program.within for program in exported._engine.programs.compiled)


def test_it_is_lowered_for_every_platform(tmp_path):
    path = save(random_restorer(NoiseReducer()), tmp_path / "net.aecore")
    with zipfile.ZipFile(path) as archive:
        for name in ("apply", "apply_within", "encode", "decode"):
            exported = export.deserialize(bytearray(archive.read(f"functions/{name}")))
            assert set(exported.platforms) == {"cpu", "cuda", "tpu"}


@pytest.mark.every_room
def test_a_run_is_exported_whole_and_needs_neither_flax_nor_orbax(trained, tmp_path):
    restorer = aecore.Restorer.load(trained)
    for name, options in (("a.aecore", {}), ("b.aecore", {"with_functions": False})):
        save(restorer, tmp_path / name, **options)
    image = RANDOM.random((16, 20), np.float32)
    expected = restorer(image)
    np.save(tmp_path / "image.npy", image)
    hidden = "import sys; sys.modules['flax'] = sys.modules['orbax'] = None; "
    code = (
        "import aecore, numpy as np; from pathlib import Path; "
        f"folder = Path({str(tmp_path)!r}); restorer = aecore.Restorer.load(folder / 'a.aecore'); "
        "np.save(folder / 'restored.npy', restorer(np.load(folder / 'image.npy'))); "
        "print(restorer.summary())"
    )
    output = subprocess.run(
        [sys.executable, "-c", hidden + code], check=True, capture_output=True, text=True
    ).stdout
    np.testing.assert_allclose(np.load(tmp_path / "restored.npy"), expected, atol=1e-5)
    assert "3,217 parameters" in output
    alone = aecore.Restorer.load(tmp_path / "b.aecore")
    assert isinstance(alone.network.model, NoiseReducer)
    assert alone.description.model == restorer.description.model
    assert alone.description.metrics == restorer.description.metrics
    for path in (tmp_path / "a.aecore", tmp_path / "b.aecore"):
        assert str(trained.parent).encode() not in path.read_bytes()
    np.testing.assert_array_equal(alone(image), expected)


def test_functions_of_a_file_compute_as_they_were_exported(tmp_path):
    restorer = random_restorer(UNet((4, 6), channels=3, patch=2))
    path = save(restorer, tmp_path / "net.aecore")
    image = RANDOM.random((16, 20, 3), np.float32)
    rounded = aecore.Restorer.load(path, precision="bfloat16")  # As on TPUs.
    np.testing.assert_array_equal(rounded(image), aecore.Restorer.load(path)(image))


def test_parameters_may_have_16_bits(tmp_path):
    restorer = random_restorer(NoiseReducer())
    path = save(restorer, tmp_path / "half.aecore", parameters="bfloat16")
    image = RANDOM.random((16, 20), np.float32)
    restored = aecore.Restorer.load(path)(image)
    np.testing.assert_allclose(restored, restorer(image), atol=0.02)


@pytest.mark.parametrize(("has", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_functions_of_a_file_keep_the_number_format_of_their_parameters(tmp_path, has, asked):
    restorer = random_restorer(NoiseReducer())
    first = aecore.Restorer.load(save(restorer, tmp_path / "a.aecore", parameters=has))
    with pytest.raises(ConfigError, match=f"take parameters of {has}, not of {asked}; .* the run"):
        save(first, tmp_path / "b.aecore", parameters=asked)
    assert not (tmp_path / "b.aecore").exists()
    again = aecore.Restorer.load(save(first, tmp_path / "c.aecore"))
    image = RANDOM.random((16, 20), np.float32)
    np.testing.assert_array_equal(again(image), first(image))
    # Without the functions, nothing depends on it.
    path = save(first, tmp_path / "d.aecore", parameters=asked, with_functions=False)
    with zipfile.ZipFile(path) as archive:
        head = json.loads(archive.read("description.json"))
    assert {leaf["dtype"] for leaf in head["params"].values()} == {asked}
    alone = aecore.Restorer.load(path, model=NoiseReducer())
    np.testing.assert_allclose(alone(image), restorer(image), atol=0.02)


def rewritten(path, change):
    """A copy of an exported file with its members changed, and consistent checksums."""
    import hashlib

    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    head = json.loads(members.pop("description.json"))
    change(head, members)
    checked = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    head["sha256"] = checked | head.pop("keep", {})
    target = path.with_name("changed.aecore")
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("description.json", json.dumps(head))
        for name, data in members.items():
            archive.writestr(name, data)
    return target


def other_shape(head, members):
    head["params"]["output/bias"]["shape"] = [2]


def other_kernel(head, members):
    head["params"]["output/kernel"]["shape"] = [3, 3, 1, 16]


def enormous(head, members):
    head["params"]["output/bias"]["shape"] = [2**31, 2**31]


def path_outside(head, members):
    head["params"]["../../outside"] = head["params"].pop("output/bias")


def pickled(head, members):
    head["params"]["output/bias"]["dtype"] = "object"


def no_stride(head, members):
    head["network"]["stride"] = 0


def callback(head, members):
    def function(params, images):
        outside = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
        return jax.pure_callback(lambda array: array, outside, images)

    # Serialising refuses Python callbacks; a foreign call stands for what it can't know.
    def foreign(params, images):
        return jax.ffi.ffi_call("run_me", jax.ShapeDtypeStruct(images.shape, images.dtype))(images)

    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        random_restorer(NoiseReducer()).params,
    )
    images = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    check = export.DisabledSafetyCheck.custom_call("run_me")
    exported = export.export(jax.jit(foreign), disabled_checks=[check])(params, images)
    members["functions/apply"] = bytes(exported.serialize())


def description_of_strings(head, members):
    head["description"] = {"image_size": "abc"}


def scores_of_lists(head, members):
    head["description"] = {"metrics": [1]}


def noise_of_words(head, members):
    head["description"] = {"inputs": {"noise": ["a", "b"]}}


def blocks_of_one_number(head, members):
    head["description"] = {"inputs": {"noise": [0, 1], "blockiness": 5}}


def name_with_escapes(head, members):
    head["network"]["name"] = "\x1b[31m"


def nonsense_function(head, members):
    members["functions/apply"] = b"nonsense"


def no_functions_unknown_model(head, members):
    for name in [name for name in members if name.startswith("functions/")]:
        del members[name]
    head["description"] = {"model": {"type": "os.system", "command": "true"}}


def no_functions_other_shape(head, members):
    for name in [name for name in members if name.startswith("functions/")]:
        del members[name]
    head["description"] = {"model": {"type": "NoiseReducer", "features": [4, 4], "channels": 1}}


@pytest.mark.parametrize(
    "change",
    [
        other_shape,
        other_kernel,
        enormous,
        path_outside,
        pickled,
        no_stride,
        callback,
        description_of_strings,
        scores_of_lists,
        noise_of_words,
        blocks_of_one_number,
        name_with_escapes,
        nonsense_function,
        no_functions_unknown_model,
        no_functions_other_shape,
    ],
)
def test_hostile_files_are_refused_in_one_line(change, tmp_path):
    path = save(random_restorer(NoiseReducer()), tmp_path / "net.aecore")
    assert aecore.Restorer.load(rewritten(path, lambda head, members: None))
    hostile = rewritten(path, change)
    with pytest.raises(CheckpointError) as raised:
        aecore.Restorer.load(hostile)
    assert str(raised.value).startswith(str(hostile))
    assert "\n" not in str(raised.value)


def test_a_description_may_lack_what_inputs_are_like_or_say_more():
    inputs = {"blockiness": [1, 1.2], "hue": "green"}
    assert Description.from_json({"inputs": inputs}).inputs == inputs


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_damaged_files_are_refused(damage, tmp_path):
    path = save(random_restorer(NoiseReducer()), tmp_path / "net.aecore")
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[data.index(b"params/output/kernel") + 40] ^= 1
    else:
        data = {"empty": b"", "text": b"text"}[damage]
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not an exported network, or is damaged"):
        aecore.Restorer.load(path)


def edit_description(edit):
    """Changes the description of each of a run's checkpoints."""

    def change(run):
        for path in run.glob("checkpoints/*/description/metadata"):
            description = json.loads(path.read_text())
            edit(description)
            path.write_text(json.dumps(description))

    return change


def name_model(description):
    description["model"] = {"type": "subprocess.Popen", "args": "true"}


def model_of_other_shape(description):
    description["model"]["features"] = [32, 8]


def model_of_enormous_shape(description):
    description["model"]["features"] = [2**40, 2**40]


def model_with_unknown_field(description):
    description["model"]["__class__"] = "os"


def image_size_of_strings(description):
    description["image_size"] = ["../../etc", "passwd"]


def model_that_is_a_list(description):
    description["model"] = ["NoiseReducer"]


def history_of_numbers(description):
    description["history"] = [1]


def truncate_arrays(run):
    for path in run.glob("checkpoints/*/params/**/*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:50])


def remove_arrays(run):
    for path in run.glob("checkpoints/*/params"):
        shutil.rmtree(path)


@pytest.mark.parametrize(
    "change",
    [
        edit_description(name_model),
        edit_description(model_of_other_shape),
        edit_description(model_of_enormous_shape),
        edit_description(model_with_unknown_field),
        edit_description(image_size_of_strings),
        edit_description(model_that_is_a_list),
        edit_description(history_of_numbers),
        truncate_arrays,
        remove_arrays,
    ],
)
def test_hostile_runs_are_refused_in_one_line(change, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    change(run)
    with pytest.raises(CheckpointError) as raised:
        aecore.Restorer.load(run)
    assert str(run) in str(raised.value)
    assert "\n" not in str(raised.value)


class Reversing(Autoencoder):
    """A network that is not registered."""

    channels: int = 1
    stride: int = 1

    def encode(self, images):
        return images

    def decode(self, codes):
        return 1 - codes


class Picky(Reversing):
    """A network that doesn't take every image."""

    def encode(self, images):
        raise ValueError("too small")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (NoiseReducer(features=(8, 4)), r"features: \(\d+, \d+\) -> \(8, 4\)"),
        (Reversing(), "NoiseReducer -> Reversing"),
        (Picky(), "NoiseReducer -> Picky"),
        (NoiseReducer, "is not a network"),
        (5, "model 5 is not a network"),
    ],
    ids=["width", "class", "sizes", "no instance", "number"],
)
def test_another_model_is_not_taken_for_damage(model, message, trained, caplog):
    with pytest.raises((CheckpointError, ConfigError), match=message):
        aecore.Restorer.load(trained, model=model)
    assert not caplog.records


@pytest.mark.parametrize("described", [{"type": "Renamed", "features": [5]}, None])
def test_a_run_of_an_unknown_model_is_loaded_with_one_that_fits(described, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    edit_description(lambda description: description.update(model=described))(run)
    assert aecore.Restorer.load(run, model=NoiseReducer()).network.model == NoiseReducer()
    with pytest.raises(CheckpointError, match="model= is not the network of"):
        aecore.Restorer.load(run, model=NoiseReducer(features=(8, 4)))


def test_networks_of_ones_own_can_be_exported(tmp_path):
    restorer = aecore.Restorer.of(Reversing(), {})
    assert network.fits_within(restorer.network, {})
    path = save(restorer, tmp_path / "own.aecore")
    image = RANDOM.random((5, 7), np.float32)
    np.testing.assert_allclose(aecore.Restorer.load(path)(image), 1 - image, atol=1e-6)


class Own(Autoencoder):
    """A network with parameters that is not registered."""

    features: int = 1
    channels: int = 1
    stride: int = 1

    def setup(self):
        self.layer = nn.Dense(self.features)

    def encode(self, images):
        return self.layer(images)

    def decode(self, codes):
        return codes[..., :1]


def test_parameters_alone_of_ones_own_network_are_loaded_with_model(tmp_path):
    restorer = random_restorer(Own())
    path = epath.Path(save(restorer, tmp_path / "own.aecore", with_functions=False))
    with pytest.raises(CheckpointError, match="is not known; pass it as model=, or export"):
        exported.load(path)
    trained = exported.load(path, model=Own())
    model, params = trained.network.model, trained.params
    assert model == Own()
    jax.tree.map(np.testing.assert_array_equal, params, restorer.params)
    with pytest.raises(
        CheckpointError, match=r"layer/bias has shape \(1,\) in the file and \(2,\) "
    ):
        exported.load(path, model=Own(features=2))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (PermissionError(13, "Permission denied"), "can't be read (Permission denied); check that"),
        (MemoryError(), "there is not enough memory to load it"),
    ],
)
def test_a_file_that_cannot_be_read_is_not_called_damaged(failure, message, monkeypatch, tmp_path):
    path = epath.Path(save(random_restorer(NoiseReducer()), tmp_path / "net.aecore"))

    def fail(*args, **kwargs):
        raise failure

    for name in ("open", "read_bytes"):
        monkeypatch.setattr(type(path), name, fail)
    with pytest.raises(CheckpointError) as raised:
        exported.load(path)
    assert str(raised.value).startswith(str(path))
    assert message in str(raised.value)
    assert "damaged" not in str(raised.value)


def test_a_missing_package_is_not_called_damage(tmp_path):
    path = save(random_restorer(NoiseReducer()), tmp_path / "net.aecore", with_functions=False)
    code = (
        "import sys; sys.modules['flax'] = None\n"
        "from aecore.errors import ConfigError\n"
        "from aecore.saved import exported\n"
        "from etils import epath\n"
        f"try: exported.load(epath.Path({str(path)!r}))\n"
        "except ConfigError as error: print(error)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert "needs a package that can't be imported (No module named 'flax" in output
    assert "install it with pip" in output


def test_the_shipped_weights_are_those_that_were_trained():
    largest_mse = {
        "fashion-mnist-denoise": 0.0142,
        "lfw-enhance": 0.0016,
        "photo-denoise": 0.0021,
        "photo-denoise-gray": 0.0016,
        "photo-dejpeg": 0.0014,
        "photo-upscale-2x": 0.0015,
        "photo-upscale-4x": 0.0042,
    }
    assert largest_mse.keys() == weights.CARDS.keys()
    for name, mse in largest_mse.items():
        assert aecore.Restorer.load(name).description.metrics["mse"] < mse


def test_the_shipped_denoiser_removes_noise():
    noisy = np.clip(0.5 + RANDOM.normal(0, 0.4, (28, 28)), 0, 1)
    assert aecore.restore(noisy, "fashion-mnist-denoise").std() < noisy.std() / 2


def test_the_shipped_enhancer_enhances_a_face_of_another_collection():
    face = skimage.data.astronaut()[:240, 110:350]
    original = np.asarray(Image.fromarray(face).resize((80, 80), Image.Resampling.BILINEAR)) / 255
    pixelated = np.asarray(Pixelate(0.4)(original[None])[0])
    restored = aecore.restore(pixelated, "lfw-enhance")
    mse = [((image - original) ** 2).mean() for image in (pixelated, restored)]
    assert mse[1] < 0.6 * mse[0]


@pytest.mark.parametrize("scale", [2, 4])
def test_the_shipped_upscalers_are_better_than_interpolation(scale):
    original = skimage.data.chelsea()[:300, :448]
    small = np.rint(np.asarray(Downscale(scale)(original[None] / 255))[0] * 255).astype(np.uint8)
    larger = aecore.restore(small, f"photo-upscale-{scale}x")
    size = original.shape[1::-1]
    plain = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))
    mse = [((image.astype(float) - original) ** 2).mean() for image in (plain, larger)]
    assert mse[1] < 0.85 * mse[0]


@pytest.mark.parametrize(("sigma", "least"), [(0, 38), (15, 31), (50, 26)])
def test_the_shipped_denoiser_of_photographs_is_blind(sigma, least):
    original = skimage.data.chelsea()[:240, :320]
    noise = np.random.default_rng(0).normal(0, sigma, original.shape)
    noisy = np.rint(original + noise).clip(0, 255).astype(np.uint8)
    restored = aecore.restore(noisy, "photo-denoise")
    assert -10 * np.log10(((restored / 255 - original / 255) ** 2).mean()) > least


@pytest.mark.parametrize(("sigma", "least"), [(15, 31), (50, 26)])
def test_the_shipped_denoiser_of_gray_photographs_is_blind(sigma, least):
    original = np.asarray(Image.fromarray(skimage.data.chelsea()).convert("L"))[:240, :320]
    noise = np.random.default_rng(0).normal(0, sigma, original.shape)
    noisy = np.rint(original + noise).clip(0, 255).astype(np.uint8)
    restored = aecore.restore(noisy, "photo-denoise-gray")
    assert -10 * np.log10(((restored / 255 - original / 255) ** 2).mean()) > least


@pytest.mark.parametrize("quality", [10, 40])
def test_the_shipped_network_undoes_jpeg(quality):
    original = skimage.data.chelsea()[:240, :320]
    compressed = np.asarray(JPEG(quality)(original[None] / 255))[0]
    restored = aecore.restore(np.rint(compressed * 255).astype(np.uint8), "photo-dejpeg")
    mse = [((image - original) ** 2).mean() for image in (255 * compressed, restored.astype(float))]
    assert mse[1] < 0.9 * mse[0]


def test_the_card_of_shipped_weights_is_in_their_summary():
    text = aecore.Restorer.load("photo-upscale-2x").summary()
    card = weights.CARDS["photo-upscale-2x"]
    for said in (card.purpose, card.data, card.limits, card.sha256, "multiply-adds"):
        assert said in text


def test_a_folder_hides_shipped_weights_only_if_it_holds_a_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "fashion-mnist-denoise"
    version = weights.version(name)
    Path(name).mkdir()
    (Path(name) / "restored.png").touch()
    assert weights.load(name).about["sha256"] == weights.CARDS[name].sha256
    assert weights.version(name) == version
    (Path(name) / "checkpoints").mkdir()
    assert weights.version(name) != version
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        weights.load(name)


def test_the_version_of_a_run_leaves_out_checkpoints_that_vanish_meanwhile(tmp_path, monkeypatch):
    checkpoints = tmp_path / "checkpoints"
    for step in ("1", "2"):
        (checkpoints / step).mkdir(parents=True)
    glob = type(epath.Path(checkpoints)).glob

    def listed(self, pattern):
        found = [*glob(self, pattern)]
        (checkpoints / "1").rmdir()
        return found

    monkeypatch.setattr(type(epath.Path(checkpoints)), "glob", listed)
    assert [name for name, *_ in weights.version(tmp_path).files] == ["2"]


def test_shipped_weights_that_were_changed_are_refused(monkeypatch):
    name = next(iter(weights.CARDS))
    card = dataclasses.replace(weights.CARDS[name], sha256="0" * 64)
    monkeypatch.setattr(weights, "CARDS", {name: card})
    with pytest.raises(CheckpointError, match="its SHA-256 is not"):
        aecore.Restorer.load(name)


def test_parameters_of_bfloat16_make_half_the_file(tmp_path):
    model = UNet((4, 8))
    restorer = random_restorer(model)
    paths = [epath.Path(tmp_path / f"{dtype}.aecore") for dtype in ("float32", "bfloat16")]
    for path in paths:
        exported.save(path, restorer.trained, with_functions=False, parameters=path.stem)
    whole, half = (exported.load(path, model=model) for path in paths)
    for a, b in zip(*map(jax.tree.leaves, (whole.params, half.params)), strict=True):
        assert b.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=2**-8)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(whole.params)) * n for n in (4, 2)]
    assert paths[0].stat().length - paths[1].stat().length == pytest.approx(sizes[1], abs=1000)


def test_the_benchmarks_of_cards_are_those_that_were_measured():
    root = Path(__file__).parent.parent
    tables = "".join((root / name).read_text() for name in ("README.md", "experiments/README.md"))
    for name, card in weights.CARDS.items():
        rows = "".join(line for line in tables.splitlines() if f"`{name}`" in line)
        figures = re.findall(r"\d\d\.\d\d", card.benchmarks)
        assert len(figures) >= 2
        assert [figure for figure in figures if figure not in rows] == []


def test_an_onnx_file_is_not_taken_for_a_damaged_network(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"\x08\x08onnx")
    with pytest.raises(CheckpointError, match="ONNX files are for other programs"):
        aecore.Restorer.load(tmp_path / "net.onnx")
