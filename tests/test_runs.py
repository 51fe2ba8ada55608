"""Checkpoints on other hardware, locks, damaged files, and what is written atomically."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import quantize, tiny_llama, token_samples, weight_scheme
from helpers import integers, quantized_layers
from llmcompressor.core import reset_session
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaModel

from autoround_modifier import AutoRoundModifier, CheckpointError, locks
from autoround_modifier.blocks import store
from autoround_modifier.blocks.selection import KEY_SIZE
from autoround_modifier.progress.block_report import BlockReport
from autoround_modifier.runs import checkpoint, digests, files, sources
from autoround_modifier.runs.block_data import describe_data
from autoround_modifier.runs.calibration_data import NOT_READ, calibration_digest
from autoround_modifier.runs.checkpoint import RunCheckpoint
from autoround_modifier.tuning import Tuner


def modifier(folder: Path | None, **fields) -> AutoRoundModifier:
    return AutoRoundModifier(
        **{
            "iters": 2,
            "batch_size": 4,
            "ignore": ["lm_head"],
            "config_groups": {"group_0": weight_scheme(4)},
            "checkpoint_dir": folder and str(folder),
            **fields,
        }
    )


def all_integers(model) -> dict[str, torch.Tensor]:
    return {name: integers(layer) for name, layer in quantized_layers(model).items()}


def scale_outputs(model, factor: float, layer: str = "model.layers.0.mlp.down_proj"):
    """Let one layer give its output times a factor; 1 + 2^-8 moves some bfloat16 by one bit."""
    model.get_submodule(layer).register_forward_hook(lambda module, args, out: out * factor)
    return model


def next_bit(model, layer: str = "model.layers.0.mlp.down_proj"):
    """Let one number of one layer's output be the next bfloat16, as on another device."""

    def hook(module, args, out):
        out = out.clone()
        first = out.view(-1)[:1]
        first.view(torch.int16).add_(1)
        return out

    model.get_submodule(layer).register_forward_hook(hook)
    return model


@pytest.fixture
def tuned(monkeypatch) -> list[int]:
    """One entry for each group of blocks that was tuned."""
    calls: list[int] = []
    original = Tuner.run

    def run(self, *args):
        calls.append(1)
        return original(self, *args)

    monkeypatch.setattr(Tuner, "run", run)
    return calls


# ---------------------------------------------------------------------- other hardware


def test_finished_blocks_are_taken_where_the_last_bit_differs(tmp_path, tuned, log):
    first = all_integers(quantize(tiny_llama(num_layers=3), modifier(tmp_path)))
    (tmp_path / "block-0002.safetensors").unlink()
    tuned.clear()
    again = all_integers(quantize(next_bit(tiny_llama(num_layers=3)), modifier(tmp_path)))
    assert len(tuned) == 1
    for name in first:
        if "layers.2." not in name:
            assert torch.equal(first[name], again[name]), name
    (warning,) = [line for line in log if "differ slightly" in line]
    assert warning.startswith("WARNING ")
    assert "model.layers.0" in warning


def test_the_same_bits_give_no_warning(tmp_path, tuned, log):
    quantize(tiny_llama(), modifier(tmp_path))
    tuned.clear()
    quantize(tiny_llama(), modifier(tmp_path))
    assert not tuned
    assert not any("differ slightly" in line for line in log)


def test_a_model_that_gives_other_outputs_is_refused(tmp_path):
    quantize(tiny_llama(), modifier(tmp_path))
    model = scale_outputs(tiny_llama(), 1.2)
    with pytest.raises(CheckpointError, match="the model gives other outputs here"):
        quantize(model, modifier(tmp_path))


def test_the_chain_of_other_bits_is_computed_again(tmp_path, monkeypatch):
    """The inputs of the next block are those of this machine."""
    quantize(tiny_llama(num_layers=3), modifier(tmp_path))
    (tmp_path / "block-0002.safetensors").unlink()
    (tmp_path / "block-0001.safetensors").unlink()
    taken = []
    original = RunCheckpoint.load_chain

    def load_chain(self, *args):
        taken.append(original(self, *args))
        return taken[-1]

    monkeypatch.setattr(RunCheckpoint, "load_chain", load_chain)
    quantize(next_bit(tiny_llama(num_layers=3)), modifier(tmp_path))
    assert taken == [None]


class ScaledLlama(LlamaModel):
    """Computes with its embeddings before the first block, as with images or a norm."""

    factor = 1.0

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        hidden = self.embed_tokens(input_ids) * self.factor
        return LlamaModel.forward(self, inputs_embeds=hidden, **kwargs)


def scaled_llama(factor: float):
    model = tiny_llama(dtype=torch.float32, num_layers=3)
    model.model.__class__ = type("ScaledLlama", (ScaledLlama,), {"factor": factor})
    return model


def test_samples_are_recognised_by_their_tokens_where_the_first_bits_differ(tmp_path, tuned, log):
    """A factor of 1 + 1e-6 changes the last bits of all that the first block sees."""
    fields = {"num_calibration_samples": 10}  # of 16: which ones depends on their keys
    first = all_integers(quantize(scaled_llama(2.0), modifier(tmp_path, **fields)))
    (tmp_path / "block-0002.safetensors").unlink()
    tuned.clear()
    again = all_integers(quantize(scaled_llama(2.0 * (1 + 1e-6)), modifier(tmp_path, **fields)))
    assert len(tuned) == 1
    for name in first:
        if "layers.2." not in name:
            assert torch.equal(first[name], again[name]), name
    (warning,) = [line for line in log if "differ slightly" in line]
    assert float(re.search(r"up to (\S+)\)", warning)[1]) < 1e-4  # of each sample, not of a mean


def test_embeddings_themselves_are_the_key_where_the_first_block_sees_them(monkeypatch):
    keys = []
    original = store.sample_key
    monkeypatch.setattr(store, "sample_key", lambda *x: keys.append(original(*x)) or keys[-1])
    quantize(tiny_llama(), modifier(None))
    assert {len(key) for key in keys} == {KEY_SIZE}
    keys.clear()
    quantize(scaled_llama(2.0), modifier(None))
    assert {len(key) for key in keys} == {2 * KEY_SIZE}


def describe(order=b"a", scale=1.0, positions=(0, 1), rows=(0, 1)):
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(1, 5, 8, generator=generator) * scale * (row + 1) for row in rows]
    return describe_data(order, list(positions), hidden, [x + 1 for x in hidden], [None] * 2)


def test_summaries_are_numbers_of_each_sample():
    x = torch.tensor([[[3.0, -4.0], [100.0, 100.0]]])
    data = describe_data(b"", [0], [x], [2 * x], [torch.tensor([[True, False]])])
    assert data.samples == [[1, -0.5, pytest.approx(12.5**0.5), -1.0, pytest.approx(50**0.5)]]


def test_samples_are_compared_one_by_one_within_a_hundredth():
    here = describe()
    assert here.difference(here.facts()) == 0
    assert here.difference(describe(scale=1.005).facts()) == pytest.approx(0.005, rel=0.1)
    assert here.difference(describe(scale=1.02).facts()) is None
    assert here.difference({**here.facts(), "samples": here.samples[:1]}) is None


def test_a_difference_is_explained():
    here = describe()
    fewer = {**here.facts(), "samples": here.samples[:1]}
    assert here.explained(fewer) == "1 samples there, 2 here"
    assert "differ by 33%, as with another dtype" in here.explained(describe(scale=1.5).facts())
    others = {"order": "b", "samples": [[9, *row[1:]] for row in here.samples]}
    assert here.explained(others) == "the samples are others, 18 tokens there, 10 here"
    assert "masks" in here.explained({**others, "order": here.order})


def test_samples_in_another_order_are_compared_by_their_means():
    """The order is that of a digest of the first inputs, which one bit turns into another."""
    here = describe()
    swapped = {"order": "b", "samples": here.samples[::-1]}
    assert here.difference(swapped) == 0
    assert here.difference({**swapped, "order": here.order}) is None
    assert here.difference({**describe(scale=1.05).facts(), "order": "b"}) < 0.1
    assert here.difference({**describe(scale=1.2).facts(), "order": "b"}) is None


# ---------------------------------------------------------------------- calibration data


def test_another_dataset_is_refused_before_the_first_forward_pass(tmp_path):
    quantize(tiny_llama(), modifier(tmp_path))
    model = tiny_llama()
    ran = []
    model.model.layers[0].register_forward_pre_hook(lambda *args: ran.append(1))
    with pytest.raises(CheckpointError, match="another calibration data"):
        quantize(model, modifier(tmp_path), token_samples(seed=5))
    assert not ran


def batches(*rows: list[int], **columns) -> list[dict]:
    return [{"input_ids": torch.tensor([row]), **columns} for row in rows]


def test_the_order_of_samples_does_not_count():
    assert calibration_digest(batches([1, 2], [3, 4])) == calibration_digest(
        batches([3, 4], [1, 2])
    )
    one_batch = [{"input_ids": torch.tensor([[1, 2], [3, 4]])}]
    assert calibration_digest(one_batch) == calibration_digest(batches([1, 2], [3, 4]))
    assert calibration_digest(batches([1, 2])) != calibration_digest(batches([1, 3]))


def test_padding_does_not_count():
    padded = batches([1, 2, 0], attention_mask=torch.tensor([[1, 1, 0]]))
    left = batches([7, 1, 2], attention_mask=torch.tensor([[0, 1, 1]]))
    assert (
        calibration_digest(padded)
        == calibration_digest(left)
        == calibration_digest(batches([1, 2]))
    )


def test_loss_masks_count():
    masked = batches([1, 2], loss_mask=torch.tensor([[0, 1]]))
    assert calibration_digest(masked) != calibration_digest(batches([1, 2]))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())

    def __len__(self):
        return 1


@pytest.mark.parametrize(
    "unread",
    [None, iter(batches([1])), (x for x in batches([1])), DataLoader(Stream()), [(1, 2)], [{}]],
    ids=["none", "iterator", "generator", "stream", "tuples", "no token ids"],
)
def test_data_that_cannot_be_read_twice_is_left_alone(unread):
    assert calibration_digest(unread) == NOT_READ
    if unread is not None and hasattr(unread, "__next__"):
        assert len(list(unread)) == 1


def test_reading_the_data_leaves_random_generators_as_they_were():
    rows = [{"input_ids": torch.tensor([index])} for index in range(20)]
    for generator in (None, torch.Generator().manual_seed(3)):

        def order(read: bool, generator=generator) -> list[int]:
            torch.manual_seed(0)
            if generator is not None:
                generator.manual_seed(3)
            loader = DataLoader(rows, shuffle=True, generator=generator)
            if read:
                calibration_digest(loader)
            return [int(batch["input_ids"]) for batch in loader]

        assert order(read=True) == order(read=False)


# ---------------------------------------------------------------------- version and code


def test_digests_need_no_package_metadata(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    recipe = modifier(None)
    run = digests.run_digests(tiny_llama(), recipe, [recipe])
    assert run["version of autoround_modifier"] == "0.1.0"
    assert run["calibration data"] == NOT_READ


def test_changed_code_is_noticed(monkeypatch, tmp_path):
    for room in ("formats", "search"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "grid.py").write_text("scale = 1\n")
    monkeypatch.setattr(sources, "PACKAGE", tmp_path)
    sources.source_digest.cache_clear()
    before = sources.source_digest("formats"), sources.source_digest("search")
    (tmp_path / "formats" / "grid.py").write_text("scale = 2\n")
    sources.source_digest.cache_clear()
    after = sources.source_digest("formats"), sources.source_digest("search")
    sources.source_digest.cache_clear()
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_a_run_of_other_code_is_refused(monkeypatch, tmp_path):
    RunCheckpoint(tmp_path, {"code of autoround_modifier": "a"}).close()
    with pytest.raises(CheckpointError, match="another code of autoround_modifier"):
        RunCheckpoint(tmp_path, {"code of autoround_modifier": "b"})


# ---------------------------------------------------------------------- the lock

# Another process, without the package, which takes seconds to import.
LOCK = """
import fcntl, sys
file = open(sys.argv[1] + "/run.lock", "a+")
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
file.write("process 7 on elsewhere")
file.flush()
print("held", flush=True)
"""


@pytest.fixture
def other_process(tmp_path):
    """A process that holds the lock of `tmp_path` until it is killed."""
    command = [sys.executable, "-c", LOCK + "sys.stdin.read()", str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def can_lock(folder: Path) -> bool:
    command = [sys.executable, "-c", LOCK, str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_a_second_process_is_refused_until_the_first_ends(tmp_path, other_process):
    with pytest.raises(CheckpointError, match=r"in use by .*\(process 7 on elsewhere\)"):
        RunCheckpoint(tmp_path, {"model": "m"})
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    other_process.kill()
    other_process.wait()
    RunCheckpoint(tmp_path, {"model": "m"}).close()


def test_the_same_process_may_run_again(tmp_path):
    """Also where an interrupted run has not closed its checkpoint; closing that one later is of
    no consequence."""
    first = RunCheckpoint(tmp_path, {"model": "m"})
    assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
    second = RunCheckpoint(tmp_path, {"model": "m"})
    first.close()
    assert not can_lock(tmp_path)
    second.close()
    assert can_lock(tmp_path)


def test_the_lock_ends_with_the_run(tmp_path, monkeypatch):
    quantize(tiny_llama(), modifier(tmp_path))
    assert can_lock(tmp_path)

    def fail(self, *args):
        raise RuntimeError("out of memory")

    (tmp_path / "block-0001.safetensors").unlink()
    monkeypatch.setattr(Tuner, "run", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        quantize(tiny_llama(), modifier(tmp_path))
    assert can_lock(tmp_path)


def test_the_lock_ends_with_the_checkpoint_object(tmp_path):
    run = RunCheckpoint(tmp_path, {"model": "m"})
    assert not can_lock(tmp_path)
    del run
    assert can_lock(tmp_path)


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, monkeypatch, log):
    def no_locks(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    RunCheckpoint(tmp_path, {"model": "m"}).close()
    assert any("cannot be locked (No locks available)" in line for line in log)


def test_systems_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    RunCheckpoint(tmp_path, {"model": "m"}).close()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_all_processes_of_a_job_stop_where_the_first_is_refused(tmp_path, monkeypatch):
    """Only the first process opens the folder; the others would wait for it for ever."""
    refused = CheckpointError("in use")
    monkeypatch.setattr(checkpoint, "is_source_process", lambda: False)
    monkeypatch.setattr(checkpoint, "gathered", lambda problem: [refused, problem])
    with pytest.raises(CheckpointError, match="in use"):
        RunCheckpoint(tmp_path, {"model": "m"})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- files that do not fit


@pytest.fixture
def saved(tmp_path) -> Path:
    """The file of the first block of a finished run."""
    quantize(tiny_llama(), modifier(tmp_path))
    reset_session()
    return tmp_path / "block-0000.safetensors"


def rewrite(path: Path, tensors=lambda tensors: None, facts=lambda facts: None) -> None:
    with safe_open(path, framework="pt") as file:
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        known = json.loads(file.metadata()["facts"])
    tensors(content)
    facts(known)
    save_file(content, path, metadata={"facts": json.dumps(known)})


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
TENSORS = {
    "missing layer": (
        lambda x: [x.pop(name) for name in list(x) if name.startswith(Q_PROJ)],
        rf"{Q_PROJ}: has nothing, expected scale, values, zero_point",
    ),
    "missing part": (
        lambda x: x.pop(f"{Q_PROJ}:scale"),
        rf"{Q_PROJ}: has values, zero_point, expected scale, values, zero_point",
    ),
    "shape": (
        lambda x: x.update({f"{Q_PROJ}:scale": torch.ones(3, 2, dtype=torch.bfloat16)}),
        rf"{Q_PROJ}:scale is \(3, 2\), torch.bfloat16; expected \(64, 2\), torch.bfloat16",
    ),
    "dtype": (
        lambda x: x.update({f"{Q_PROJ}:values": torch.zeros(64, 64)}),
        rf"{Q_PROJ}:values is \(64, 64\), torch.float32; expected \(64, 64\), torch.int8",
    ),
    "NaN": (
        lambda x: x[f"{Q_PROJ}:scale"].view(-1)[3:4].fill_(float("nan")),
        rf"{Q_PROJ}:scale has NaN or infinity",
    ),
    "another layer": (
        lambda x: x.update({"lm_head.weight:scale": torch.ones(1)}),
        r"lm_head.weight: not quantized in this run",
    ),
}


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_do_not_fit_are_refused(change, message, saved):
    rewrite(saved, tensors=change)
    model = tiny_llama()
    with pytest.raises(CheckpointError, match=message) as raised:
        quantize(model, modifier(saved.parent))
    assert str(raised.value).startswith(str(saved))


FACTS = {
    "name": (lambda x: x.pop("name"), "its `name` is missing"),
    "digest": (lambda x: x.update(digest=3), "its `digest` is missing"),
    "samples": (lambda x: x.pop("samples"), "its `samples` are not rows of 5 finite numbers"),
    "NaN": (lambda x: x["samples"][0].__setitem__(1, float("nan")), "5 finite numbers"),
    "report": (lambda x: x["report"].pop("seconds"), "its `report`: expected the fields name, "),
    "report's type": (lambda x: x["report"].update(seconds="1"), "`seconds` is '1', not float"),
}


@pytest.mark.parametrize(("change", "message"), FACTS.values(), ids=FACTS.keys())
def test_facts_that_are_missing_are_refused(change, message, saved):
    rewrite(saved, facts=change)
    with pytest.raises(CheckpointError, match=message) as raised:
        quantize(tiny_llama(), modifier(saved.parent))
    assert str(raised.value).startswith(f"{saved} is damaged")


def test_a_file_without_facts_is_refused(saved):
    save_file({"a": torch.ones(1)}, saved)
    with pytest.raises(CheckpointError, match="is damaged"):
        quantize(tiny_llama(), modifier(saved.parent))


def test_static_scales_that_do_not_fit_are_refused(tmp_path):
    static = {"num_bits": 8, "strategy": "tensor", "dynamic": False}
    scheme = {"group_0": weight_scheme(4) | {"input_activations": static}}
    quantize(tiny_llama(), modifier(tmp_path, config_groups=scheme))
    name = "model.layers.0.self_attn.q_proj.input:scale"
    rewrite(tmp_path / "block-0000.safetensors", lambda x: x.update({name: torch.ones(7)}))
    with pytest.raises(CheckpointError, match=rf"{name} is \(7,\), torch.float32; expected \(1,\)"):
        quantize(tiny_llama(), modifier(tmp_path, config_groups=scheme))


def test_reports_come_back():
    report = BlockReport("a", 1.0, float("nan"), 3, 2, 0, None)
    again = BlockReport.from_facts(json.loads(json.dumps(report.facts())))
    assert str(again) == str(report)
    assert BlockReport.from_facts(None) is None


# ---------------------------------------------------------------------- what may be deleted


def test_only_files_of_this_run_are_deleted(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    foreign, own = tmp_path / "foreign", tmp_path / "own"
    foreign.mkdir()
    (foreign / ".unfinished-a").write_text("precious")
    (foreign / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="other files"):
        RunCheckpoint(foreign, {"model": "m"})
    assert sorted(path.name for path in foreign.iterdir()) == [".unfinished-a", "notes.txt"]

    RunCheckpoint(own, {"model": "m"}).close()
    (own / ".unfinished-a").write_text("half")
    (own / ".unfinished-b").symlink_to(outside)
    (own / ".unfinished-c").mkdir()
    RunCheckpoint(own, {"model": "m"}).close()
    left = [".unfinished-b", ".unfinished-c", "run.json", "run.lock"]
    assert sorted(path.name for path in own.iterdir()) == left
    assert outside.read_text() == "precious"


@pytest.mark.parametrize("name", ["run.json", "run.lock", "block-0000.safetensors"])
def test_links_are_not_followed(name, saved):
    outside = saved.parent.parent / "outside"
    (saved.parent / name).replace(outside)
    (saved.parent / name).symlink_to(outside)
    before = outside.read_bytes()
    with pytest.raises(CheckpointError, match=f"{name} is a link to another file"):
        quantize(tiny_llama(), modifier(saved.parent))
    assert outside.read_bytes() == before
    outside.unlink()


# ---------------------------------------------------------------------- atomic files


def test_the_umask_is_never_changed(tmp_path, monkeypatch):
    previous = os.umask(0o027)
    monkeypatch.setattr(os, "umask", None)
    try:
        files.write_atomically(tmp_path / "a", "text")
        with files.atomic_file(tmp_path / "b") as temporary:
            save_file({"x": torch.ones(1)}, temporary)
    finally:
        monkeypatch.undo()
        os.umask(previous)
    for name in ("a", "b"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def test_the_folder_is_synchronized_after_the_rename(tmp_path, monkeypatch):
    synced = []
    original = os.fsync

    def fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append(("folder" if is_folder else "file", (tmp_path / "a").exists()))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_atomically(tmp_path / "a", "text")
    assert synced == [("file", False), ("folder", True)]


def test_a_failure_leaves_the_file_as_it_was(tmp_path):
    (tmp_path / "a").write_text("before")

    def interrupted():
        with files.atomic_file(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "before"


def test_a_link_in_the_place_of_the_file_is_replaced(tmp_path):
    (tmp_path / "outside").write_text("precious")
    (tmp_path / "a").symlink_to(tmp_path / "outside")
    files.write_atomically(tmp_path / "a", "text")
    assert (tmp_path / "outside").read_text() == "precious"
    assert not (tmp_path / "a").is_symlink()
