"""Every example runs offline on the packaged model with ``--tiny``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "smollm2")


@pytest.mark.smollm2
@pytest.mark.parametrize("name", EXAMPLES)
def test_runs(name, tmp_path):
    script = ROOT / "examples" / f"{name}.py"
    output = tmp_path / "model"
    command = [sys.executable, str(script), "--tiny", "--output", str(output)]
    environment = os.environ | {"LLAMA_CPP_ROOT": str(ROOT / "tests" / "fake_llama_cpp")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (output / "config.json").exists()
    assert (output / "recipe.yaml").exists()
