"""`Experiment` and its parts, which are also the command line of an experiment file.

A field's path is its flag, its docstring the flag's help.
"""

import dataclasses
import math
import os
import re
from typing import Annotated, Any, Literal

import tyro

from aecore.config import settings
from aecore.config.settings import OnResume, setting
from aecore.degradations import Degradation
from aecore.errors import ConfigError
from aecore.metrics import SSIM_WINDOW


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _as_text(settings: Any, name: str, owner: str = "") -> None:
    """Lets a path be given as an object; what is stored is text. Refuses an empty one."""
    value = getattr(settings, name)
    _require(value != "", f"{owner}{name} is empty; name a folder, or leave it out")
    if isinstance(value, os.PathLike):
        object.__setattr__(settings, name, os.fspath(value))


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from, and what training takes of them."""

    dataset: str = "sample"
    """sample, fashion_mnist, lfw, folder, pairs, or the name of any TFDS dataset with images.
    pairs: DIR/degraded and DIR/original hold images with the same names."""
    data_dir: Annotated[str | None, tyro.conf.arg(aliases=["--data"])] = setting(
        None, on_resume=OnResume.FREE, of_host=True
    )
    """Folder of prepared TFDS data, of IDX files, or of images; None: TFDS's own folder."""
    image_size: tuple[int, int] | None = setting(None, at_least=1)
    """Height and width to resize whole images to; None: their own, if they all have one size."""
    crop: int | tuple[int, int] | None = setting(None, at_least=1)
    """Size of the random crops to train on, at full resolution: one side, or height and width. Of
    pairs, the size in the originals. None: train on whole images."""
    crops_per_image: int = setting(1, at_least=1)
    """Crops of each image in an epoch."""
    small: Literal["skip", "pad"] = "skip"
    """What to do with images smaller than the crop. skip: leave them out. pad: mirror them at their
    lower and right edges until they are large enough."""
    turn: bool = False
    """Mirror and turn each crop at random, in one of eight ways; needs square crops."""
    channels: Literal[1, 3] | None = None
    """1 for gray, 3 for RGB; None: as in the source, or RGB for crops of files."""
    resize: Literal["antialiased", "bilinear"] = "antialiased"
    """How whole images are resized. antialiased: bicubic, averaging all pixels that a new one
    covers. bilinear: from the 4 nearest pixels, as OpenCV does by default."""
    validation_fraction: float = setting(0.1, above=0, below=1)
    """Share of the images held out for validation, where the source has no split of its own."""
    split_seed: int = setting(0, at_least=0)
    """Seed of the choice of held-out images."""
    memory_limit: float | None = setting(None, at_least=0, on_resume=OnResume.FREE, of_host=True)
    """GiB of decoded images to keep in memory; None: a quarter of the machine's memory. More whole
    images go to a temporary file; more crops are decoded each time."""

    def __post_init__(self):
        _as_text(self, "data_dir", "data.")
        settings.check(self, "data.")
        _require(
            self.data_dir is None or self.dataset != "sample",
            f"data.data_dir {self.data_dir} is not read by dataset sample; use --data.dataset "
            "folder for a folder of images",
        )
        _require(
            self.crop is None or self.image_size is None,
            f"data.crop {self.crop} is for full resolution, data.image_size {self.image_size} for "
            "whole images; use one of them",
        )
        for name in ("crops_per_image", "turn"):
            _require(
                self.crop is not None or getattr(self, name) == getattr(Data, name),
                f"data.{name} {getattr(self, name)} is for crops; choose their size with data.crop",
            )
        _require(
            not self.turn or len(set(self.crop_size or ())) == 1,
            f"data.turn needs square crops, not data.crop {self.crop}",
        )

    @property
    def crop_size(self) -> tuple[int, int] | None:
        """Height and width of a crop."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Adam (Kingma and Ba, 2015), or AdamW (Loshchilov and Hutter, 2019)."""

    learning_rate: float = setting(1e-3, above=0)
    """Step size; with a schedule, its highest value."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: the learning rate falls along half a cosine and reaches 0 after the last step."""
    warmup_steps: int = setting(0, at_least=0)
    """Steps during which the learning rate rises linearly, at most half of all steps."""
    weight_decay: float = setting(0.0, at_least=0)
    """Above 0, AdamW is used: each step shrinks the kernels, but not biases and scales, by this
    times the learning rate."""
    clip_norm: float | None = setting(None, above=0)
    """Largest global norm of the gradients; larger gradients are scaled down. None: no limit."""
    ema: float | None = setting(None, above=0, below=1)
    """Decay of an exponential moving average of the parameters, which is then used for evaluating
    and restoring; at step n at most (1 + n) / (10 + n). None: no average."""

    def __post_init__(self):
        settings.check(self, "optimizer.")


@dataclasses.dataclass(frozen=True)
class Training:
    """How long to train, in what batches, and what to keep."""

    batch_size: int = setting(32, at_least=1)
    """Images per step, over all devices."""
    epochs: int = setting(10, at_least=1, on_resume=OnResume.SAME_RATES)
    """Passes over the training images. The last incomplete batch of each pass is dropped."""
    steps: int | None = setting(None, at_least=1, on_resume=OnResume.SAME_RATES)
    """Stop after this many steps, if that is before the end of the last epoch."""
    patience: int | None = setting(None, at_least=1, on_resume=OnResume.FREE)
    """Stop after this many epochs in a row without a better validation loss; None: never."""
    min_delta: float = setting(0.0, at_least=0, on_resume=OnResume.FREE)
    """How much the validation loss must fall to count as better."""
    seed: int = setting(0, at_least=0, below=2**32)
    """Seed of the initial parameters, of the images' order, and of the noise."""
    start_from: str | None = None
    """Start from the parameters of a run, of an exported file, or of weights that ship with aecore.
    Their network must be of the model's class; unless --model flags say otherwise, its settings are
    used. None: start from random parameters."""
    loss: Literal["mse", "mae", "charbonnier", "ms_ssim_l1", "log_mse"] = "mse"
    """Training loss; see aecore.losses. The best checkpoint is always chosen by MSE."""
    flip: bool = False
    """Mirror each training image left to right with probability 1/2."""
    checkpoint_every: int = setting(1000, at_least=1, on_resume=OnResume.FREE)
    """Steps between checkpoints. The end of each epoch is saved as well."""
    keep: int = setting(3, at_least=1, on_resume=OnResume.FREE)
    """How many of the newest checkpoints to keep. The best by validation loss is always kept."""
    log_every: int = setting(50, at_least=1, on_resume=OnResume.FREE)
    """Steps averaged in one line of metrics.jsonl. Several processes look only then whether one of
    them was asked to stop."""
    feed: Literal["stream", "resident"] = setting("stream", on_resume=OnResume.FREE)
    """stream: tf.data sends batches to the devices. resident: the devices hold all images, and one
    call does many steps."""
    degrade_on: Literal["host", "device"] = setting("host", on_resume=OnResume.FREE)
    """Where streamed images are degraded. Resident images are always degraded on the device."""
    precision: Literal["float32", "bfloat16"] = setting("float32", on_resume=OnResume.FREE)
    """Precision of the network's computation. Parameters, optimizer and loss are float32."""
    accumulation: int | None = setting(None, at_least=1, on_resume=OnResume.FREE)
    """Compute each device's share of a batch in this many parts, one after another, to save memory;
    None: 1; on CPUs, as many as make the parts fit their caches."""
    parallel: Literal["jit", "pmap"] = setting("jit", on_resume=OnResume.FREE)
    """How the step is compiled for several devices. The results are the same."""
    devices: int | None = setting(None, at_least=1, on_resume=OnResume.FREE)
    """How many devices to use; None: all."""
    profile: str | None = setting(None, on_resume=OnResume.FREE)
    """FIRST,COUNT: trace COUNT steps from step FIRST on, for XProf and Perfetto, into the run's
    folder profile. FIRST,COUNT,all: on all hosts instead of the first alone."""
    distributed: str | None = setting(None, on_resume=OnResume.FREE, of_host=True)
    """Train together with other processes. auto: on TPU pods, Slurm, Open MPI, Kubernetes.
    HOST:PORT,COUNT,INDEX elsewhere: the first process's address, the number of processes, and this
    one's number, from 0."""
    join_timeout: float = setting(300.0, above=0, on_resume=OnResume.FREE, of_host=True)
    """Seconds to wait at the start until all processes have come."""
    loss_timeout: float = setting(120.0, above=0, on_resume=OnResume.FREE, of_host=True)
    """Seconds without a sign of life after which a process counts as lost, and the others end. Of
    one that was killed they know at once."""

    def __post_init__(self):
        _as_text(self, "start_from")
        settings.check(self, "training.")
        _require(
            self.profile is None or re.fullmatch(r"[1-9]\d*,[1-9]\d*(,all)?", self.profile),
            f"training.profile {self.profile!r} is neither FIRST,COUNT nor FIRST,COUNT,all; use "
            "one such as 101,5",
        )
        if self.distributed not in (None, "auto"):
            host_port, count, index = (*self.distributed.split(","), "", "")[:3]
            _require(
                ":" in host_port
                and host_port.rpartition(":")[2].isdecimal()
                and count.isdecimal()
                and index.isdecimal()
                and int(index) < int(count)
                and self.distributed.count(",") == 2,
                f"training.distributed {self.distributed!r} is neither auto nor "
                "HOST:PORT,COUNT,INDEX; use one such as 10.0.0.1:1234,2,0",
            )
            _require(
                0 < int(host_port.rpartition(":")[2]) < 2**16,
                f"training.distributed {self.distributed!r} has no possible port; use one from 1 "
                "to 65535",
            )

    def last_step(self, images: int) -> int:
        """The step after which training on this many images ends."""
        last = self.epochs * (images // self.batch_size)
        return last if self.steps is None else min(last, self.steps)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment: a model, the degradation it learns to undo, the data, and how to train."""

    name: str = dataclasses.field(metadata=setting(None, on_resume=OnResume.FREE).metadata)
    """Name of the run, and of its directory if run_dir is None."""
    model: Any
    """A Flax Linen module from `aecore.models`, or your own."""
    degradation: Degradation
    """What is done to the images, and what the model learns to undo."""
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    run_dir: str | None = setting(None, on_resume=OnResume.FREE)
    """Directory for checkpoints and results, local or gs://; None: runs/NAME."""

    def __post_init__(self):
        _as_text(self, "run_dir")
        settings.check(self, "")
        _require(bool(self.name), "name is empty; give the experiment a name")
        from aecore.networks import base  # Flax, which whoever has a model has imported.

        base.check_module(self.model)
        _require(
            isinstance(self.degradation, Degradation),
            f"degradation {self.degradation!r} is not a Degradation; see aecore.degradations",
        )
        size = self.data.image_size or self.data.crop_size
        if size is not None:
            # How much smaller the degraded ones of pairs are shows when they are loaded.
            is_pairs = self.data.dataset == "pairs"
            scale = self.model_scale // self.degradation.reduction if is_pairs else 1
            self.check_images(*size, self.data.channels or self.model.channels, scale)

    @property
    def directory(self) -> str:
        """The run directory."""
        return self.run_dir or f"runs/{self.name}"

    @property
    def model_scale(self) -> int:
        """How many times larger the model makes images."""
        return getattr(self.model, "scale", 1)

    def check_images(self, height: int, width: int, channels: int, pairs_scale: int = 1) -> None:
        """Raises ConfigError unless the model can learn from images of this size.

        Args:
          height: of the originals, or of the crops of them.
          width: the same.
          channels: 1 or 3.
          pairs_scale: how many times larger than their degraded partners the originals are.
        """
        smaller = self.degradation.reduction * pairs_scale
        _require(
            smaller == self.model_scale,
            f"the degraded images are {smaller} times smaller than the originals, but the model "
            f"{type(self.model).__name__} makes them {self.model_scale} times larger; "
            + (
                f"use --model.scale {smaller}"
                if self.degradation.reduction == 1
                else "use the same scale in both, such as --model.scale 2 --degradation.scale 2"
            ),
        )
        stride = self.model.stride * self.model_scale
        least = math.ceil(SSIM_WINDOW / stride) * stride
        what, flag = ("crop", "crop") if self.data.crop else ("image size", "image-size")
        _require(
            min(height, width) >= SSIM_WINDOW,
            f"{what} {height}x{width} is too small for SSIM; "
            f"use --data.{flag} with at least {least} {least}",
        )
        sizes = {
            tuple(max(least, rounded(side / stride) * stride) for side in (height, width))
            for rounded in (math.floor, math.ceil)
        }
        choices = " or ".join(f"{size[0]} {size[1]}" for size in sorted(sizes))
        of_model = "the model's stride" + (" times its scale" if self.model_scale > 1 else "")
        _require(
            height % stride == 0 and width % stride == 0,
            f"{what} {height}x{width} is not a multiple of {stride}, {of_model}; "
            f"use --data.{flag} {choices}",
        )
        _require(
            channels == self.model.channels,
            f"the images have {channels} channel{'s' * (channels != 1)}, the model "
            f"{type(self.model).__name__} takes {self.model.channels}; "
            f"use --data.channels {self.model.channels} or --model.channels {channels}",
        )
