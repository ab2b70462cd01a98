"""Scores of any network on any pictures, against other libraries and published figures."""

import csv
import dataclasses
import json
import shutil
import threading

import jax
import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from test_photographs import save

import aecore
from aecore import cli, degradations, metrics
from aecore.degradations import JPEG, Blur, Compose, Downscale, GaussianNoise, Sometimes
from aecore.errors import ConfigError, DataError
from aecore.media import images
from aecore.models import UNet, Upscaler
from aecore.restoring.restorer import Restorer
from aecore.saved import exported
from aecore.saved.descriptions import Description, describe
from aecore.saved.trained import TrainedNetwork
from aecore.scoring import pictures

SIZES = [(41, 56), (56, 40), (41, 56), (33, 70), (44, 41)]


@pytest.fixture(scope="module", autouse=True)
def optimized():
    """These tests compute more than they compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def photos(tmp_path):
    save(tmp_path / "photos", SIZES, coarse=24)
    return tmp_path / "photos"


def network(model):
    """Untrained, so that it gives back its input, or a bicubic interpolation."""
    shape = (1, 4 * model.stride, 4 * model.stride, model.channels)
    return TrainedNetwork.of(
        model, jax.jit(model.init)(jax.random.key(0), np.zeros(shape))["params"]
    )


@pytest.fixture
def denoiser(tmp_path):
    path = tmp_path / "identity.aecore"
    exported.save(path, network(UNet((4, 8), channels=3, patch=2)))
    return str(path)


def luma(image):
    return 16 + image.astype(float) @ [65.481, 128.553, 24.966] / 255


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_scores_are_those_of_scikit_image_on_pillows_pictures(scale, photos):
    degradation = Compose() if scale == 1 else Downscale(scale)
    model = UNet((4, 8), channels=3, patch=2) if scale == 1 else Upscaler(4, 1, scale=scale)
    job = pictures.find(str(photos), degradation, Restorer(network(model)))
    found = sorted(pictures.score(job, Restorer(network(model)), {}))
    assert [picture.name for picture in found] == [f"{n:02}.png" for n in range(5)]
    for picture in found:
        original = Image.open(photos / picture.name)
        width, height = (side // scale * scale for side in original.size)
        original = original.crop((0, 0, width, height))
        small = original.resize((width // scale, height // scale), Image.Resampling.BICUBIC)
        again = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
        inside = slice(scale, -scale) if scale > 1 else slice(None)
        again, original = again[inside, inside], np.asarray(original)[inside, inside]
        scores = picture.values["restored"]
        if scale == 1:
            assert scores["psnr"] == 100
            continue
        expected = peak_signal_noise_ratio(luma(original), luma(again), data_range=255)
        assert scores["psnr_y"] == pytest.approx(expected, abs=0.05)
        assert picture.values["degraded"]["psnr_y"] == pytest.approx(expected, abs=0.05)
        ssim = structural_similarity(
            luma(original),
            luma(again),
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert scores["ssim_y"] == pytest.approx(ssim, abs=2e-3)
        expected = peak_signal_noise_ratio(original, again, data_range=255)
        assert scores["psnr"] == pytest.approx(expected, abs=0.05)


def test_ssim_of_large_images_is_the_same():
    random = np.random.default_rng(0)
    a, b = random.random((2, 1, 390, 40, 1)).astype(np.float32)
    parts = [metrics.ssim(a[:, i : i + 200], b[:, i : i + 200]) for i in (0, 190)]
    assert metrics.ssim(a, b)[0] == pytest.approx(np.mean(parts), abs=1e-5)


def test_noise_is_neither_clipped_nor_rounded(photos, denoiser):
    degradation = GaussianNoise(50 / 255, clip=False)
    scores = aecore.evaluate(denoiser, data=str(photos), degradation=degradation)
    assert scores["baseline"]["psnr"] == pytest.approx(-20 * np.log10(50 / 255), abs=0.1)
    # The network gives back its input, clipped.
    assert scores["evaluation"]["psnr"] > scores["baseline"]["psnr"] + 0.1
    assert "clip=False" in scores["protocol"]


def test_gray_pictures_have_gray_noise(photos, denoiser):
    for path in photos.iterdir():
        Image.open(path).convert("L").save(path)
    restorer = Restorer.load(denoiser)
    job = pictures.find(str(photos), GaussianNoise(0.1), restorer)
    for index in range(len(job.source)):
        degraded, original = pictures.degraded_pair(job, index)
        assert degraded.shape == original.shape
        assert 0.05 < (degraded - original).std() < 0.12
        np.testing.assert_array_equal(degraded, degraded[..., :1].repeat(3, axis=2))


@pytest.mark.every_room
def test_the_command_prints_and_writes_what_was_scored(photos, denoiser, tmp_path, capsys):
    (photos / "broken.png").write_bytes(b"no picture")
    words = ["evaluate", denoiser, "--data", str(photos), "--degradation", "GaussianNoise(25/255)"]
    words += ["--methods", "median", "gaussian", "--csv", str(tmp_path / "scores.csv")]
    words += ["--pictures", str(tmp_path / "ranked.png"), "--json", str(tmp_path / "scores.json")]
    with pytest.raises(SystemExit) as exit_:
        cli.run(words)
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "5 pictures of" in out and "PSNR, Y" in out and "BT.601" in out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores["classical"]) == {"median", "gaussian"}
    assert scores["classical"]["gaussian"]["psnr"] > scores["baseline"]["psnr"] + 1
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 4
    restored = [float(row["psnr"]) for row in rows if row["result"] == "restored"]
    assert np.mean(restored) == pytest.approx(scores["evaluation"]["psnr"], abs=1e-3)
    assert rows[0] | {"psnr": ""} == rows[0] | {"picture": "00.png", "height": "41", "psnr": ""}
    # The best, the median and the worst one.
    assert 450 < Image.open(tmp_path / "ranked.png").size[0] < 650


def test_pictures_of_one_name_in_several_folders_are_told_apart(tmp_path, denoiser, monkeypatch):
    for folder, gray in (("a", 60), ("b", 190)):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        Image.new("RGB", (48, 48), (gray, 0, 0)).save(tmp_path / "photos" / folder / "1.png")
    shown = {}
    monkeypatch.setattr(pictures.reports, "save_samples", lambda rows, *_: shown.update(rows))
    found = aecore.evaluate(
        denoiser,
        data=str(tmp_path / "photos"),
        degradation=Compose(),
        csv=str(tmp_path / "scores.csv"),
        pictures=str(tmp_path / "ranked.png"),
    )
    assert found["evaluation"]["images"] == 2
    with (tmp_path / "scores.csv").open() as file:
        names = [row["picture"] for row in csv.DictReader(file) if row["result"] == "restored"]
    assert names == ["a/1.png", "b/1.png"]
    assert sorted(np.rint(shown["original"].max(axis=(1, 2, 3)) * 255)) == [60, 190]


def test_pairs_are_scored_as_they_are(photos, tmp_path, denoiser):
    for name in ("original", "degraded"):
        (tmp_path / "pairs" / name).mkdir(parents=True)
    for path in photos.iterdir():
        image = read(path)
        Image.fromarray(image).save(tmp_path / "pairs/original" / path.name)
        Image.fromarray(image // 2).save(tmp_path / "pairs/degraded" / path.name)
    scores = aecore.evaluate(denoiser, data=str(tmp_path / "pairs"))
    images = [read(path) for path in sorted(photos.iterdir())]
    expected = [peak_signal_noise_ratio(image, image // 2) for image in images]
    assert scores["baseline"]["psnr"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert scores["evaluation"]["psnr"] == pytest.approx(np.mean(expected), abs=1e-3)


def restorer_of_run(kind, dataset, degradation):
    """Untrained, with a description as a run has it."""
    model = kind((4, 8), channels=3, patch=2)
    data = aecore.Data(dataset, crop=16)
    description = describe(aecore.Experiment("a", model, degradation, data))
    return Restorer(
        dataclasses.replace(network(model), description=Description.from_json(description))
    )


def test_what_a_run_undoes_is_known_without_its_model(photos):
    class Unregistered(UNet):
        pass

    job = pictures.find(
        str(photos), None, restorer_of_run(Unregistered, "folder", GaussianNoise(0.1))
    )
    assert job.degradation == GaussianNoise(0.1)


def test_what_a_run_on_pairs_undoes_must_be_said(photos):
    restorer = restorer_of_run(UNet, "pairs", Compose())
    with pytest.raises(ConfigError, match="trained on pairs.* with degradation=.*--degradation"):
        pictures.find(str(photos), None, restorer)
    assert pictures.find(str(photos), GaussianNoise(0.1), restorer).scale == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GaussianNoise(25 / 255, clip=False)", GaussianNoise(25 / 255, clip=False)),
        ("GaussianNoise(sigma=(0, 0.2))", GaussianNoise((0, 0.2))),
        (
            "Compose((Sometimes(0.5, Blur()), JPEG(quality=(10, 95))))",
            Compose((Sometimes(0.5, Blur()), JPEG(quality=(10, 95)))),
        ),
        (" Downscale(4, 'matlab') ", Downscale(4, "matlab")),
        ("GaussianNoise(+0.1)", GaussianNoise(0.1)),
    ],
)
def test_degradations_are_read_from_text(text, expected):
    assert degradations.parse(text) == expected
    assert degradations.parse(repr(expected)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Noise(0.1)", "there is no degradation Noise, only .*GaussianNoise"),
        ("GaussianNoise(0.1", "can't be read"),
        ("GaussianNoise(strength=1)", "strength"),
        ("GaussianNoise(-1)", "sigma -1 is out of bounds"),
        ("__import__('os').system('true')", "not allowed"),
        ("GaussianNoise(**{'sigma': 0.1})", r"\*\*{'sigma': 0.1} is not allowed"),
        ("GaussianNoise(1 / 0)", "division by zero"),
        ("25", "'25' is no degradation"),
        ("JPEG", r"write JPEG\(\)"),
        ("Compose((JPEG(), Sometimes))", r"write Sometimes\(\)"),
        (None, "None can't be read: it is no text"),
        ("", "can't be read"),
    ],
)
def test_what_is_no_degradation_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        degradations.parse(text)


def test_what_can_not_be_scored(photos, denoiser, tmp_path):
    def refused(message, error=ConfigError, **settings):
        with pytest.raises(error, match=message):
            aecore.evaluate(denoiser, **{"data": str(photos), **settings})

    refused("trained to undo is not known.*; say what to do to the pictures with degradation=")
    refused("2 times smaller, but the network enlarges them 1", degradation=Downscale(2))
    (tmp_path / "empty").mkdir()
    noise = GaussianNoise(0.1)
    refused("holds no pictures", DataError, data=str(tmp_path / "empty"), degradation=noise)
    refused(
        "is not a folder; name one that holds",
        DataError,
        data=str(tmp_path / "none"),
        degradation=noise,
    )
    refused("leave out data", save=True)
    with pytest.raises(ConfigError, match="name their folder with data"):
        aecore.evaluate(denoiser, csv="scores.csv")


def test_headers_are_read_at_the_same_time(photos, denoiser, monkeypatch):
    together = threading.Barrier(len(SIZES))

    def read_together(path):
        together.wait(5)
        return 8, 8, 3

    monkeypatch.setattr(images, "read_shape", read_together)
    with pytest.raises(DataError, match="none of the pictures"):  # All are too small.
        aecore.evaluate(denoiser, data=str(photos), degradation=GaussianNoise(0.1))


@pytest.mark.parametrize("name", ["csv", "pictures"])
def test_files_that_can_not_be_written_are_refused_before_scoring(
    name, photos, denoiser, tmp_path, monkeypatch
):
    monkeypatch.delattr(pictures, "score")
    for path in (tmp_path / "none" / "file", photos):
        with pytest.raises(ConfigError, match=f"{path} can't be written"):
            aecore.evaluate(
                denoiser,
                data=str(photos),
                degradation=GaussianNoise(0.1),
                **{name: str(path)},
            )


def test_pictures_that_are_scored_are_not_overwritten(photos, denoiser, tmp_path, monkeypatch):
    monkeypatch.delattr(pictures, "score")
    shutil.copytree(photos, tmp_path / "pairs/original")
    shutil.copytree(photos, tmp_path / "pairs/degraded")
    (tmp_path / "link.png").symlink_to(photos / "01.png")
    for data, output in (
        (photos, photos / "01.png"),
        (photos, tmp_path / "link.png"),
        (tmp_path / "pairs", tmp_path / "pairs/original/01.png"),
        (tmp_path / "pairs", tmp_path / "pairs/degraded/01.png"),
    ):
        for name in ("csv", "pictures"):
            with pytest.raises(ConfigError, match=f"{output} is an input or an output"):
                aecore.evaluate(denoiser, data=str(data), **{name: str(output)})
    with pytest.raises(ConfigError, match=r"new\.txt is an input or an output"):
        new = str(tmp_path / "new.txt")
        aecore.evaluate(denoiser, data=str(photos), csv=new, pictures=new)


@pytest.mark.parametrize("option", ["--csv", "--pictures", "--json"])
def test_the_command_overwrites_no_picture_that_is_scored(
    option, photos, denoiser, tmp_path, monkeypatch, capsys
):
    monkeypatch.delattr(pictures, "score")
    words = ["evaluate", denoiser, "--data", str(photos), "--degradation", "GaussianNoise(0.1)"]
    with pytest.raises(SystemExit) as exit_:
        cli.run([*words, option, str(photos / "01.png")])
    assert exit_.value.code == 2
    assert "01.png is an input or an output" in capsys.readouterr().err


def test_scores_may_replace_scores_and_go_to_one_device(photos):
    (photos / "scores.txt").write_text("of before")
    pictures.check_outputs(str(photos), [photos / "scores.txt", None, "/dev/null", "/dev/null"])


@pytest.mark.parametrize("methods", [False, ["median"]])
def test_pictures_of_which_none_can_be_scored(denoiser, tmp_path, methods):
    save(tmp_path / "small", [(6, 6)])
    (tmp_path / "broken").mkdir()
    path = tmp_path / "broken/0.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:1000])  # The header is there, most of the pixels aren't.
    for name in ("broken", "small"):
        with pytest.raises(DataError, match=f"of the pictures in .*{name}.*; name a folder"):
            aecore.evaluate(
                denoiser,
                data=str(tmp_path / name),
                degradation=GaussianNoise(0.1),
                classical=methods,
            )


@pytest.mark.parametrize(
    ("folder", "degradation", "published", "name"),
    [
        ("cbsd68", GaussianNoise(25 / 255, clip=False), 20.17, "psnr"),
        ("live1", JPEG(10), 25.69, "psnr"),
        ("set5", Downscale(2), 33.67, "psnr_y"),
        ("set5", Downscale(4), 28.43, "psnr_y"),
        ("set14", Downscale(4), 26.09, "psnr_y"),
    ],
)
def test_published_baselines_are_reproduced(folder, degradation, published, name, photos_dir):
    model = UNet((4, 8), channels=3, patch=2)
    if degradation.reduction > 1:
        model = Upscaler(4, 1, scale=degradation.reduction)
    restorer = Restorer(network(model), in_range=False)
    scores = pictures.evaluate(restorer, f"{photos_dir}/{folder}", degradation)
    # Pillow, with which some were computed, rounds between rows and columns too.
    assert scores["baseline"][name] == pytest.approx(published, abs=0.02)


def test_weights_that_ship_have_no_pictures_of_their_own():
    with pytest.raises(ConfigError, match=r"name some with data \(--data\)"):
        aecore.evaluate("photo-denoise")
