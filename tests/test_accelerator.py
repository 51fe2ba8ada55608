"""
Where tensors are, without an accelerator: fake tensors know their device and nothing else.

PyTorch's CPU build aborts as soon as autograd meets a fake CUDA tensor (it has no device guard for
CUDA), so the accelerator here is a backend in Python, which PyTorch offers for tests. Everything
that would fail on a GPU because two tensors are on different devices fails here as well.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "fake_accelerator.py"
CASES = ["resident", "offloaded", "moved", "mixed", "experts", "mismatch"]


@pytest.mark.parametrize("case", CASES)
def test_tensors_meet_on_one_device(case):
    """In a process of its own: the backend stays registered."""
    done = subprocess.run([sys.executable, SCRIPT, case], capture_output=True, text=True)
    if case == "mismatch":  # the check itself can fail
        assert "FakeTensorDeviceMismatchError" in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        *_, copies, device = done.stdout.splitlines()
        assert device == "accel:0"
        if case == "resident":  # the step sizes, once
            assert copies == "copies in each step: 1 0 0"


def test_the_package_names_no_vendor():
    """What computes asks `torch.accelerator`; some files tell one vendor's hardware from others."""
    package = Path(__file__).parent.parent / "autoround_modifier"
    tell = {"engines/environment.py", "planning/hardware.py", "evaluation/tasks.py"}
    named = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "torch.cuda" in path.read_text()
    }
    assert named <= tell
