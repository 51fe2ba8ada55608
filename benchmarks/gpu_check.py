"""
Checks this package on an accelerator: the tests marked `gpu`, and the cost of tuning one block.

    make gpu-wheels    # where package indexes can be reached, of Python 3.12 on x86-64 Linux
    make gpu-check     # on the machine with the accelerator, without network

That machine needs Python 3.12 with PyTorch 2.10 or newer, Transformers, Accelerate, pandas, pyarrow
and pytest, as ordinary images have them. What they lack is installed from the wheels into a folder
of its own. Each step runs even if one before it failed; the exit code says whether one did.

Writes `gpu_check.json` and `gpu_check.md`, and beside them what the steps printed
(`gpu_check.log`) and measured (`gpu_block.json`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MESSAGE = 600  # characters of a failure that are printed
GRACE = 15  # seconds between an interruption and the end
DESCRIPTION = """
import platform, sys, torch
name = torch.accelerator.current_accelerator(check_available=True)
module = None if name is None else torch.get_device_module(name)
print("Python", sys.version.split()[0], "on", platform.platform())
print("PyTorch", torch.__version__, "CUDA", torch.version.cuda)
print("accelerator:", "none" if module is None else module.get_device_name())
import transformers, compressed_tensors, llmcompressor, autoround_modifier
print("Transformers", transformers.__version__, "LLM-Compressor", llmcompressor.__version__)
print("compressed-tensors", compressed_tensors.__version__)
print("autoround_modifier", autoround_modifier.__version__, autoround_modifier.__file__)
"""


@dataclass
class Step:
    """
    :ivar seconds: it took
    :ivar outcome: ``passed``, ``failed with exit code N`` or ``stopped after N s``
    """

    name: str
    seconds: float
    outcome: str

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


@dataclass
class Test:
    """
    :ivar outcome: ``passed``, ``failed``, ``error`` or ``skipped``
    :ivar message: of the failure
    :ivar properties: what the test recorded
    """

    name: str
    seconds: float
    outcome: str
    message: str = ""
    properties: dict[str, str] = field(default_factory=dict)


class Check:
    """
    :param output: folder for results
    :param limit: seconds for all steps together
    :param site: folder of packages that come before those of this Python
    """

    def __init__(self, output: Path, limit: float, site: Path):
        self.output = output
        self.deadline = time.monotonic() + limit
        self.steps: list[Step] = []
        paths = [str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Plugins of the image have no part in these tests.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }

    def run(self, name: str, *arguments: str | Path, limit: float) -> str:
        """
        Run Python; print what it prints, and add that to the log.

        :param limit: seconds, after which it is interrupted
        :return: what it printed
        """
        limit = max(1.0, min(limit, self.deadline - time.monotonic()))
        print(f"== {name}, {limit:.0f} s at most", flush=True)
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=_lead_a_group,
        )
        stopped = threading.Event()

        def stop(signal_number: int) -> None:
            stopped.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal_number)  # with the processes it started

        # An interrupted pytest still writes its results.
        timers = [
            threading.Timer(limit, stop, [signal.SIGINT]),
            threading.Timer(limit + GRACE, stop, [signal.SIGKILL]),
        ]
        for timer in timers:
            timer.start()
        assert process.stdout is not None
        lines = []
        with (self.output / "gpu_check.log").open("a", encoding="utf-8") as log:
            for line in process.stdout:
                lines.append(line)
                log.write(line)
                print(line, end="", flush=True)
        code = process.wait()
        for timer in timers:
            timer.cancel()
        seconds = time.monotonic() - started
        outcome = "passed" if code == 0 else f"failed with exit code {code}"
        if stopped.is_set():
            outcome = f"stopped after {limit:.0f} s"
        self.steps.append(Step(name, seconds, outcome))
        print(f"== {name}: {outcome}, {seconds:.0f} s", flush=True)
        return "".join(lines)


def _lead_a_group() -> None:
    """In the child: a process group of its own, that can be interrupted."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_tests(path: Path) -> list[Test]:
    """:param path: a JUnit file that pytest wrote; no tests if there is none"""
    if not path.exists():
        return []
    tests = []
    for case in ElementTree.parse(path).iter("testcase"):
        test = Test(case.get("name", ""), float(case.get("time", 0)), "passed")
        for kind, outcome in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
            for element in case.iter(kind):
                test.outcome, test.message = outcome, element.get("message", "")
        for element in case.iter("property"):
            test.properties[element.get("name", "")] = element.get("value", "")
        tests.append(test)
    return tests


def markdown(description: str, steps: list[Step], tests: list[Test], table: str) -> str:
    lines = ["```", description.strip(), "```", "", "| step | outcome | s |", "| --- | --- | --- |"]
    lines += [f"| {step.name} | {step.outcome} | {step.seconds:.0f} |" for step in steps]
    if tests:
        lines += ["", "| test | outcome | s | recorded |", "| --- | --- | --- | --- |"]
    for test in tests:
        recorded = "; ".join(f"{name}: {value}" for name, value in test.properties.items())
        lines.append(f"| {test.name} | {test.outcome} | {test.seconds:.1f} | {recorded} |")
    if table:
        lines += ["", table.strip()]
    return "\n".join(lines) + "\n"


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--wheels", type=Path, required=True, help="folder of wheels")
    parser.add_argument("--site", type=Path, required=True, help="where they are installed")
    parser.add_argument("--output", type=Path, required=True, help="folder for results")
    parser.add_argument("--limit", type=float, default=510, help="seconds for everything")
    parser.add_argument("--tests", default="tests/gpu", help="arguments of pytest, in one text")
    parser.add_argument("--block", default="", help="arguments of gpu_block.py, in one text")
    arguments = parser.parse_args(given)
    output, site = arguments.output.resolve(), arguments.site.resolve()
    output.mkdir(parents=True, exist_ok=True)
    for name in ("gpu_check.log", "gpu_block.json", "gpu_block.md"):
        (output / name).unlink(missing_ok=True)
    check = Check(output, arguments.limit, site)

    wheels = sorted(arguments.wheels.resolve().glob("*.whl"))
    if wheels:
        shutil.rmtree(site, ignore_errors=True)
        pip = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        check.run("install", *pip, "--no-cache-dir", "--target", site, *wheels, limit=90)
    else:
        print(f"no wheels in {arguments.wheels}: nothing is installed", flush=True)
    description = check.run("machine", "-c", DESCRIPTION, limit=90)
    junit = output / "tests.xml"
    junit.unlink(missing_ok=True)
    pytest = ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-v", "--durations=10"]
    pytest += ["--show-capture=no", "--tb=short", "-o", "junit_family=legacy"]
    check.run("tests", *pytest, f"--junitxml={junit}", *shlex.split(arguments.tests), limit=270)
    block = output / "gpu_block.json"
    script = ROOT / "benchmarks" / "gpu_block.py"
    check.run("block", script, "--output", block, *shlex.split(arguments.block), limit=240)

    tests = read_tests(junit)
    junit.unlink(missing_ok=True)
    table = block.with_suffix(".md")
    text = table.read_text(encoding="utf-8") if table.exists() else ""
    result = {
        "machine": description,
        "steps": [asdict(step) for step in check.steps],
        "tests": [asdict(test) for test in tests],
        "block": json.loads(block.read_text(encoding="utf-8")) if block.exists() else None,
    }
    (output / "gpu_check.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    report = markdown(description, check.steps, tests, text)
    (output / "gpu_check.md").write_text(report, encoding="utf-8")
    print(report, flush=True)
    for test in tests:
        if test.outcome in ("failed", "error"):
            print(f"{test.name}: {test.message[:MESSAGE]}", flush=True)
    return 0 if all(step.passed for step in check.steps) else 1


if __name__ == "__main__":
    sys.exit(main())
