"""`make gpu-check` without an accelerator: what it counts, reports and survives."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_block
import gpu_check
from device_counts import count_events

EVENTS = [
    {"ph": "X", "cat": "kernel", "name": "gemm", "dur": 3000},
    {"ph": "X", "cat": "kernel", "name": "gemm", "dur": 1000},
    {"ph": "X", "cat": "kernel", "name": "sign", "dur": 500},
    {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD (Pageable -> Device)"}
    | {"dur": 7, "args": {"bytes": 4096}},
    {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)"}
    | {"dur": 7, "args": {"bytes": 100}},
    {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "dur": 7},
    {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)", "dur": 7},
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaStreamSynchronize", "dur": 9},
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 9},
    {"ph": "i", "cat": "kernel", "name": "an instant"},
    {"ph": "M", "name": "process_name"},
]

JUNIT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.gpu" name="test_one" time="1.5"><properties>
<property name="integers that differ" value="3 of 10"/></properties></testcase>
<testcase classname="tests.gpu" name="test_two" time="0.5">
<failure message="assert 3 == 0">traceback</failure></testcase>
</testsuite></testsuites>"""


def test_a_trace_is_counted_per_step():
    counts = count_events(EVENTS, steps=2)
    assert (counts.kernels, counts.kernel_ms) == (1.5, 2.25)
    assert (counts.copies_to_device, counts.bytes_to_device) == (1, 2098)
    assert (counts.copies_from_device, counts.waits) == (0.5, 0.5)
    assert counts.longest == [("gemm", 1, 2), ("sign", 0.5, 0.25)]


def test_results_of_tests_are_read(tmp_path):
    path = tmp_path / "tests.xml"
    assert gpu_check.read_tests(path) == []
    path.write_text(JUNIT)
    one, two = gpu_check.read_tests(path)
    assert (one.name, one.outcome, one.seconds) == ("test_one", "passed", 1.5)
    assert one.properties == {"integers that differ": "3 of 10"}
    assert (two.outcome, two.message) == ("failed", "assert 3 == 0")


def test_steps_fail_and_are_stopped_one_by_one(tmp_path):
    check = gpu_check.Check(tmp_path, 60, tmp_path / "site")
    assert check.run("failing", "-c", "print(1); raise SystemExit(3)", limit=30) == "1\n"
    check.run("endless", "-c", "import time; time.sleep(60)", limit=2)
    check.run("passing", "-c", "import os; print(os.environ['HF_HUB_OFFLINE'])", limit=30)
    outcomes = [step.outcome for step in check.steps]
    assert outcomes == ["failed with exit code 3", "stopped after 2 s", "passed"]
    log = (tmp_path / "gpu_check.log").read_text()
    assert log.startswith("1\n")
    assert log.endswith("1\n")
    assert "| endless | stopped after 2 s |" in gpu_check.markdown("a card", check.steps, [], "")


def test_a_block_is_measured(tmp_path, capsys):
    shape = "--hidden 128 --intermediate 256 --heads 4 --kv-heads 2 --samples 8 --length 16"
    path = tmp_path / "block.json"
    options = "--batch 4 --steps 2 --warmup 1 --formats w2 --no-compile --device cpu"
    gpu_block.main([*shape.split(), *options.split(), "--output", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["store"] for row in rows] == ["device", "host"]
    for row in rows:
        assert not row["compiled"]
        assert min(row["step_ms"], row["floor_ms"], row["masked_floor_ms"], row["search_s"]) > 0
        assert row["peak_gib"] is None
    table = path.with_suffix(".md").read_text()
    assert table in capsys.readouterr().out
    assert "| w2 (not compiled) |" in table


def test_recipes_of_the_gpu_tests_are_not_refused():
    """Nobody runs them between two accelerators: those for mixtures were refused unnoticed."""
    tests = ["tests/gpu/test_gpu.py", "-k", "mixture and (asymmetric or W8A8 or NVFP4)"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "GPU_TESTS_DEVICE": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
    assert "3 passed" in result.stdout
