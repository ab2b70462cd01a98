"""What an experiment is: frozen dataclasses, validated when built, with a round trip through JSON.

`Experiment` is also the command line of an experiment file: a field's path is its flag, its
docstring the flag's help.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from aecore import degradations, losses
from aecore.degradations import Degradation
from aecore.errors import ConfigError
from aecore.metrics import SSIM_WINDOW
from aecore.networks import models


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from, and what training takes of them."""

    dataset: str = "sample"
    """sample, fashion_mnist, lfw, folder, pairs, or the name of any TFDS dataset with images.
    pairs: DIR/degraded and DIR/original hold pictures of the same names."""
    data_dir: str | None = None
    """Folder of prepared TFDS data, of IDX files or of pictures; None: where TFDS keeps its own."""
    image_size: tuple[int, int] | None = None
    """Height and width to bring whole images to; None: their own, if all are of one size."""
    crop: int | tuple[int, int] | None = None
    """Side, or height and width, of random crops to train on, cut from the pictures at full
    resolution; of pairs, from the originals. None: train on whole images."""
    crops_per_image: int = 1
    """Crops of each picture in an epoch, each at another place."""
    small: Literal["skip", "pad"] = "skip"
    """What to do with pictures smaller than the crop. skip: leave them out. pad: mirror them at
    their lower and right edges until they are large enough."""
    turn: bool = False
    """Mirror and turn each crop at random, in one of the eight ways there are; the crop must be a
    square."""
    channels: int | None = None
    """1 for gray, 3 for RGB; None: as the source has them, or RGB for crops of files."""
    resize: Literal["antialiased", "bilinear"] = "antialiased"
    """How whole images are resized. bilinear interpolates between the 4 nearest pixels, as OpenCV
    does by default; antialiased is bicubic over all pixels that a new one covers."""
    validation_fraction: float = 0.1
    """Share of the images held out for validation, where the source has no such split."""
    split_seed: int = 0
    """Seed of that choice."""
    memory_limit: float | None = None
    """GiB of decoded images to hold in memory; None: a quarter of the computer's memory. Of whole
    images, more are held in a temporary file; crops of other pictures are decoded each time."""

    @property
    def crop_size(self) -> tuple[int, int] | None:
        """Height and width of a crop."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop

    def __post_init__(self):
        for name, size in (("image_size", self.image_size), ("crop", self.crop_size)):
            _require(
                size is None or (isinstance(size, tuple) and len(size) == 2 and min(size) >= 1),
                f"data.{name} {size} is not a height and a width of at least 1",
            )
        _require(
            self.crop is None or self.image_size is None,
            f"data.crop {self.crop} is cut at full resolution, data.image_size {self.image_size} "
            "is of whole images; use one of them",
        )
        _require(
            self.crops_per_image >= 1,
            f"data.crops_per_image {self.crops_per_image} is less than 1; use 1 or more",
        )
        for name in ("crops_per_image", "turn"):
            _require(
                self.crop is not None or getattr(self, name) == getattr(Data, name),
                f"data.{name} {getattr(self, name)} is of crops; choose their size with data.crop",
            )
        _require(
            not self.turn or len(set(self.crop_size or ())) == 1,
            f"data.turn needs square crops, not data.crop {self.crop}",
        )
        _require(
            self.channels in (None, 1, 3),
            f"data.channels {self.channels} is not supported; use 1 for gray or 3 for RGB",
        )
        for name, choices in (
            ("resize", ("antialiased", "bilinear")),
            ("small", ("skip", "pad")),
        ):
            value = getattr(self, name)
            _require(
                value in choices, f"data.{name} {value!r} is unknown; use {' or '.join(choices)}"
            )
        _require(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction {self.validation_fraction} is not between 0 and 1",
        )
        _require(self.split_seed >= 0, f"data.split_seed {self.split_seed} is negative")
        _require(
            self.memory_limit is None or self.memory_limit >= 0,
            f"data.memory_limit {self.memory_limit} is negative",
        )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Adam (Kingma and Ba, 2015), or AdamW (Loshchilov and Hutter, 2019)."""

    learning_rate: float = 1e-3
    """Step size, above 0; the highest one where a schedule changes it."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: the learning rate falls along half a cosine, and would be 0 after the last step."""
    warmup_steps: int = 0
    """Steps, at most half of all, in which the learning rate first rises in equal parts."""
    weight_decay: float = 0.0
    """Above 0: AdamW, which shrinks the kernels, not biases and scales, by this times the learning
    rate at each step."""
    clip_norm: float | None = None
    """Largest norm of all gradients together, to which larger ones are scaled; None: any."""
    ema: float | None = None
    """Decay, below 1, of an exponential moving average of the parameters, which is then what is
    evaluated and restored from; at step n at most (1 + n) / (10 + n). None: none is kept."""

    def __post_init__(self):
        _require(
            0 < self.learning_rate < float("inf"),
            f"optimizer.learning_rate {self.learning_rate} is not a positive number",
        )
        _require(
            self.schedule in ("constant", "cosine"),
            f"optimizer.schedule {self.schedule!r} is unknown; use constant or cosine",
        )
        _require(
            isinstance(self.warmup_steps, int) and self.warmup_steps >= 0,
            f"optimizer.warmup_steps {self.warmup_steps} is not a number of steps; use 0 or more",
        )
        _require(
            0 <= self.weight_decay < float("inf"),
            f"optimizer.weight_decay {self.weight_decay} is out of bounds; use 0 or more",
        )
        _require(
            self.clip_norm is None or 0 < self.clip_norm < float("inf"),
            f"optimizer.clip_norm {self.clip_norm} is not a positive number; use one, or None",
        )
        _require(
            self.ema is None or 0 < self.ema < 1,
            f"optimizer.ema {self.ema} is not between 0 and 1; use one such as 0.999, or None",
        )


@dataclasses.dataclass(frozen=True)
class Training:
    """How long to train, in what batches, and what to keep."""

    batch_size: int = 32
    """Images a step, over all devices."""
    epochs: int = 10
    """Passes over the training images; the last incomplete batch of each is left out."""
    steps: int | None = None
    """Stop after this many steps, if that comes before the last epoch's end."""
    patience: int | None = None
    """Stop when this many epochs in a row brought no better validation loss; None: never."""
    min_delta: float = 0.0
    """By how much the validation loss must fall to count as better."""
    seed: int = 0
    """Seed of the weights, of the images' order and of the noise."""
    loss: Literal["mse", "mae", "charbonnier", "ms_ssim_l1", "log_mse"] = "mse"
    """What is made small; see aecore.losses. Which checkpoint is best is told by MSE always."""
    flip: bool = False
    """Mirror each training image left to right with probability 1/2."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; there is one at each epoch's end besides."""
    keep: int = 3
    """Newest checkpoints to keep; the best by validation loss is kept besides."""
    log_every: int = 50
    """Steps that one line of metrics.jsonl averages over."""
    feed: Literal["stream", "resident"] = "stream"
    """stream: batches come from tf.data. resident: the devices hold all images, and do many steps a
    call."""
    degrade_on: Literal["host", "device"] = "host"
    """Where a stream's images are degraded; resident ones are degraded on the device anyway."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in; parameters, optimizer and loss are float32."""
    accumulation: int | None = None
    """Parts that a device's share of a batch is divided into and computed in turn, to need less
    memory; None: 1, or on CPUs what suits their caches."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How the step is compiled for several devices; the results are the same."""
    devices: int | None = None
    """How many devices to use; None: all."""
    distributed: str | None = None
    """Train with other processes: auto (TPU pods, Slurm, Open MPI, Kubernetes), or
    HOST:PORT,COUNT,INDEX: the first process's address, how many there are, which this one is."""

    def last_step(self, images: int) -> int:
        """The step after which training ends, of so many training images."""
        last = self.epochs * (images // self.batch_size)
        return last if self.steps is None else min(last, self.steps)

    def __post_init__(self):
        for name in ("batch_size", "epochs", "checkpoint_every", "keep", "log_every"):
            value = getattr(self, name)
            _require(isinstance(value, int), f"training.{name} {value} is not a whole number")
            _require(value >= 1, f"training.{name} {value} is less than 1; use 1 or more")
        for name, choices in (
            ("loss", tuple(losses.LOSSES)),
            ("feed", ("stream", "resident")),
            ("degrade_on", ("host", "device")),
            ("precision", ("float32", "bfloat16")),
            ("parallel", ("jit", "pmap")),
        ):
            value = getattr(self, name)
            _require(
                value in choices,
                f"training.{name} {value!r} is unknown; use {' or '.join(choices)}",
            )
        for name in ("steps", "patience", "accumulation", "devices"):
            value = getattr(self, name)
            _require(
                value is None or value >= 1,
                f"training.{name} {value} is less than 1; use 1 or more, or None",
            )
        _require(self.min_delta >= 0, f"training.min_delta {self.min_delta} is negative")
        _require(0 <= self.seed < 2**32, f"training.seed {self.seed} is not in 0 to 2**32 - 1")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment: a model, what it learns to undo, on which data, and how."""

    name: str
    """Names the run, and its directory if run_dir is None."""
    model: Any
    """A Flax Linen module from `aecore.models`, or one of your own."""
    degradation: Degradation
    """What is done to the images, and what the model learns to undo."""
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    run_dir: str | None = None
    """Directory of checkpoints and results, local or gs://; None: runs/NAME."""

    def __post_init__(self):
        _require(bool(self.name), "name is empty; give the experiment a name")
        _require(
            hasattr(self.model, "encode") and not isinstance(self.model, type),
            f"model {self.model!r} is not a network; use one such as NoiseReducer()",
        )
        _require(
            isinstance(self.degradation, Degradation),
            f"degradation {self.degradation!r} is not a Degradation; see aecore.degradations",
        )
        if self.data.image_size is not None:
            self.check_images(*self.data.image_size, self.data.channels or self.model.channels)

    @property
    def directory(self) -> str:
        """The run directory."""
        return os.fspath(self.run_dir or f"runs/{self.name}")

    def check_images(self, height: int, width: int, channels: int) -> None:
        """Raises ConfigError unless the model takes images of this size and these channels."""
        _require(
            min(height, width) >= SSIM_WINDOW,
            f"image size {height}x{width} is too small for SSIM; "
            f"use --data.image-size with at least {SSIM_WINDOW} {SSIM_WINDOW}",
        )
        stride = self.model.stride
        low = (max(height // stride, 1) * stride, max(width // stride, 1) * stride)
        high = (-(-height // stride) * stride, -(-width // stride) * stride)
        _require(
            height % stride == 0 and width % stride == 0,
            f"image size {height}x{width} is not a multiple of {stride}, the model's stride; "
            f"use --data.image-size {low[0]} {low[1]} or {high[0]} {high[1]}",
        )
        _require(
            channels == self.model.channels,
            f"the images have {channels} channel{'s' * (channels != 1)}, the model "
            f"{type(self.model).__name__} takes {self.model.channels}; "
            f"use --data.channels {self.model.channels} or --model.channels {channels}",
        )


def with_training(experiment: Experiment, **fields: Any) -> Experiment:
    """The experiment with fields of its `training` replaced."""
    return dataclasses.replace(
        experiment, training=dataclasses.replace(experiment.training, **fields)
    )


def to_json(experiment: Experiment) -> dict[str, Any]:
    """The experiment as JSON values; models and degradations carry their registered `type`.

    Raises:
      ConfigError: a field of the model or the degradation has no form in JSON.
    """
    model = models.hyperparameters(experiment.model)
    description = {
        "name": experiment.name,
        "model": {
            "type": type(experiment.model).__name__,
            **{name: _encode(value) for name, value in model.items()},
        },
        "degradation": _encode(experiment.degradation),
        "data": _encode_fields(experiment.data),
        "optimizer": _encode_fields(experiment.optimizer),
        "training": _encode_fields(experiment.training),
        "run_dir": experiment.run_dir and os.fspath(experiment.run_dir),
    }
    try:
        json.dumps(description)
    except TypeError as error:
        raise ConfigError(
            f"a checkpoint could not describe this experiment: {error}; "
            "use Python's numbers, strings and tuples for its fields"
        ) from error
    return description


def with_defaults(description: Mapping[str, Any]) -> dict[str, Any]:
    """A description in which settings that aecore did not have yet have their defaults."""
    filled = dict(description)
    for name, kind in (("data", Data), ("optimizer", Optimizer), ("training", Training)):
        if isinstance(filled.get(name), Mapping):
            filled[name] = _encode_fields(kind()) | filled[name]
    return filled


def model_from_json(description: Mapping[str, Any]) -> Any:
    """Rebuilds the model of an experiment's description, from the registry.

    Raises:
      ConfigError: it is not registered, or a field is unknown or invalid.
    """
    with _described():
        return _build(description["model"], models.REGISTRY, "model", "aecore.models")


def from_json(
    description: Mapping[str, Any],
    *,
    model: Any = None,
) -> Experiment:
    """Rebuilds an experiment. Nothing named in `description` is imported or run.

    Args:
      description: what `to_json` returned; other keys are ignored.
      model: used in place of the described model; needed if that one isn't registered.

    Raises:
      ConfigError: a model or degradation is not registered, or a field is unknown or invalid.
    """
    model = model_from_json(description) if model is None else model
    with _described():
        return Experiment(
            name=description["name"],
            model=model,
            degradation=_build(
                description["degradation"],
                degradations.REGISTRY,
                "degradation",
                "aecore.degradations",
            ),
            data=Data(**_decode(description["data"])),
            optimizer=Optimizer(**_decode(description["optimizer"])),
            training=Training(**_decode(description["training"])),
            run_dir=description["run_dir"],
        )


@contextlib.contextmanager
def _described() -> Iterator[None]:
    """What malformed JSON makes go wrong is a ConfigError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"not the description of an experiment: {error!r}") from error


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], ignore: frozenset[str], path: str = ""
) -> list[str]:
    """Lines `path: old -> new` for the fields in which two JSON descriptions differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        name = f"{path}{key}"
        before, after = old.get(key), new.get(key)
        if name in ignore or before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, ignore, f"{name}.")
        else:
            lines.append(f"{name}: {before} -> {after}")
    return lines


def _encode(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, Degradation):
        return {"type": type(value).__name__, **_encode_fields(value)}
    return value


def _encode_fields(value: Any) -> dict[str, Any]:
    return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _decode(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as tuples, nested degradations as objects."""

    def decode(value):
        if isinstance(value, list):
            return tuple(decode(item) for item in value)
        if isinstance(value, Mapping):
            return _build(value, degradations.REGISTRY, "degradation", "aecore.degradations")
        return value

    return {name: decode(value) for name, value in fields.items()}


def _build(fields: Mapping[str, Any], registry: Mapping[str, type], kind: str, home: str) -> Any:
    name = fields["type"]
    if name not in registry:
        raise ConfigError(
            f"{kind} {name!r} is not registered (known: {', '.join(sorted(registry))}); "
            f"register its class with {home}.register"
            + (", or pass model=" if kind == "model" else "")
        )
    return registry[name](**_decode({key: v for key, v in fields.items() if key != "type"}))
