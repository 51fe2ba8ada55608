"""Runs that are killed, go on, find the disk full, or find a checkpoint that is not theirs."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import quantize, tiny_llama, token_samples, weight_scheme
from test_modifier import all_integers, assert_same, differ

from autoround_modifier import AutoRoundModifier
from autoround_modifier.blocks.group import BlockGroup
from autoround_modifier.errors import CheckpointError, NonFiniteError
from autoround_modifier.runs import checkpoint as checkpoint_module
from autoround_modifier.tuning import Tuner
from autoround_modifier.tuning.step import Step


def modifier(checkpoint_dir: Path | None, num_bits: int = 2, **fields) -> AutoRoundModifier:
    return AutoRoundModifier(
        **{
            "iters": 6,
            "batch_size": 4,
            "ignore": ["lm_head"],
            "config_groups": {"group_0": weight_scheme(num_bits)},
            "checkpoint_dir": checkpoint_dir and str(checkpoint_dir),
            **fields,
        }
    )


class Interrupted(BaseException):
    pass


@pytest.fixture
def interrupt(monkeypatch):
    """Call it with a number: the run stops when that many blocks have been tuned."""
    original = Tuner.run

    def after(num_blocks: int) -> list[int]:
        calls: list[int] = []

        def run(self, *args):
            if len(calls) == num_blocks:
                raise Interrupted
            calls.append(1)
            return original(self, *args)

        monkeypatch.setattr(Tuner, "run", run)
        return calls

    return after


SCHEMES = {
    "w2": {},
    "w2 static int8": {
        "config_groups": {
            "group_0": weight_scheme(4)
            | {"input_activations": {"num_bits": 8, "strategy": "tensor", "dynamic": False}}
        }
    },
    "nvfp4": {"scheme": "NVFP4A16", "config_groups": None},
    "fp8 cache": {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}},
}


@pytest.mark.parametrize("fields", SCHEMES.values(), ids=SCHEMES.keys())
def test_a_run_goes_on_where_it_stopped(fields, tmp_path, interrupt, log):
    whole = quantize(tiny_llama(num_layers=4), modifier(None, **fields))
    interrupt(2)
    with pytest.raises(Interrupted):
        quantize(tiny_llama(num_layers=4), modifier(tmp_path / "run", **fields))
    calls = interrupt(100)
    again = modifier(tmp_path / "run", **fields)
    model = quantize(tiny_llama(num_layers=4), again)
    assert len(calls) == 2
    assert len(again.block_reports) == 4
    assert sum("found finished" in line for line in log) == 2
    for (name, one), (_, other) in zip(
        whole.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name


def test_the_chain_is_computed_again_where_it_is_lost(tmp_path, interrupt):
    whole = quantize(tiny_llama(num_layers=4), modifier(None))
    interrupt(2)
    with pytest.raises(Interrupted):
        quantize(tiny_llama(num_layers=4), modifier(tmp_path))
    (chain,) = tmp_path.glob("chain-*")
    chain.unlink()
    interrupt(100)
    model = quantize(tiny_llama(num_layers=4), modifier(tmp_path))
    assert_same(all_integers(model), all_integers(whole))


def test_killed_at_twenty_random_moments(tmp_path):
    script = Path(__file__).parent / "killed_run.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, check=True
    )
    outcome = json.loads(done.stdout.strip().splitlines()[-1])
    assert outcome["kills"] == 20
    assert len(set(outcome["finished"])) > 3  # at many places
    assert all(outcome["same"])


OTHERS = {
    "recipe": (
        {"iters": 3},
        {},
        {},
        r"another recipe \(iters: 6 there, 3 here\)\. To go on after its 2 finished",
    ),
    "model": (
        {},
        {"seed": 1},
        {},
        r"another model \(the same class and size with other weights\)\..*original model loaded",
    ),
    "larger model": (
        {},
        {"num_layers": 3},
        {},
        r"another model \(parameters: \d+ there, \d+ here\)",
    ),
    "data": (
        {},
        {},
        {"seed": 5},
        r"another calibration data\. .*same dataset, tokenizer, `num_calibration_samples`",
    ),
    "less data": (
        {},
        {},
        {"num_samples": 8},
        r"another calibration data \(batches: 16 there, 8 here\)",
    ),
}


@pytest.mark.parametrize(("recipe", "model", "data", "reason"), OTHERS.values(), ids=OTHERS.keys())
def test_state_of_another_run_is_refused_and_kept(recipe, model, data, reason, tmp_path):
    quantize(tiny_llama(), modifier(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=reason) as raised:
        quantize(tiny_llama(**model), modifier(tmp_path, **recipe), token_samples(**data))
    assert str(tmp_path) in str(raised.value)
    assert "To start anew, choose another checkpoint_dir" in str(raised.value)
    assert "delete" not in str(raised.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_cut_into_groups_is_refused(tmp_path):
    quantize(tiny_llama(num_layers=4), modifier(tmp_path))
    message = r"other groups of blocks.*`sequential_targets_per_subgraph`"
    with pytest.raises(CheckpointError, match=message):
        quantize(tiny_llama(num_layers=4), modifier(tmp_path), sequential_targets_per_subgraph=2)


def test_a_lost_run_file_is_no_reason_to_delete_blocks(tmp_path):
    quantize(tiny_llama(), modifier(tmp_path))
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"2 finished groups.*Put the file back") as raised:
        quantize(tiny_llama(), modifier(tmp_path))
    assert "delete" not in str(raised.value)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    quantize(tiny_llama(), modifier(tmp_path))  # nothing is lost with it


def test_a_damaged_chain_is_computed_again(tmp_path, interrupt, log):
    whole = quantize(tiny_llama(num_layers=4), modifier(None))
    interrupt(2)
    with pytest.raises(Interrupted):
        quantize(tiny_llama(num_layers=4), modifier(tmp_path))
    (chain,) = tmp_path.glob("chain-*")
    chain.write_bytes(chain.read_bytes()[:50])
    interrupt(100)
    model = quantize(tiny_llama(num_layers=4), modifier(tmp_path))
    assert_same(all_integers(model), all_integers(whole))
    assert any("computed again from the finished blocks" in line for line in log)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(CheckpointError, match=r"other files"):
        quantize(tiny_llama(), modifier(tmp_path))
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_a_folder_from_before_the_first_file_is_taken(tmp_path):
    (tmp_path / ".unfinished-abc").write_text("half")  # killed while `run.json` was written
    quantize(tiny_llama(), modifier(tmp_path))
    assert not (tmp_path / ".unfinished-abc").exists()


def test_another_quantizer_before_does_not_make_another_model(tmp_path):
    """Its scales are not filled in yet when the model's digest is taken."""

    def recipe(folder):
        rest = modifier(folder, ignore=["lm_head", "re:.*layers.0.*"])
        first = modifier(None, preset="rtn", iters=None, ignore=["lm_head", "re:.*layers.1.*"])
        return [first, rest]

    once = quantize(tiny_llama(), recipe(tmp_path))
    again = quantize(tiny_llama(), recipe(tmp_path))
    assert_same(all_integers(once), all_integers(again))


def test_two_modifiers_of_one_recipe_do_not_share_a_folder(tmp_path):
    recipe = [
        modifier(tmp_path, ignore=["lm_head", "re:.*mlp.*"]),
        modifier(tmp_path, ignore=["lm_head", "re:.*attn.*"]),
    ]
    with pytest.raises(CheckpointError, match="another modifier of the recipe"):
        quantize(tiny_llama(), recipe)


def test_a_chain_of_other_samples_is_not_taken(tmp_path):
    checkpoint = checkpoint_module.RunCheckpoint(tmp_path, {"model": "m"})
    chain = checkpoint_module.BlockState({"0": torch.ones(1, 2, 3)}, {"digest": "mine"})
    checkpoint.save(0, "block", "digest", checkpoint_module.BlockState(), chain)
    assert checkpoint.load_chain(0, "another's") is None
    (hidden,) = checkpoint.load_chain(0, "mine")
    assert torch.equal(hidden, torch.ones(1, 2, 3))


def test_a_damaged_file_is_named(tmp_path):
    quantize(tiny_llama(), modifier(tmp_path))
    path = tmp_path / "block-0000.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"block-0000\.safetensors is damaged"):
        quantize(tiny_llama(), modifier(tmp_path))


def test_samples_that_only_importance_saw_count_as_data(tmp_path):
    quantize(tiny_llama(), modifier(tmp_path, num_calibration_samples=4), token_samples(16))
    fewer = token_samples(16).select(range(8))
    with pytest.raises(CheckpointError):
        quantize(tiny_llama(), modifier(tmp_path, num_calibration_samples=4), fewer)


def test_a_full_disk_loses_no_finished_block(tmp_path, monkeypatch):
    whole = all_integers(quantize(tiny_llama(num_layers=4), modifier(None)))
    original, written = checkpoint_module.save_file, []

    def disk_full_at_the_third_block(tensors, path, metadata):
        original(tensors, path, metadata)
        written.append(1)
        if len(written) > 4:  # a chain and a block each
            with path.open("rb+") as file:
                file.truncate(100)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_module, "save_file", disk_full_at_the_third_block)
    with pytest.raises(OSError, match="No space left") as raised:
        quantize(tiny_llama(num_layers=4), modifier(tmp_path))
    assert str(tmp_path) in str(raised.value)
    assert "model.layers.2 could not be saved; 2 finished groups" in str(raised.value)
    monkeypatch.undo()
    kept = sorted(path.name for path in tmp_path.glob("block-*"))
    assert kept == ["block-0000.safetensors", "block-0001.safetensors"]
    model = quantize(tiny_llama(num_layers=4), modifier(tmp_path))
    assert_same(all_integers(model), whole)


def test_a_file_that_the_system_does_not_let_grow(tmp_path):
    """What safetensors raises, when the system refuses to write, is an error of the folder too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint = checkpoint_module.RunCheckpoint(tmp_path, {"model": "m"})
    state = checkpoint_module.BlockState({"a": torch.zeros(10_000)})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match=r"cannot be written to") as raised:
            checkpoint.save(0, "block", "digest", state, checkpoint_module.BlockState())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path) in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.lock"]


def test_an_unwritable_folder_is_found_before_the_first_forward_pass(tmp_path):
    file = tmp_path / "a_file"
    file.write_text("")
    model = tiny_llama()
    with pytest.raises(OSError, match=r"cannot be written to") as raised:
        quantize(model, modifier(file / "folder"))
    assert str(file / "folder") in str(raised.value)


def test_the_folder_does_not_enter_the_saved_recipe(tmp_path):
    model = quantize(tiny_llama(), modifier(tmp_path / "run"))
    model.save_pretrained(tmp_path / "saved", save_compressed=True)
    assert "checkpoint_dir" not in (tmp_path / "saved" / "recipe.yaml").read_text()


# ---------------------------------------------------------------------- NaN and infinity


def break_tuning(monkeypatch, block_number: int, where: str) -> None:
    """Let the loss, or a gradient, of one block be NaN from its third step on."""
    runs, steps = [], []
    original_run, original_step = Tuner.run, Tuner._step
    original_loss, original_descend = Tuner._loss, Step._descend

    def broken() -> bool:
        return len(runs) == block_number + 1 and len(steps) >= 3

    def run(self, *args):
        runs.append(1)
        steps.clear()
        return original_run(self, *args)

    def step(self, *args):
        steps.append(1)
        return original_step(self, *args)

    def loss(self, samples, backward_scale=None):
        value = original_loss(self, samples, backward_scale)
        training = backward_scale is not None
        return value * float("nan") if where == "loss" and training and broken() else value

    def descend(self, layer, gradient):
        if where == "gradient" and broken():
            gradient = gradient.clone()
            gradient[0, 0] = float("inf")
        original_descend(self, layer, gradient)

    monkeypatch.setattr(Tuner, "run", run)
    monkeypatch.setattr(Tuner, "_step", step)
    monkeypatch.setattr(Tuner, "_loss", loss)
    monkeypatch.setattr(Step, "_descend", descend)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_block_with_nan_keeps_its_searched_rounding(where, monkeypatch, log):
    searched = all_integers(quantize(tiny_llama(), modifier(None, preset="opt_rtn", iters=None)))
    break_tuning(monkeypatch, 0, where)
    recipe = modifier(None)
    tuned = all_integers(quantize(tiny_llama(), recipe))
    first = [name for name in tuned if "layers.0." in name]
    assert_same({x: tuned[x] for x in first}, {x: searched[x] for x in first})
    assert differ(tuned, searched)  # the other block is tuned
    one, other = recipe.block_reports
    assert one.failure is not None
    assert one.best_iteration == 0
    assert other.failure is None
    (line,) = [line for line in log if "NaN or infinity" in line]
    assert line.startswith("WARNING model.layers.0: ")


def test_a_block_whose_quantized_output_is_nan(monkeypatch, log):
    """It is not tuned, and the next one, which cannot be tuned on NaN, sees the original's."""
    original_run, original_advance = Tuner.run, BlockGroup.advance
    runs = []

    def run(self, *args):
        runs.append(1)
        if len(runs) == 1:
            self._loss = lambda samples, scale=None: torch.tensor(float("nan"))
        return original_run(self, *args)

    def advance(self, hidden, *args):
        original_advance(self, hidden, *args)
        hidden[0].fill_(float("nan"))

    monkeypatch.setattr(Tuner, "run", run)
    monkeypatch.setattr(BlockGroup, "advance", advance)
    recipe = modifier(None)
    quantize(tiny_llama(), recipe)
    one, other = recipe.block_reports
    assert one.failure == "the output of the quantized block"
    assert other.failure is None
    assert math.isfinite(other.initial_loss)
    warnings = [line for line in log if "NaN or infinity" in line]
    assert len(warnings) == 2
    assert "the block keeps the rounding it started from" in warnings[0]
    assert "this block sees full-precision inputs" in warnings[1]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_strict_mode_raises(where, monkeypatch):
    break_tuning(monkeypatch, 1, where)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1: the loss or a gradient"):
        quantize(tiny_llama(), modifier(None, strict=True))
