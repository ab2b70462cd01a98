"""What CPUs are told about convolutions, and their memory."""

import ctypes
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import run_program
from jax import lax

from aecore.steps import cpu
from aecore.steps.devices import Devices


@pytest.fixture(autouse=True)
def anew():
    cpu.on_all_cores.cache_clear()
    yield
    cpu.on_all_cores.cache_clear()


@pytest.mark.every_room
def test_the_compiler_computes_convolutions_itself():
    def conv(images, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=layout)

    options = cpu.on_all_cores(jax.devices()[0])
    assert options
    arrays = jnp.zeros((1, 16, 16, 32)), jnp.zeros((3, 3, 32, 32))
    program = jax.jit(conv, compiler_options=options).lower(*arrays).compile().as_text()
    assert "convolution(" in program
    assert "ynn" not in program


def test_the_users_own_choice_is_kept(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    assert cpu.on_all_cores(jax.devices()[0]) is None


def test_what_this_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(cpu, "_FLAG", "xla_cpu_telepathy")
    assert cpu.on_all_cores(jax.devices()[0]) is None


def test_only_cpus_are_told(monkeypatch):
    assert Devices().options
    monkeypatch.setattr(Devices, "platform", "tpu")
    assert Devices().options is None


TOUCHED = """
import resource
from aecore.steps import cpu

cpu.keep_memory()
pages = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(2**26)
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*pages[1:])
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc"
)
def test_memory_is_asked_for_once():
    done = run_program(TOUCHED)
    # Large pages may be touched with fewer faults, but not with so few: 64 MiB are 16,384 of 4 KiB.
    assert max(map(int, done.stdout.split())) < 20, done.stderr
