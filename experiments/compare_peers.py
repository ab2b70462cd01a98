"""Speed of networks in aecore, Keras and PyTorch, on one machine and the same batch.

    python experiments/compare_peers.py --task denoise --batch-size 256
    python experiments/compare_peers.py --task denoise --measure restore
    python experiments/compare_peers.py --task photo --batch-size 16 --side 64
    python experiments/compare_peers.py --measure restore --network photo-denoise --side 321

The first measures training steps. The second measures restoring many images: `Restorer` on uint8
and on float images, ONNX Runtime with the same network (`pip install ".[onnx]" onnxruntime`), and
Keras's `predict`.

The networks are those of the two recipes, and of task photo a UNet for photographs, which is not
compared with Keras; neither are networks given by name, which restore `--batch-size` images a call.

The images are made in memory beforehand, so no input pipeline is measured except the one of Keras's
`fit`. The libraries run in turns, several times for some seconds each. The median, lowest and
highest speeds are printed, and the ratio of aecore's median to the others'. A step is: add noise
and clip (denoise only), forward, mean squared error, backward, Adam. aecore does one step per call,
as the others do. For denoise it is also measured with several steps per call, as its training loop
does when steps are short.

Keras runs on TensorFlow: once as `fit` does it, compiled with XLA, and once as a `tf.function`
written by hand, without XLA. PyTorch is measured where it is installed, in its default layout and
in channels-last; compiled with `torch.compile` on GPUs, and under autocast with `--precision
bfloat16`.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
import tyro

Step = Callable[[], object]
"""Does a step; `float` waits for its result."""

SHAPES = {"denoise": (28, 28, 1), "enhance": (80, 80, 3), "photo": (64, 64, 3)}
FEATURES = (32, 64, 96)
"""Of the UNet of task photo, whose finest level has half the image's resolution."""
SIGMA = 0.4
STEPS = 8
"""Steps per call, where there are several."""


def aecore_network(task: str, features: tuple[int, ...] = FEATURES):
    """The network in aecore."""
    from aecore import models

    if task == "photo":
        return models.UNet(features, channels=3, patch=2)
    return models.NoiseReducer() if task == "denoise" else models.ResolutionEnhancer()


def aecore_step(task: str, images: np.ndarray, precision: str, *, several: bool = False) -> Step:
    """aecore's training step compiled by `jit`, or several steps as one program."""
    import jax

    import aecore
    from aecore.degradations import GaussianNoise
    from aecore.training import assembly

    denoise = task == "denoise"
    experiment = aecore.Experiment(
        name=task,
        model=aecore_network(task),
        degradation=GaussianNoise(SIGMA),
        training=aecore.Training(batch_size=len(images), precision=precision),
    )
    devices = assembly.devices(experiment.training)
    parts = assembly.assemble(
        experiment, images.shape[1:], devices, last_step=1, degrades_on_device=denoise
    )
    floats = images.astype(np.float32) / 255
    batch = images if denoise else (floats, floats)
    state = devices.compile_create(parts.create)()
    if several:
        step = devices.compile_train_steps(parts.train_step, STEPS)
        batches = jax.tree.map(lambda array: array[None], batch)
        arguments = devices.shard_batch(batches, axis=1), devices.replicate(np.int32(STEPS))
    else:
        step = devices.compile_train_step(parts.train_step)
        arguments = (devices.shard_batch(batch),)

    def take():
        nonlocal state
        state, loss = step(state, *arguments)
        return loss[-1] if several else loss

    jax.block_until_ready(arguments)
    return take


def keras_network(task: str):
    """The network in Keras."""
    import keras

    conv = dict(kernel_size=3, padding="same", activation="relu")
    layers = keras.layers
    if task == "denoise":
        network = [
            layers.Conv2D(16, strides=2, **conv),
            layers.Conv2D(8, strides=2, **conv),
            layers.Conv2DTranspose(8, strides=2, **conv),
            layers.Conv2DTranspose(16, strides=2, **conv),
            layers.Conv2D(1, 3, padding="same", activation="sigmoid", dtype="float32"),
        ]
    else:
        network = [
            layers.Conv2D(256, **conv),
            layers.Conv2D(128, **conv),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, **conv),
            layers.Conv2D(64, **conv),
            layers.UpSampling2D(2),
            layers.Conv2D(128, **conv),
            layers.Conv2D(256, **conv),
            layers.Conv2D(3, 3, padding="same", dtype="float32"),
        ]
    return keras.Sequential([keras.Input((None, None, SHAPES[task][2])), *network])


def keras_step(task: str, images: np.ndarray, precision: str, *, fit: bool) -> Step:
    """Keras on TensorFlow: the function that `fit` makes and calls, or a hand-written one."""
    import keras
    import tensorflow as tf

    if precision == "bfloat16":
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = keras_network(task)
    model.compile(optimizer=keras.optimizers.Adam(1e-3), loss="mse")
    original = tf.constant(images.astype(np.float32) / 255)

    def pair():
        degraded = original
        if task == "denoise":
            noise = tf.random.normal(original.shape, stddev=SIGMA)
            degraded = tf.clip_by_value(original + noise, 0.0, 1.0)
        return degraded, original

    if fit:
        model.make_train_function()
        dataset = tf.data.Dataset.from_tensors(0).repeat().map(lambda _: pair()).prefetch(2)
        batches = iter(dataset)
        return lambda: model.train_function(batches)["loss"]

    @tf.function
    def step():
        degraded, original = pair()
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(degraded, training=True) - original))
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        model.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return loss

    model.optimizer.build(model.trainable_variables)
    return step


def torch_unet(features: tuple[int, ...]):
    """aecore's `UNet` with one block a level and patches of 2, in PyTorch."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

        def forward(self, images):
            return images + self.second(torch.relu(self.first(torch.relu(images))))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            steps = list(itertools.pairwise(features))
            self.input = nn.Conv2d(12, features[0], 3, padding=1)
            self.encoder = nn.ModuleList(Block(width) for width in features)
            self.decoder = nn.ModuleList(Block(width) for width in features)
            self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in steps)
            double = dict(stride=2, padding=1, output_padding=1)
            self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 3, **double) for a, b in steps)
            self.output = nn.Conv2d(features[0], 12, 3, padding=1)

        def forward(self, images):
            phases = nn.functional.pixel_unshuffle(images, 2)
            level, levels = self.input(phases), []
            for index, block in enumerate(self.encoder):
                level = block(self.down[index - 1](level) if index else level)
                levels.append(level)
            for index in reversed(range(len(features))):
                if index < len(features) - 1:
                    level = self.up[index](level) + levels[index]
                level = self.decoder[index](level)
            return nn.functional.pixel_shuffle(phases + self.output(level), 2)

    return Network()


def torch_step(task: str, images: np.ndarray, precision: str, *, channels_last: bool) -> Step:
    """PyTorch: eager on a CPU, compiled on a GPU."""
    import torch
    from torch import nn

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if task == "denoise":
        half = dict(kernel_size=3, stride=2)
        double = dict(kernel_size=3, stride=2, padding=1, output_padding=1)
        network = nn.Sequential(
            # "Same" padding of a strided convolution, as in XLA and Keras.
            nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(1, 16, **half), nn.ReLU()),
            nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(16, 8, **half), nn.ReLU()),
            nn.Sequential(nn.ConvTranspose2d(8, 8, **double), nn.ReLU()),
            nn.Sequential(nn.ConvTranspose2d(8, 16, **double), nn.ReLU()),
            nn.Sequential(nn.Conv2d(16, 1, 3, padding=1), nn.Sigmoid()),
        )
    elif task == "photo":
        network = torch_unet(FEATURES)
    else:
        widths = [3, 256, 128, 64, 64, 128, 256, 3]
        convs = [nn.Conv2d(i, o, 3, padding=1) for i, o in itertools.pairwise(widths)]
        layers = [layer for conv in convs[:-1] for layer in (conv, nn.ReLU())]
        layers.insert(8, nn.Upsample(scale_factor=2))
        layers.insert(4, nn.MaxPool2d(2))
        network = nn.Sequential(*layers, convs[-1])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = network.to(device=device, memory_format=layout)
    original = torch.from_numpy(images.astype(np.float32).transpose(0, 3, 1, 2) / 255)
    original = original.to(device=device).contiguous(memory_format=layout)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=device == "cuda")

    def loss_of(original):
        degraded = original
        if task == "denoise":
            degraded = (original + SIGMA * torch.randn_like(original)).clamp(0, 1)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            restored = network(degraded)
        return torch.nn.functional.mse_loss(restored.float(), original)

    if device == "cuda":
        loss_of = torch.compile(loss_of)

    def step():
        optimizer.zero_grad()
        loss = loss_of(original)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def restorer_of(task: str, network: str | None):
    """A `Restorer` of a trained network, or of the task's, untrained."""
    import jax

    import aecore

    if network is not None:
        return aecore.Restorer.load(network)
    model = aecore_network(task)
    params = model.init(jax.random.key(0), np.zeros((1, *SHAPES[task]), np.float32))["params"]
    return aecore.Restorer.of(model, params)


def aecore_restore(restorer, images: np.ndarray, dtype: str) -> Step:
    """`Restorer` on all images."""
    if dtype == "float32":
        images = images.astype(np.float32) / 255
    return lambda: restorer(images)[0, 0, 0, 0]


def onnx_restore(restorer, images: np.ndarray) -> Step:
    """The network, exported by aecore, in ONNX Runtime."""
    import onnxruntime

    from aecore.saved import exported

    session = onnxruntime.InferenceSession(exported.as_onnx(restorer.trained))
    name = session.get_inputs()[0].name
    floats = images.astype(np.float32) / 255
    return lambda: session.run(None, {name: floats})[0][0, 0, 0, 0]


def keras_restore(task: str, images: np.ndarray, batch_size: int) -> Step:
    """Keras's `predict` on all images."""
    model = keras_network(task)
    floats = images.astype(np.float32) / 255
    return lambda: model.predict(floats, batch_size=batch_size, verbose=0)[0, 0, 0, 0]


def main(
    task: Literal["denoise", "enhance", "photo"] = "denoise",
    measure: Literal["train", "restore"] = "train",
    batch_size: int = 256,
    side: int | None = None,
    network: str | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    seconds: float = 4.0,
    repeats: int = 7,
    without: tuple[str, ...] = (),
) -> None:
    """Prints images per second and their ratios.

    Args:
        task: The recipe whose network is measured, or photo for a network for photographs.
        measure: Training steps, or restoring many images.
        batch_size: Images per step; in restoring, Keras's batch size.
        side: Height and width of the images in pixels; by default the recipe's.
        network: A trained network to restore with: the name of one that ships, or a run.
        precision: Precision in which the networks compute.
        seconds: Length of each measurement.
        repeats: Number of measurements of each library.
        without: Libraries to leave out: keras, torch, onnx.
    """
    if network and measure != "restore":
        raise SystemExit("--network can only be measured restoring; add --measure restore")
    restorer = restorer_of(task, network) if measure == "restore" else None
    count, channels = batch_size, SHAPES[task][2]
    if restorer and network:
        channels = restorer.trained.network.channels
    elif restorer:
        count = max(batch_size, 2048 if task == "denoise" else 64)
    side = side or SHAPES[task][0]
    shape = (count, side, side, channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    args = (task, images, precision)
    several = f"aecore, {STEPS} steps a call"
    makers = {
        "aecore": lambda: aecore_step(*args),
        **({several: lambda: aecore_step(*args, several=True)} if task == "denoise" else {}),
        "Keras, fit": lambda: keras_step(*args, fit=True),
        "Keras, tf.function": lambda: keras_step(*args, fit=False),
        "PyTorch": lambda: torch_step(*args, channels_last=False),
        "PyTorch, channels last": lambda: torch_step(*args, channels_last=True),
    }
    if measure == "restore":
        makers = {
            "aecore": lambda: aecore_restore(restorer, images, "uint8"),
            "aecore, floats": lambda: aecore_restore(restorer, images, "float32"),
            "ONNX Runtime": lambda: onnx_restore(restorer, images),
            "Keras, predict": lambda: keras_restore(task, images, batch_size),
        }
    steps = {}
    for name, make in makers.items():
        library = name.split(",")[0].split()[0].lower().replace("py", "")
        if library in without or (library == "keras" and (network or task == "photo")):
            continue
        try:
            steps[name] = make()
        except ImportError as error:
            print(f"{name} is skipped: {error}")
    speeds = {name: [] for name in steps}
    for name in itertools.chain.from_iterable([*steps] for _ in range(repeats + 1)):
        float(steps[name]())
        start, done, result = time.perf_counter(), 0, 0.0
        while time.perf_counter() - start < seconds:
            for _ in range(4 if (task, measure) == ("denoise", "train") else 1):
                result = steps[name]()
                done += STEPS * count if name == several else count
            float(result)
        speeds[name].append(done / (time.perf_counter() - start))
    print(
        f"{network or task}, {measure}, {side}x{side}, batch {batch_size}, {precision}, "
        f"{repeats} times {seconds:g} s each"
    )
    reference = statistics.median(speeds["aecore"][1:])
    for name, values in speeds.items():
        measured = values[1:]  # The first one warms up.
        median = statistics.median(measured)
        ratios = [a / b for a, b in zip(speeds["aecore"][1:], measured, strict=True)]
        print(
            f"{name:24}{median:10,.5g} images/s ({min(measured):,.5g} to {max(measured):,.5g})"
            + (
                f"   aecore makes {reference / median:.2f} times as many "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
                if name != "aecore"
                else ""
            )
        )


if __name__ == "__main__":
    tyro.cli(main)
