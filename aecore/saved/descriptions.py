"""What a trained network says of itself, and an experiment as JSON.

Nothing that a description names is imported or run: models and degradations are looked up in their
registries. Settings that a description lacks, since they were added to aecore later, have their
defaults.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from aecore import degradations
from aecore.config import Data, Experiment, Optimizer, Training
from aecore.degradations import Degradation
from aecore.errors import ConfigError
from aecore.saved.checks import CHECKS, OF_RUN
from aecore.storage import absolute

Json = dict[str, Any]

FILE_IN_CHECKPOINT = "description/metadata"
"""Where a checkpoint's folder holds its description, as orbax names what is JSON."""

RANDOM_STREAMS = 2
"""1: by the order in which they are drawn; 2: each by a name."""


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint or an exported file says of its network.

    A field is None where the description lacks it.
    """

    model: Json | None = None
    """`type`, a registered name, and the model's fields."""
    degradation: Json | None = None
    """`type`, a registered name, and the degradation's fields."""
    data: Json | None = None
    optimizer: Json | None = None
    training: Json | None = None
    name: str | None = None
    """The run's."""
    run_dir: str | None = None
    aecore: str | None = None
    """Version that wrote it."""
    image_size: tuple[int, int] | None = None
    """Height and width of the training images."""
    channels: int | None = None
    fingerprint: str | None = None
    """Of the training and validation images."""
    inputs: Json | None = None
    """What the network's inputs are like; see `aecore.restoring.expectations`."""
    started_from: Json | None = None
    """The network that training started from: `source`, as it was named, and the `name` and `step`
    that its description gives."""
    random_streams: int = 1
    """How the random numbers of training are drawn, `RANDOM_STREAMS` when it was written. Runs with
    other ones can't be resumed exactly."""
    step: int | None = None
    """Steps of training done."""
    history: tuple[Json, ...] = ()
    """The evaluations so far: each `step`, `mse`, `psnr`, `ssim`, `images`, and more."""
    metrics: Json | None = None
    """The evaluation at this step, if there was one."""
    checksums: Json | None = None
    """CRC-32 of each of a checkpoint's items."""
    unlogged: tuple[float, ...] = ()
    """Losses of the last steps, which no line of the metrics has averaged yet."""
    seconds: float = 0.0
    """Time so far, of all processes of the run."""
    time: Json | None = None
    """What it was spent on: seconds by activity."""
    images_per_second: float = 0.0

    def __post_init__(self):
        for name, is_right in CHECKS.items():
            value = getattr(self, name)
            if value is not None and not is_right(value):
                raise ValueError(f"the description's {name} can't be {value!r:.80}")

    @classmethod
    def from_json(cls, value: Any, *, of_run: bool = False) -> "Description":
        """Reads a description; keys that this version of aecore doesn't know are ignored.

        Args:
          value: what was read.
          of_run: whether it must have all that a run's checkpoint needs.

        Raises:
          ValueError: says which part is missing or wrong.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"the description can't be {value!r:.80}")
        missing = sorted(OF_RUN - value.keys()) if of_run else []
        if missing:
            raise ValueError(f"the description lacks {', '.join(missing)}")
        known = {field.name for field in dataclasses.fields(cls)}
        given = {name: item for name, item in value.items() if name in known}
        for name in ("image_size", "history", "unlogged"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        return cls(**given)

    def to_json(self) -> Json:
        """JSON values; what is None is left out, but for the metrics."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        given = {name: value for name, value in values.items() if value is not None}
        return given | {"metrics": self.metrics, "history": list(self.history)}

    def without_places(self) -> "Description":
        """Without what has a meaning, and tells something, only on the machine of the training."""

        def without(part: Json | None, *names: str) -> Json | None:
            return None if part is None else {**part, **dict.fromkeys(names)}

        return dataclasses.replace(
            self,
            data=without(self.data, "data_dir"),
            training=without(self.training, "start_from", "distributed"),
            started_from=without(self.started_from, "source"),
            run_dir=None,
            checksums=None,
        )

    def experiment(self, *, model: Any = None) -> Experiment:
        """Rebuilds the experiment.

        Args:
          model: used in place of the described one; needed if that one isn't registered.

        Raises:
          ConfigError: a model or degradation is not registered, or a field is unknown or invalid.
        """
        return experiment_from_json(self.to_json(), model=model)

    def build_model(self) -> Any:
        """Rebuilds the model from the registry.

        Raises:
          ConfigError: it is not registered, or a field is unknown or invalid.
        """
        from aecore import models

        with _described():
            return _build(self.model or {}, models.REGISTRY, "model", "aecore.models")

    def build_degradation(self) -> Degradation:
        """Rebuilds the degradation from the registry.

        Raises:
          ConfigError: there is none, it is not registered, or a field is unknown or invalid.
        """
        if self.degradation is None or (self.data or {}).get("dataset") == "pairs":
            raise ConfigError(
                "what the network was trained to undo is not known: it was trained on pairs, or "
                "says nothing of its training"
            )
        with _described():
            return _degradation(self.degradation)


def describe(experiment: Experiment) -> Json:
    """An experiment as JSON values; models and degradations carry their registered `type`.

    The data folder becomes absolute, so that it is found again from another working directory.

    Raises:
      ConfigError: a field of the model or the degradation has no form in JSON.
    """
    data = _encode_fields(experiment.data)
    if data["data_dir"] is not None:
        data["data_dir"] = os.fspath(absolute(data["data_dir"]))
    description = {
        "name": experiment.name,
        "model": describe_model(experiment.model),
        "degradation": _encode(experiment.degradation),
        "data": data,
        "optimizer": _encode_fields(experiment.optimizer),
        "training": _encode_fields(experiment.training),
        "run_dir": experiment.run_dir,
    }
    try:
        json.dumps(description)
    except TypeError as error:
        raise ConfigError(
            f"a checkpoint could not describe this experiment: {error}; "
            "use Python's numbers, strings and tuples for its fields"
        ) from error
    return description


def describe_model(model: Any) -> Json:
    """A model as JSON values: `type`, its class's name, and its fields."""
    from aecore.networks.base import hyperparameters  # Flax; exported files do without.

    fields = hyperparameters(model)
    return {
        "type": type(model).__name__,
        **{name: _encode(value) for name, value in fields.items()},
    }


def model_changes(described: Mapping[str, Any], model: Any) -> list[str]:
    """How a model differs from a described one, in words, as far as both have the same fields."""

    def shown(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    kind = type(model).__name__
    if described.get("type") != kind:
        return [f"{described.get('type')} -> {kind}"]
    now = describe_model(model)
    return [
        f"{name}: {shown(described[name])} -> {shown(value)}"
        for name, value in now.items()
        if name in described and described[name] != value
    ]


def experiment_from_json(
    description: Mapping[str, Any], *, model: Any = None, like: Any = None
) -> Experiment:
    """Rebuilds an experiment from what `describe` returned; other keys are ignored.

    Args:
      description: of the experiment.
      model: used in place of the described one.
      like: a model of the described class, if that class isn't registered.

    Raises:
      ConfigError: a model or degradation is not registered, or a field is unknown or invalid.
    """
    from aecore import models

    with _described():
        if model is None:
            own = {} if like is None else {type(like).__name__: type(like)}
            registry = models.REGISTRY | own
            model = _build(description["model"], registry, "model", "aecore.models")
        return Experiment(
            name=description["name"],
            model=model,
            degradation=_degradation(description["degradation"]),
            data=Data(**_decode(description["data"])),
            optimizer=Optimizer(**_decode(description["optimizer"])),
            training=Training(**_decode(description["training"])),
            run_dir=description.get("run_dir"),
        )


def changes(
    old: Any, new: Any, path: str = ""
) -> Iterator[tuple[str, dataclasses.Field, Any, Any]]:
    """The settings in which two experiments, or parts of them, differ.

    Yields:
      A field's path, the field, and both values.
    """
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        name = f"{path}{field.name}"
        if before == after or field.name == "parent":
            continue
        same_kind = type(before) is type(after) and dataclasses.is_dataclass(before)
        if same_kind:
            yield from changes(before, after, f"{name}.")
        else:
            yield name, field, before, after


@contextlib.contextmanager
def _described() -> Iterator[None]:
    """Turns what malformed JSON makes fail into a ConfigError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"not the description of an experiment: {error!r}") from error


def _encode(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, Degradation):
        return {"type": type(value).__name__, **_encode_fields(value)}
    return value


def _encode_fields(value: Any) -> Json:
    return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _decode(fields: Mapping[str, Any]) -> Json:
    """JSON's lists as tuples, nested degradations as objects."""

    def decode(value):
        if isinstance(value, list):
            return tuple(decode(item) for item in value)
        return _degradation(value) if isinstance(value, Mapping) else value

    return {name: decode(value) for name, value in fields.items()}


def _degradation(fields: Mapping[str, Any]) -> Degradation:
    return _build(fields, degradations.REGISTRY, "degradation", "aecore.degradations")


def _build(fields: Mapping[str, Any], registry: Mapping[str, type], kind: str, home: str) -> Any:
    name = fields["type"]
    if name not in registry:
        raise ConfigError(
            f"{kind} {name!r} is not registered (known: {', '.join(sorted(registry))}); "
            f"register its class with {home}.register"
            + (", or pass model=" if kind == "model" else "")
        )
    cls = registry[name]
    said = _decode({key: v for key, v in fields.items() if key != "type"})
    return cls(**{**getattr(cls, "unsaid", {}), **said})
