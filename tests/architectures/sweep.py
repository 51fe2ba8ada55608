"""
Quantizes a tiny model of every causal and image-text class of Transformers, in one scheme and in
two, saves it, loads it again and compares the logits. Each run ends with a verdict of `VERDICTS`.

`make sweep-architectures` writes the table `docs/architectures-sweep.md`. Results are kept in a
JSON file, so that an interrupted sweep goes on where it stopped:

    python tests/architectures/sweep.py --only Mixtral --retry crashed,silent --table sweep.md
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import datasets
import torch
import transformers
from checks import collate
from conftest import tiny_tokenizer, weight_scheme
from datasets import Dataset
from llmcompressor.core import reset_session
from llmcompressor.modeling.moe.linearize import linearize_moe
from loguru import logger
from tiny import VOCABULARY, tiny_config, tiny_inputs
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto

from autoround_modifier import AutoRoundModifier, oneshot

__all__ = ["GOOD", "VARIANTS", "Result", "class_names", "sweep"]

CPU_LIMIT = 90.0  # seconds of processor time, of one class in one stage
WALL_LIMIT = 900.0  # seconds in which it gets them

VERDICTS = {
    "right": "the loaded model gives the logits of the model that was saved",
    "refused": "refused before the first forward pass, with the reason",
    "warned": "a warning of the run says that Transformers cannot load it",
    "silent": "the loaded model gives other logits, and nothing was said",
    "crashed": "an error without advice",
    "hung": f"stopped after {CPU_LIMIT:.0f} seconds of processor time",
    "not made": "no model: Transformers cannot make, run or reload it unquantized here",
}
# What errors advise, and the option that it means. The sweep tries it.
ADVICE = {
    "`engine: transformers`": ("engine", "transformers"),
    'pipeline="basic"': ("pipeline", "basic"),
    "`batch_size: 1`": ("batch_size", 1),
    "`preset: opt_rtn`": ("preset", "opt_rtn"),
}
ADVISING = re.compile("RecipeError|CalibrationError")
GOOD = {"right", "refused", "not made"}
VARIANTS = ("w4", "two schemes")
GROUP_SIZE = 32
NUM_SAMPLES = 4
SAMPLE_LENGTH = 16
MAX_PARAMETERS = 8_000_000
# Of the change that quantization makes to the logits. Experts that are computed in another order
# round differently in bfloat16: 0.03 at most.
TOLERANCE = 0.1

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
FIRST_OF_FUSED = re.compile(
    r"(q|k|v|qkv|query|key|value|in|c_attn|Wqkv|x)(_proj.*)?", re.IGNORECASE
)
# The part is what follows the number of a block.
IN_BLOCK = re.compile(r".*?\.\d+\.(?P<part>[^.]+)(\..*)?")
STATE_SPACE = re.compile(
    r"[MB]amba|GatedDelta|LinearAttention|Lightning|Recurrent|Rwkv|xLSTM|ShortConv|DeltaAttention"
)

Result = dict[str, Any]

# Its name is hidden by that of the function in it.
host_entrypoint = importlib.import_module("llmcompressor.entrypoints.oneshot")


class NotMadeError(Exception):
    """Transformers itself cannot make, run, save or load the model."""


def class_names() -> list[str]:
    """:return: all causal and image-text classes of the installed Transformers, each once"""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    image_text = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return list(dict.fromkeys([*causal.values(), *image_text.values()]))


# ------------------------------------------------------------------ one class


@dataclass
class Prepared:
    """An unquantized model as users have it, and what is needed to quantize it."""

    model: PreTrainedModel
    inputs: list[dict[str, Tensor]]  # of each sample
    logits: Tensor  # of the first
    ran: set[str]  # names of the linear layers that took part


def prepare(name: str, folder: Path) -> Prepared:
    """
    :param name: of a class of Transformers
    :param folder: where the model is written first, to be loaded as users load theirs
    :return: in bfloat16, or in float32 if the class does not run in bfloat16
    :raises NotMadeError: if Transformers cannot do its part
    """
    try:
        return prepare_in(torch.bfloat16, name, folder)
    except NotMadeError:
        shutil.rmtree(folder, ignore_errors=True)
        return prepare_in(torch.float32, name, folder)


def prepare_in(dtype: torch.dtype, name: str, folder: Path) -> Prepared:
    model_class = getattr(transformers, name)
    step = "make"
    try:
        config = tiny_config(model_class.config_class)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size > MAX_PARAMETERS:
            raise NotMadeError(f"{size / 1e6:.0f}M parameters are not tiny")
        torch.manual_seed(0)
        made = model_class(config).to(dtype).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.1)
        inputs = samples(made)
        step = "save"
        made.save_pretrained(folder)
        step = "load"
        model, info = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        step = "run"
        with linear_layers_that_run(model.eval()) as ran:
            original = logits_of(model, inputs[0])
    except NotMadeError:
        raise
    except Exception as error:
        raise NotMadeError(f"cannot {step}: {described(error)}; {frames(error, 1)[0]}") from error
    if not torch.isfinite(original).all():
        raise NotMadeError("its logits are not finite")
    wrong = loading_problems(info)
    if wrong:
        raise NotMadeError(f"Transformers does not load what it saved itself; {'; '.join(wrong)}")
    return Prepared(model, inputs, original, ran)


def loading_problems(info: dict[str, Any]) -> list[str]:
    return [
        f"{what}: {len(info[what])} such as {sorted(map(str, info[what]))[0]}"
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[what]
    ]


def samples(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(NUM_SAMPLES):
        ids = torch.randint(3, 128, (1, SAMPLE_LENGTH), generator=generator)
        made.append(tiny_inputs(model, ids, generator))
    return made


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)
    output = model(**inputs)
    return output.logits.float()


@contextmanager
def linear_layers_that_run(model: nn.Module) -> Iterator[set[str]]:
    ran: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def kind_of(name: str, model: PreTrainedModel) -> str:
    """:return: for the table"""
    if any(hasattr(model.config, f"{part}_config") for part in ("vision", "image", "vq")):
        return "image-text"
    classes = {type(module).__name__ for module in model.modules()}
    kinds = []
    if any(STATE_SPACE.search(one) for one in classes):
        kinds.append("hybrid")
    if any("expert" in one for one, _ in model.named_modules()):
        kinds.append("mixture")
    return ", ".join(kinds) or "dense"


def ignored_parts(prepared: Prepared) -> list[str]:
    """
    :return: as a user would write it: parts that text does not pass (towers of images and sound),
        the head, and layers that no group of `GROUP_SIZE` divides
    """
    model = prepared.model
    head = model.get_output_embeddings()
    ignored = []

    def visit(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            own = f"{path}{name}"
            layers = {one for one, part in child.named_modules() if isinstance(part, nn.Linear)}
            names = {f"{own}.{one}" if one else own for one in layers}
            if not names or child is head:
                continue
            if not names & prepared.ran and not has_experts(child):
                ignored.append(f"re:{re.escape(own)}(\\..*)?$")
            elif not isinstance(child, nn.ModuleList):
                visit(child, f"{own}.")

    visit(model, "")
    for name, module in model.named_modules():
        fits = not isinstance(module, nn.Linear) or module.in_features % GROUP_SIZE == 0
        if module is head or not fits:
            ignored.append(name)
    return ignored


def has_experts(module: nn.Module) -> bool:
    return any("expert" in name for name, _ in module.named_modules())


def is_ignored(name: str, ignored: list[str]) -> bool:
    return any(
        re.match(one[3:], name) is not None if one.startswith("re:") else name == one
        for one in ignored
    )


def two_schemes(model: PreTrainedModel, ignored: list[str]) -> dict[str, dict[str, Any]] | None:
    """
    Attention in eight bits and the rest in four, by expressions on the part of a block that a layer
    is in, so that layers which engines fuse, and all experts, have one scheme. Without attention,
    the layers that a block begins with.

    :return: config groups; None if the layers are all of one kind
    """
    try:
        separate = linearize_moe(copy.deepcopy(model))  # each expert's layers have names there
    except Exception:
        separate = model  # the run itself will say so
    names = [
        name
        for name, module in separate.named_modules()
        if isinstance(module, nn.Linear)
        and not is_ignored(name, ignored)
        and not is_router(separate, name)
    ]
    in_blocks = {name: found for name in names if (found := IN_BLOCK.fullmatch(name))}
    eight = {name for name, found in in_blocks.items() if ATTENTION.search(found["part"])}
    if not eight:
        first = {name for name in names if FIRST_OF_FUSED.fullmatch(name.rpartition(".")[2])}
        eight = first & set(in_blocks)
    four = set(names) - eight
    if not names:
        return {"group_0": weight_scheme(4, group_size=GROUP_SIZE)}
    if not (eight and four):
        return None
    return {
        "attention": weight_scheme(
            8, group_size=GROUP_SIZE, targets=expressions(eight, in_blocks, separate)
        ),
        "rest": weight_scheme(
            4, group_size=GROUP_SIZE, targets=expressions(four, in_blocks, separate)
        ),
    }


def is_router(model: nn.Module, name: str) -> bool:
    """:return: whether the layer chooses experts, which nobody targets"""
    parent, _, leaf = name.rpartition(".")
    beside_experts = any(
        re.search("expert", other, re.IGNORECASE)
        for other, _ in model.get_submodule(parent).named_children()
    )
    return "router" in name or "shared_expert_gate" in name or (leaf == "gate" and beside_experts)


def expressions(
    names: set[str], in_blocks: dict[str, re.Match[str]], model: nn.Module
) -> list[str]:
    """
    :return: one for each part of a block, and the names of layers outside of blocks, or where the
        expression would match more than layers
    """
    parts: dict[str, set[str]] = {}
    for name in names & set(in_blocks):
        parts.setdefault(in_blocks[name]["part"], set()).add(name)
    found = sorted(names - set(in_blocks))
    for part, own in sorted(parts.items()):
        leaves = {name.rpartition(".")[2] for name in own}
        inner = (
            rf"{part}$" if leaves == {part} else rf"{part}\.(.*\.)?({'|'.join(sorted(leaves))})$"
        )
        expression = rf"re:.*\.[0-9]+\.{inner}"
        matched = {name for name, _ in model.named_modules() if is_ignored(name, [expression])}
        found += [expression] if matched <= names else sorted(own)
    return found


# ------------------------------------------------------------------ the two stages of a run


def quantize(name: str, variant: str, folder: Path) -> Result:
    """
    The first stage, in a process of its own.

    :param folder: for the checkpoints and the logits
    :return: verdict ``saved`` if all went well
    """
    started = time.time()
    messages: list[str] = []
    logger.remove()
    logger.add(messages.append, level="WARNING", format="{level} {message}")
    try:
        prepared = prepare(name, folder / "original")
    except NotMadeError as error:
        return {"verdict": "not made", "reason": str(error)}
    model = prepared.model
    result: Result = {"kind": kind_of(name, model)}
    ignored = ignored_parts(prepared)
    groups = {"group_0": weight_scheme(4, group_size=GROUP_SIZE)}
    if variant == "two schemes":
        found = two_schemes(model, ignored)
        if found is None:
            return {**result, "verdict": "right", "reason": "one kind of layer: as in W4"}
        groups = found
    result |= {"ignore": ignored, "groups": {key: one["targets"] for key, one in groups.items()}}
    options: dict[str, Any] = {}
    while True:
        attempt = attempted(prepared, ignored, groups, options, folder)
        advised = next(
            (
                one
                for one, (option, _) in ADVICE.items()
                if one in attempt["reason"] and option not in options
            ),
            None,
        )
        if advised is None or not ADVISING.search(attempt["reason"]):
            break
        name_of_option, value = ADVICE[advised]
        options[name_of_option] = value
        result.setdefault("advice", []).append([advised, attempt["reason"]])
        reset_session()
        model_class = type(prepared.model)
        prepared.model = model_class.from_pretrained(folder / "original", dtype=model.dtype).eval()
    result |= attempt
    result["warnings"] = [str(message).strip() for message in messages]
    result["seconds"] = round(time.time() - started, 1)
    return result


def attempted(
    prepared: Prepared,
    ignored: list[str],
    groups: dict[str, Any],
    options: dict[str, Any],
    folder: Path,
) -> Result:
    """
    :param options: that an error advised: fields of the recipe, and ``pipeline`` of `oneshot`
    :return: verdict ``saved`` if all went well
    """
    model = prepared.model
    state: dict[str, Any] = {"ran": False, "finished": False}

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        state["ran"] = state["ran"] or is_calibrating()

    def with_logits(*args: Any, **kwargs: Any) -> Any:
        state["finished"] = True
        hook.remove()
        torch.save(
            {
                "inputs": prepared.inputs[0],
                "original": prepared.logits,
                "dtype": model.dtype,
                "quantized": logits_of(model, prepared.inputs[0]),
            },
            folder / "logits.pt",
        )
        return post_process(*args, **kwargs)

    post_process = host_entrypoint.post_process
    hook = nn.modules.module.register_module_forward_pre_hook(watch)
    data = Dataset.from_list(
        [{key: value.tolist() for key, value in one.items()} for one in prepared.inputs]
    )
    fields = {"iters": 2, "batch_size": 2}
    fields |= {key: value for key, value in options.items() if key != "pipeline"}
    if "preset" in options:
        del fields["iters"]
    try:
        with mock.patch.object(host_entrypoint, "post_process", with_logits):
            oneshot(
                model=model,
                recipe=AutoRoundModifier(
                    min_expert_tokens=0, ignore=ignored, config_groups=groups, **fields
                ),
                dataset=data,
                processor=tiny_tokenizer(VOCABULARY),
                data_collator=partial(collate, dtype=model.dtype),
                output_dir=folder / "quantized",
                **{key: value for key, value in options.items() if key == "pipeline"},
            )
    except Exception as error:
        expected = type(error).__module__.startswith("autoround_modifier") or (
            isinstance(error, ValueError) and "autoround_modifier" in frames(error, 1)[0]
        )
        refused = expected and not state["ran"]
        return {
            "verdict": "refused" if refused else "crashed",
            "reason": described(error) if refused else f"{moment(state)}: {described(error)}",
            "frames": frames(error, 6),
        }
    finally:
        hook.remove()
    return {"verdict": "saved", "reason": ""}


def is_calibrating() -> bool:
    """:return: whether the caller is called by a pipeline of LLM-Compressor that runs the model"""
    frame: FrameType | None = sys._getframe()
    inside = False
    while frame is not None:
        if frame.f_code.co_name == "trace_subgraphs":
            return False
        inside |= "llmcompressor/pipelines/" in frame.f_code.co_filename
        frame = frame.f_back
    return inside


def moment(state: dict[str, Any]) -> str:
    if state["finished"]:
        return "saving"
    return "running" if state["ran"] else "before the run"


def reload(name: str, variant: str, folder: Path) -> Result:
    """The second stage, in a fresh process, as somebody else loads the checkpoint."""
    stored = torch.load(folder / "logits.pt")
    model_class = getattr(transformers, name)
    try:
        loaded, info = model_class.from_pretrained(folder / "quantized", output_loading_info=True)
        result = logits_of(loaded.eval(), stored["inputs"])
    except Exception as error:
        return {
            "verdict": "crashed",
            "reason": f"loading: {described(error)}",
            "frames": frames(error, 6),
        }
    error = float((result - stored["quantized"]).norm())
    change = float((stored["original"] - stored["quantized"]).norm())
    ratio = error / change if change else error
    keys = loading_problems(info)
    if loaded.dtype != stored["dtype"]:
        keys.append(f"loads in {loaded.dtype} instead of {stored['dtype']}")
    measured = {"ratio": ratio, "size": float(stored["quantized"].norm()), "change": change}
    if ratio <= TOLERANCE:
        return {**measured, "verdict": "right", "reason": "; ".join(keys)}
    reason = "; ".join([f"logits off by {ratio:.2g} of the change by quantization", *keys])
    return {**measured, "verdict": "silent", "reason": reason}


def described(error: BaseException, limit: int = 600) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text}"[:limit]


def frames(error: BaseException, number: int) -> list[str]:
    """:return: the innermost frames, the innermost first"""
    found = []
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = re.sub(r".*/(site-packages|tests)/", "", frame.filename)
        path = re.sub(r".*/autoround_modifier/", "autoround_modifier/", path)
        found.append(f"{path}:{frame.lineno} in {frame.name}")
    return found[:number] or ["no frame"]


# ------------------------------------------------------------------ all classes


@dataclass
class Running:
    name: str
    variant: str
    stage: Callable[[str, str, Path], Result]
    process: Any
    end: connection.Connection
    started: float

    def is_late(self) -> bool:
        """More than it should take, however busy the machine is."""
        used = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        seconds = (int(used[11]) + int(used[12])) / os.sysconf("SC_CLK_TCK")
        return seconds > CPU_LIMIT or time.time() - self.started > WALL_LIMIT


def sweep(
    tasks: list[tuple[str, str]],
    workers: int = 2,
    done: Callable[[str, str, Result], None] = lambda *_: None,
) -> dict[tuple[str, str], Result]:
    """
    :param tasks: names of classes with variants
    :param workers: processes at a time; each task has fresh ones, forked from this
    :param done: called with each result
    :return: results by task
    """
    get_checkpoint_conversion_mapping("llama")  # takes seconds once; forked processes have it
    context = multiprocessing.get_context("fork")
    results: dict[tuple[str, str], Result] = {}
    waiting = deque((name, variant, quantize) for name, variant in tasks)
    running: list[Running] = []
    with tempfile.TemporaryDirectory(prefix="sweep_") as folder:

        def work_of(name: str, variant: str) -> Path:
            return Path(folder) / f"{name}-{variant.replace(' ', '-')}"

        while waiting or running:
            while waiting and len(running) < workers:
                name, variant, stage = waiting.popleft()
                work_of(name, variant).mkdir(exist_ok=True)
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=in_process, args=(theirs, stage, name, variant, work_of(name, variant))
                )
                process.start()
                theirs.close()
                running.append(Running(name, variant, stage, process, ours, time.time()))
            ready = connection.wait([one.end for one in running], timeout=1)
            for one in list(running):
                if one.end not in ready and not one.is_late():
                    continue
                result = received(one) if one.end in ready else {"verdict": "hung", "reason": ""}
                stop(one)
                running.remove(one)
                task = one.name, one.variant
                if result["verdict"] == "saved":
                    results[task] = result
                    waiting.appendleft((*task, reload))
                    continue
                results[task] = judged({**results.get(task, {}), **result})
                shutil.rmtree(work_of(*task), ignore_errors=True)
                done(*task, results[task])
    return results


def in_process(
    end: connection.Connection,
    stage: Callable[[str, str, Path], Result],
    name: str,
    variant: str,
    folder: Path,
) -> None:
    quiet()
    try:
        result = stage(name, variant, folder)
    except BaseException as error:
        traceback.print_exc()
        result = {
            "verdict": "crashed",
            "reason": f"sweep: {described(error)}",
            "frames": frames(error, 6),
        }
    end.send(result)
    end.close()
    os._exit(0)


def quiet() -> None:
    """Leave the terminal to the results."""
    null = os.open(os.devnull, os.O_WRONLY)
    if "SWEEP_LOUD" not in os.environ:
        os.dup2(null, 1)
        os.dup2(null, 2)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def received(one: Running) -> Result:
    try:
        return one.end.recv()
    except EOFError:
        one.process.join(5)
        return {"verdict": "crashed", "reason": f"the process ended with {one.process.exitcode}"}


def stop(one: Running) -> None:
    one.end.close()
    one.process.join(2)
    if one.process.is_alive():
        one.process.kill()
        one.process.join()


def judged(result: Result) -> Result:
    """A warning that names Transformers makes a failed load one that was foretold."""
    said = [one for one in result.get("warnings", []) if "Transformers" in one]
    failed = result["verdict"] == "silent" or result.get("reason", "").startswith("loading:")
    if failed and said:
        return {**result, "verdict": "warned", "reason": f"{said[0][:300]} ({result['reason']})"}
    return result


# ------------------------------------------------------------------ table


def cell(result: Result | None) -> str:
    return "" if result is None else result["verdict"]


def table(results: dict[str, dict[str, Result]]) -> str:
    """:param results: by class and variant"""
    rows = []
    not_made = []
    counts = {variant: Counter[str]() for variant in VARIANTS}
    advised = 0
    for name in sorted(results):
        found = {one: results[name][one] for one in VARIANTS if one in results[name]}
        reasons = [result["reason"] for result in found.values()]
        if any(result["verdict"] == "not made" for result in found.values()):
            not_made.append([f"`{name}`", brief(reasons[0])])
            continue
        for variant, result in found.items():
            counts[variant][result["verdict"]] += 1
        advice = {
            f"with {option}, as advised: {brief(reason)}"
            for result in found.values()
            for option, reason in result.get("advice", [])
        }
        advised += bool(advice)
        notes = dict.fromkeys(filter(None, [*map(brief, reasons), *sorted(advice)]))
        kind = next((result["kind"] for result in found.values() if "kind" in result), "")
        cells = [found[one]["verdict"] if one in found else "" for one in VARIANTS]
        rows.append([f"`{name}`", kind, *cells, "; ".join(notes)])
    lines = [
        "# Sweep of the architectures",
        "",
        f"Every causal and image-text class of Transformers {transformers.__version__}, as a tiny "
        "model with random weights: quantized, saved, loaded again and compared. "
        "`make sweep-architectures` writes this page.",
        "",
        "- *w4*: all linear layers in four bits, in groups of 32",
        "- *two schemes*: attention in eight bits and the rest in four, by expressions",
        "- Image-text classes are calibrated with text alone, and their towers are in `ignore`, "
        "where their forward method allows that.",
        "",
        *(f"- *{verdict}*: {meaning}" for verdict, meaning in VERDICTS.items()),
        "",
        f"{len(rows)} classes. "
        + " ".join(
            f"{variant}: "
            + ", ".join(f"{number} {verdict}" for verdict, number in counts[variant].most_common())
            + "."
            for variant in VARIANTS
        )
        + f" In {advised} of them an error named an option that was needed, and the sweep took it. "
        f"{len(not_made)} more could not be made.",
        "",
        *map(markdown_row, [["class", "kind", *VARIANTS, "note"], ["---"] * 5, *rows]),
        "",
        "## Not made",
        "",
        *map(markdown_row, [["class", "reason"], ["---", "---"], *not_made]),
        "",
    ]
    return "\n".join(lines)


def brief(reason: str) -> str:
    """:return: what a refusal or an error says, without what all of them begin with"""
    text = re.sub(r"^(running: )?RecipeError: (this recipe would save a [^:]*: )?", "", reason)
    text = re.sub(r"/\S*/sweep_\w+/\S*", "the folder", text)
    return text if len(text) <= 300 else f"{text[:300]}..."


def markdown_row(cells: list[str]) -> str:
    escaped = (re.sub(r"([|<])", r"\\\1", one.replace("\n", " ")) for one in cells)
    return f"| {' | '.join(escaped)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=Path("output/sweep.json"))
    parser.add_argument("--only", nargs="*", help="names of classes, or parts of them")
    parser.add_argument("--retry", default="", help="verdicts to run again: crashed,silent")
    parser.add_argument("--variants", nargs="*", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    retry = set(filter(None, args.retry.split(",")))
    names = class_names()
    if args.only:
        exact = [name for name in names if name in args.only]
        names = exact or [name for name in names if any(one in name for one in args.only)]
    results: dict[str, dict[str, Result]] = {}
    if args.results.exists():
        results = json.loads(args.results.read_text())
    tasks = [
        (name, variant)
        for name in names
        for variant in args.variants
        if (args.only and not retry)
        or results.get(name, {}).get(variant, {"verdict": None})["verdict"] in {None, *retry}
    ]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    started = time.time()

    def done(name: str, variant: str, result: Result) -> None:
        results.setdefault(name, {})[variant] = result
        args.results.write_text(json.dumps(results, indent=1))
        verdict = result["verdict"]
        print(f"{verdict:9}{name} ({variant}) {result['reason'][:200]}", flush=True)

    sweep(tasks, args.workers, done)
    counts = Counter(result["verdict"] for one in results.values() for result in one.values())
    summary = ", ".join(f"{number} {verdict}" for verdict, number in counts.most_common())
    print(f"{summary}; {len(tasks)} runs in {time.time() - started:.0f} seconds")
    if args.table:
        args.table.write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
