"""Ctrl-C and SIGTERM, from a command's first imports on."""

import pytest
from conftest import run_program

ASK = "import os, signal, time\nos.kill(os.getpid(), signal.{})\ntime.sleep(5)\n"

# Where the tests run in the background, a shell may have told them to ignore it.
START = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("importing", [True, False])
def test_a_command_that_has_not_begun_ends_in_one_line(number, importing, tmp_path):
    ask = ASK.format(number)
    (tmp_path / "slow.py").write_text(ask)
    program = START + "from aecore.cli import main\n" + ("import slow\n" if importing else ask)
    done = run_program(program, tmp_path)
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


def test_a_library_that_turns_ctrl_c_into_an_error_of_its_own():
    program = f"""{START}
from aecore.cli import main
try:
    {"; ".join(ASK.format("SIGINT").splitlines())}
except KeyboardInterrupt:
    raise ImportError("can't be loaded")
"""
    done = run_program(program)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_program_that_trains_keeps_its_own_ways():
    done = run_program(
        "import signal, sys\n"
        "def ways():\n"
        "    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]\n"
        "    return [*handlers, sys.excepthook, sys.unraisablehook]\n"
        "before = ways()\n"
        "import aecore.training.loop\n"
        "assert ways() == before\n"
    )
    assert done.returncode == 0, done.stderr
