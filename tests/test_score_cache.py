"""Kept scores: found only by what they depend on, and refused where they cannot be trusted."""

from __future__ import annotations

import importlib.metadata
import json
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

from autoround_modifier import SchemeError
from autoround_modifier.host.versions import library_versions
from autoround_modifier.runs import files
from autoround_modifier.schemes import MeasuredUnit, Measurement, cache
from autoround_modifier.schemes.cache import ScoreCache
from autoround_modifier.schemes.options import named_scheme

LAYERS = ["a", "b", "c"]
SCHEME = named_scheme("W4A16G32")
SCORES = {"a": 0.5, "b": 2}  # no data reached `c`


def new_cache(folder: Path, model: nn.Module | None = None, layers=LAYERS) -> ScoreCache:
    torch.manual_seed(0)
    model = nn.Linear(4, 2) if model is None else model
    return ScoreCache(folder, model, [{"input_ids": torch.ones(1, 3)}], layers, {"seed": 1})


@pytest.fixture
def folder(tmp_path) -> Path:
    new_cache(tmp_path / "cache").keep(SCHEME, SCORES)
    return tmp_path / "cache"


def test_scores_come_back(folder):
    assert new_cache(folder).find(SCHEME) == {"a": 0.5, "b": 2.0}


OTHERS = {
    "package": lambda patch: patch.setattr(cache, "__version__", "9"),
    "code": lambda patch: patch.setattr(cache, "source_digest", lambda *rooms: "another"),
    "torch": lambda patch: patch.setattr(torch, "__version__", "9"),
    "compressed-tensors": lambda patch: patch.setattr("compressed_tensors.__version__", "9"),
    "device": lambda patch: patch.setattr(
        cache, "get_execution_device", lambda module: torch.device("cuda", 3)
    ),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS.keys())
def test_scores_of_another_computation_are_not_found(change, folder, monkeypatch):
    change(monkeypatch)
    assert new_cache(folder).find(SCHEME) is None
    monkeypatch.undo()
    assert new_cache(folder).find(SCHEME) is not None


def test_scores_in_another_dtype_are_not_found(folder):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    model.dtype = torch.bfloat16  # of the model, whose parameters are the same
    assert new_cache(folder, model).find(SCHEME) is None


def test_all_code_that_computes_scores_counts():
    assert cache.COMPUTING_ROOMS == ("blocks", "formats", "schemes", "search")


def test_versions_are_those_that_are_installed():
    versions = library_versions()
    assert set(versions) == {"torch", "compressed-tensors"}
    for name, version in versions.items():
        assert version.split("+")[0] == importlib.metadata.version(name).split("+")[0]


DAMAGES = {
    "NaN": ('{"a": NaN, "b": 2, "c": 1}', "score of a is nan"),
    "infinity": ('{"a": 1e999, "b": 2, "c": 1}', "score of a is inf"),
    "text": ('{"a": "1", "b": 2, "c": 1}', "score of a is '1'"),
    "a truth value": ('{"a": true, "b": 2, "c": 1}', "score of a is True"),
    "a layer is missing": ('{"a": 1, "b": 2}', "other layers: c is in one only"),
    "another layer": ('{"a": 1, "b": 2, "c": 1, "d": 1}', "other layers: d is in one only"),
    "a list": ("[]", "not a mapping"),
    "cut off": ('{"a": 1', "Expecting"),
    "empty": ("", "Expecting value"),
}


@pytest.mark.parametrize(("text", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_not_used(text, reason, folder, log):
    (path,) = folder.iterdir()
    path.write_text(text)
    assert new_cache(folder).find(SCHEME) is None
    (line,) = log
    assert line.startswith(f"WARNING {path} cannot be read, so its scores are measured again")
    assert reason in line


def test_layers_that_no_data_reached_are_written_down(folder):
    (path,) = folder.iterdir()
    assert json.loads(path.read_text()) == {"a": 0.5, "b": 2, "c": None}


def test_scores_of_other_layers_are_not_found(folder):
    assert new_cache(folder, layers=["a", "b"]).find(SCHEME) is None


# ---------------------------------------------------------------------- other users


def test_the_folder_is_for_this_user_alone(folder):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_can_write_to_is_not_used(mode, folder, log):
    folder.chmod(mode)
    assert new_cache(folder).find(SCHEME) is None
    assert "can be written to by other users" in log[0]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    new_cache(folder).keep(SCHEME, SCORES)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert "not kept for another run" in log[1]


def test_a_file_that_others_can_write_to_is_not_used(folder, log):
    (path,) = folder.iterdir()
    path.chmod(0o666)
    assert new_cache(folder).find(SCHEME) is None
    assert str(path) in log[0]


def test_a_folder_of_another_user_is_not_used(folder, monkeypatch, log):
    owner = files.os.getuid()
    monkeypatch.setattr(files.os, "getuid", lambda: owner + 1)
    assert new_cache(folder).find(SCHEME) is None
    assert f"belongs to another user (id {owner})" in log[0]


def test_systems_without_users(folder, monkeypatch):
    monkeypatch.delattr(files.os, "getuid")
    folder.chmod(0o777)
    assert new_cache(folder).find(SCHEME) is not None


# ---------------------------------------------------------------------- measurements


@pytest.fixture
def measurement(tmp_path) -> Path:
    unit = MeasuredUnit("a", ("a",), ("a",), 8, {"W4A16G32": 36}, {"W4A16G32": 0.5})
    Measurement("fisher", {"W4A16G32": SCHEME}, [unit], 0, 0).save(tmp_path / "scores.json")
    assert Measurement.load(tmp_path / "scores.json").units == [unit]
    return tmp_path / "scores.json"


def in_unit(name, value):
    return lambda content: content["units"][0].update({name: value})


WRONG = {
    "NaN": (in_unit("scores", {"W4A16G32": float("nan")}), "scores of a: W4A16G32 is nan, not a"),
    "text": (in_unit("scores", {"W4A16G32": "1"}), "scores of a: W4A16G32 is '1', not a finite"),
    "bits": (in_unit("bits", {"W4A16G32": None}), "bits of a: W4A16G32 is None, not a finite"),
    "a scheme is missing": (in_unit("scores", {}), "scores of a are not those of W4A16G32"),
    "a field is missing": (lambda x: x.pop("score"), "is not a measurement: .*score"),
    "no units": (lambda x: x.pop("units"), "is not a measurement: KeyError"),
    "a scheme": (lambda x: x["schemes"].update(W4A16G32={"weights": 3}), "is not a measurement"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_measurement_that_is_wrong_is_refused(change, message, measurement):
    content = json.loads(measurement.read_text())
    change(content)
    measurement.write_text(json.dumps(content))
    with pytest.raises(SchemeError, match=message) as raised:
        Measurement.load(measurement)
    assert str(raised.value).startswith(str(measurement))


def test_a_measurement_that_is_no_json_is_refused(measurement):
    measurement.write_text("{")
    with pytest.raises(SchemeError, match="is not a measurement"):
        Measurement.load(measurement)
