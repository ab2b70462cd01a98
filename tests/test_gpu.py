"""What GPUs are told and asked before they train; XLA takes the same options on a CPU."""

import jax
import pytest

from aecore.steps import gpu
from aecore.steps.devices import Devices


@pytest.fixture(autouse=True)
def anew():
    gpu.initialize.cache_clear()
    gpu.recording.cache_clear()
    yield
    gpu.recording.cache_clear()


@pytest.mark.every_room
def test_convolutions_and_loops_are_recorded():
    device = jax.devices()[0]
    gpu.initialize(device)
    recorded = gpu.recording(device)["xla_gpu_enable_command_buffer"].split(",")
    assert {"CONVOLUTION", "WHILE"} < set(recorded)


def test_the_users_own_choice_is_kept(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_command_buffer=")
    assert gpu.recording(jax.devices()[0]) is None


def test_what_this_xla_does_not_know_is_left_out(monkeypatch, caplog):
    monkeypatch.setattr(gpu, "_RECORDED", "FUSION,TELEPATHY")
    assert gpu.recording(jax.devices()[0]) is None
    assert "steps are not recorded" in caplog.text


@pytest.mark.parametrize(("platform", "count"), [("gpu", 1), ("gpu", 2), ("cpu", 1)])
def test_only_a_single_gpu_records(platform, count, monkeypatch):
    monkeypatch.setattr(Devices, "platform", platform)
    asked = []
    monkeypatch.setattr(gpu, "recording", asked.append)
    step = Devices(jax.devices()[:count]).compile_train_step(lambda *_, axis_name: None)
    assert step is not None
    assert bool(asked) == (platform == "gpu" and count == 1)
