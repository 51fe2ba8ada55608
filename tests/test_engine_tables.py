"""The tables of engines: complete for what is shipped, and the same facts as the documentation."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import nn

from autoround_modifier.activations import unsupported_activations
from autoround_modifier.engines.answers import KernelChoice
from autoround_modifier.engines.environment import this_environment
from autoround_modifier.engines.hardware import ELSEWHERE, Hardware, in_words
from autoround_modifier.engines.layers import AlikeLayers
from autoround_modifier.engines.rows import ASKED, READ, RELOAD, RUN, EngineTable, Row
from autoround_modifier.engines.scheme import FAMILIES, Scheme
from autoround_modifier.engines.sglang_table import SGLANG
from autoround_modifier.engines.support import find_kernel, find_support
from autoround_modifier.engines.tables import ENGINE_TABLES
from autoround_modifier.engines.transformers_table import TRANSFORMERS
from autoround_modifier.engines.vllm_table import VLLM
from autoround_modifier.errors import SchemeError
from autoround_modifier.host.saved_format import saved_group
from autoround_modifier.host.saved_size import saved_bits
from autoround_modifier.host.schemes import (
    QuantizationScheme,
    scheme_names,
    unsupported_weights,
)
from autoround_modifier.recipe_files import list_recipes, summarize_recipe
from autoround_modifier.scheme_catalogue import describe_schemes, supports_of, written_scheme
from autoround_modifier.scheme_names import (
    SCHEMES,
    group_named,
    saved_bits_per_weight,
    saved_format,
)
from autoround_modifier.schemes.options import named_scheme

CPU, HOPPER = Hardware("cpu"), Hardware("cuda", 90)
GPUS = [hardware for hardware in ELSEWHERE if hardware.platform == "cuda"]
SPELLED = ["W2A16G64", "W2A16_ASYM_G64", "W3A16_ASYM_G32", "W8A8_ASYM", "W4A8_ASYM", "w4a16g32"]
PAGE = (ROOT / "docs" / "compatibility.md").read_text()


def kernel_of(
    table: EngineTable,
    scheme: Scheme,
    hardware: Hardware,
    experts: bool = False,
    single_group: bool = True,
    version: str | None = None,
) -> KernelChoice:
    """:return: what runs layers of any shape"""
    layers = AlikeLayers(scheme, experts)
    return find_kernel(table, layers, hardware, single_group=single_group, version=version)


def integers(
    bits: int, group_size: int, symmetric: bool = True, format: str | None = "pack-quantized"
) -> Scheme:
    strategy = "channel" if group_size == -1 else "group"
    return Scheme("int", bits, symmetric, group_size, strategy, format=format)


# ------------------------------------------------------------------------- names of schemes


@pytest.mark.parametrize("name", [*SCHEMES, *SPELLED])
def test_names_stand_for_what_compressed_tensors_says(name):
    of_host, ours = named_scheme(name), QuantizationScheme(targets=[], **group_named(name))
    assert fields(of_host.weights) == fields(ours.weights)
    assert fields(of_host.input_activations) == fields(ours.input_activations)
    assert unsupported_weights(of_host.weights) is None
    assert unsupported_activations(of_host) is None
    layer = nn.Linear(512, 256, bias=False, dtype=torch.bfloat16, device="meta")
    bits = saved_bits(layer, of_host.model_copy(deep=True)) / (256 * 512)
    assert saved_bits_per_weight(group_named(name), 256, 512) == bits
    format = saved_group(ours)["format"]
    assert (saved_format(group_named(name)) or format) == format


def fields(args) -> dict | None:
    """:return: what decides how numbers are quantized"""
    if args is None:
        return None
    left_out = ("observer", "observer_kwargs", "zp_dtype")
    found = json.loads(args.model_dump_json())
    return {name: value for name, value in found.items() if name not in left_out}


def test_all_presets_of_compressed_tensors_are_named():
    assert set(SCHEMES) == set(scheme_names()) - {"UNQUANTIZED"}


@pytest.mark.parametrize("name", ["W9A16", "FP8_G64", "NVFP4_ASYM", "W4A16G", ""])
def test_names_of_no_scheme_are_refused(name):
    with pytest.raises(SchemeError):
        group_named(name)


# ------------------------------------------------------------------------- completeness


@pytest.mark.parametrize("table", ENGINE_TABLES, ids=lambda table: table.engine)
@pytest.mark.parametrize("name", [*list_recipes(), *SCHEMES])
def test_each_shipped_scheme_has_a_row_for_each_engine(name, table):
    shipped = list_recipes()
    groups = summarize_recipe(shipped[name]).groups if name in shipped else [group_named(name)]
    assert groups
    for scheme in map(written_scheme, groups):
        assert scheme.family in FAMILIES[:-1]
        if scheme.family == "gguf":  # no engine that loads the folder computes with the blocks
            choice = kernel_of(table, scheme, CPU)
            assert choice.kernel is None
            assert "llama.cpp" in choice.note
            continue
        for hardware in (*GPUS, CPU):
            choice = kernel_of(table, scheme, hardware, single_group=len(groups) == 1)
            assert choice.kernel or choice.note
            assert choice.known or "one to a byte" in choice.note
        assert kernel_of(TRANSFORMERS, scheme, CPU).known in (RUN, RELOAD)


def test_what_is_asked_of_vllm_by_its_tests_is_in_the_table():
    """`tests/vllm/rows.py` names the kernel of each checkpoint that vLLM ran."""
    rows = re.findall(
        r'Row\(\s*"(w[48]a8_int8\w*|fp8_dynamic)",.*?"(\w+Kernel)"',
        (ROOT / "tests" / "vllm" / "rows.py").read_text(),
        re.DOTALL,
    )
    presets = {"w8a8_int8_dynamic": "W8A8", "w4a8_int8_dynamic_g64": "W4A8"}
    presets |= {"fp8_dynamic": "FP8_DYNAMIC"}
    asked = {name: kernel for name, kernel in rows if name in presets}
    assert set(asked) == set(presets)
    for name, kernel in asked.items():
        choice = kernel_of(VLLM, written_scheme(group_named(presets[name])), CPU)
        assert choice.known == RUN
        assert kernel == f"{choice.kernel}LinearKernel"


# ------------------------------------------------------------------------- the documentation


def doc_table(heading: str) -> Iterator[list[str]]:
    """Yield the cells of each row of the first table below a heading of the page."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None
    rows = table[0].splitlines()
    for row in rows[2:]:
        yield [cell.strip() for cell in row.strip("|").split("|")]


def test_the_page_and_the_tables_have_the_same_versions():
    versions = {row[0].partition(",")[0]: row[1] for row in doc_table("Versions")}
    for table in (VLLM, SGLANG, TRANSFORMERS):
        assert re.match(rf"{re.escape(table.version)}\b", versions[table.engine])
    assert "5.23 and 5.24 refuse asymmetric" in versions["Transformers"]
    for version, loads in {"5.17.0": True, "5.22.1": True, "5.23.0": False, "6.0": False}.items():
        choice = kernel_of(TRANSFORMERS, integers(4, 64, False), CPU, version=version)
        assert (choice.kernel is not None) == loads


# What vLLM 0.32 chooses for bfloat16 and 4096 x 4096: bits, zero points, groups -> kernel on
# capability 9.0, and on 7.5, 8.0, 8.9, 10.0 and 12.0
ANY = (-1, 16, 32, 64, 128, 256)
CHOSEN = [
    ((2, 3, 5, 6, 7), (True, False), ANY, "Humming", "Humming"),
    ((4,), (True, False), (-1, 64, 128), "Machete", "Marlin"),
    ((4,), (True, False), (32,), "Humming", "Marlin"),
    ((4,), (True, False), (16,), "Humming", "Humming"),
    ((4,), (True, False), (256,), "Humming", "TritonW4A16"),
    ((8,), (True,), (-1, 64, 128), "Machete", "Marlin"),
    ((8,), (True,), (32,), "Humming", "Marlin"),
    ((8,), (True,), (16, 256), "Humming", "Humming"),
    ((8,), (False,), (-1, 64, 128), "Machete", "Humming"),
    ((8,), (False,), (16, 32, 256), "Humming", "Humming"),
]


def test_the_gpu_kernels_of_vllm_are_those_that_it_chooses():
    """`tests/vllm/test_kernel_tables.py` asks vLLM itself."""
    asked = set()
    for bits, signs, groups, on_hopper, others in CHOSEN:
        for case in itertools.product(bits, signs, groups, GPUS):
            num_bits, symmetric, group_size, hardware = case
            expected = on_hopper if hardware == HOPPER else others
            choice = kernel_of(VLLM, integers(num_bits, group_size, symmetric), hardware)
            assert (choice.kernel, choice.known) == (expected, ASKED), case
            asked.add(case)
    assert len(asked) == 6 * 7 * 2 * len(ANY)


# ------------------------------------------------------------------------- the rows


def test_there_is_a_table_for_each_engine():
    assert sum(len(table.rows) for table in ENGINE_TABLES) > 150
    kernels = {(t.engine, row.kernel) for t in ENGINE_TABLES for row in t.rows if row.kernel}
    assert len(kernels) > 60


@pytest.mark.parametrize("table", ENGINE_TABLES, ids=lambda table: table.engine)
def test_each_row_has_a_source_and_a_meaning(table):
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", table.repository)
    for row in table.rows:
        assert row.source.startswith(SOURCE_FOLDERS[table.engine]), row
        assert row.known in (RUN, RELOAD, ASKED, READ) or (not row.known and row.kernel is None)
        assert row.kernel or row.note, row
        assert set(row.families) <= set(FAMILIES)
        assert not row.export or row.export in table.exports
        assert not row.package or row.package.isascii()
        assert not row.optional or row.package
        assert row.out_multiple > 0
        assert row.in_multiple > 0


SOURCE_FOLDERS = {
    "vLLM": "vllm/model_executor/",
    "SGLang": "python/sglang/srt/",
    "TensorRT-LLM": ("tensorrt_llm/", "docs/source/"),
    "llama.cpp": ("ggml/src/", "gguf-py/"),
    "MLX": "mlx/",
    "GPTQModel": "gptqmodel/nn_modules/qlinear/",
    "auto-round": "auto_round/",
    "OpenVINO": "src/bindings/python/",
    "Transformers": "src/transformers/",
}


def witnesses(row: Row) -> Iterator[tuple[AlikeLayers, Hardware, dict[str, Any]]]:
    """Yield layers that a row is about, where they are asked for, and how, at random."""
    draw = random.Random(0).choice
    hardware = [x for x in MACHINES if not row.on or any(on.holds(x) for on in row.on)]
    for _ in range(20_000):
        scheme = Scheme(
            draw(row.families),
            draw(row.bits or (2, 3, 4, 5, 6, 7, 8)),
            draw((True, False)) if row.symmetric is None else row.symmetric,
            draw(row.groups or (-1, 48, 64, 128, 256, 13)),
            draw(row.strategies or ("channel", "group", "tensor", "block")),
            dynamic=draw((True, False)) if row.dynamic is None else row.dynamic,
            format=draw(row.formats or (None, "pack-quantized")),
        )
        experts = draw((True, False)) if row.experts is None else row.experts
        shape = draw((None, (4096, 4096), (36, 768), (48, 48), (96, 64)))
        asked = {
            "dtype": draw((None, "float16", "bfloat16")),
            "packages": draw((None, {row.package}, set())),
            "single_group": draw((True, False)),
            "export": row.export,
        }
        yield AlikeLayers(scheme, experts, shape), draw(hardware), asked


MACHINES = [*ELSEWHERE, Hardware("cuda", 70), Hardware("cuda", 86)]


@pytest.mark.parametrize("table", ENGINE_TABLES, ids=lambda table: table.engine)
def test_no_row_is_hidden_by_those_before_it(table):
    """Each is found for some layers, so that no earlier row contradicts it everywhere."""
    numbered = replace(
        table, rows=tuple(replace(row, source=str(n)) for n, row in enumerate(table.rows))
    )
    for number, row in enumerate(table.rows):
        assert any(
            find_kernel(numbered, layers, hardware, **asked).source == str(number)
            for layers, hardware, asked in witnesses(row)
        ), row


# First cell of a row of the page -> its schemes
W2, W3 = group_named("W2A16G64"), group_named("W3A16G64")
W4, W8 = group_named("W4A16G64"), group_named("W8A16G64")
FP8_CHANNEL = group_named("FP8_DYNAMIC")
STATIC = {**FP8_CHANNEL, "input_activations": group_named("FP8")["input_activations"]}
W8A8 = group_named("W8A8")
W8A8_STATIC = {**W8A8, "input_activations": W8A8["input_activations"] | {"dynamic": False}}
ROWS = {
    "W2, W3 symmetric, group 64": [W2, W3],
    "W2 asymmetric, group 64": [group_named("W2A16_ASYM_G64")],
    "W4 symmetric and asymmetric, group 64": [W4, group_named("W4A16_ASYM_G64")],
    "W8 symmetric, group 64 and channel": [
        W8,
        {"weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}},
    ],
    "W4 attention with W2 MLP": [W4, W2],
    "W4 and W8, chosen by `AutoSchemeModifier`": [W4, W8],
    "W8A8 integers, dynamic and static": [W8A8, W8A8_STATIC],
    "W4A8 integers, group 64, saved one to a byte": [group_named("W4A8")],
    "the same, packed (`w4a8_autoround`)": [{**group_named("W4A8"), "format": "pack-quantized"}],
    "W4AFP8 (groups of 128, Hopper only)": [group_named("W4AFP8")],
    "FP8, dynamic": [FP8_CHANNEL],
    "FP8, static, by tensor and by channel": [group_named("FP8"), STATIC],
    "FP8 with 16-bit activations; FP8 by block": [
        {"weights": FP8_CHANNEL["weights"]},
        group_named("FP8_BLOCK"),
    ],
    "MXFP4, MXFP8, NVFP4, with quantized and with 16-bit activations": [
        group_named(name)
        for name in ("MXFP4", "MXFP8", "NVFP4", "MXFP4A16", "MXFP8A16", "NVFP4A16")
    ],
    "FP8 key-value cache, W4 weights": [W4],
}


def test_the_runs_on_cpus_are_those_of_the_page():
    rows = {row[0]: row[1:] for row in doc_table("Transformers and vLLM")}
    assert set(rows) - set(ROWS) == {"W2 to W8, symmetric and asymmetric, group and channel"}
    for text, groups in ROWS.items():
        of_transformers, of_vllm, _ = rows[text]
        schemes = [written_scheme(group) for group in groups]
        found = [kernel_of(VLLM, scheme, CPU) for scheme in schemes]
        if of_vllm == "4-bit layers only":
            assert [choice.kernel is not None for choice in found] == [
                scheme.num_bits == 4 for scheme in schemes
            ]
        else:
            runs = of_vllm.startswith("run")
            assert all((choice.kernel is not None) == runs for choice in found), text
        known = {kernel_of(TRANSFORMERS, scheme, CPU).known for scheme in schemes}
        assert known == {of_transformers.partition(" ")[0]}, text


def test_what_sglang_takes_is_what_the_page_says():
    said = {}
    for names, outcome in doc_table("SGLang"):
        for name in re.findall(r"`(\w+)`", names):
            said[f"{name}_autoround" if f"{name}_autoround" in list_recipes() else name] = outcome
    assert set(said) == {name for name in list_recipes() if not name.startswith("gguf_")}
    for name, outcome in said.items():
        groups = summarize_recipe(list_recipes()[name]).groups
        (sglang,) = (x for x in supports_of(groups) if x.engine == SGLANG.engine)
        choices = [choice for hardware in GPUS for choice in sglang.kernels[hardware]]
        ordinary = any(
            all(choice.kernel and not choice.option for choice in sglang.kernels[hardware])
            for hardware in GPUS
        )
        assert ordinary == outcome.startswith("accepted"), (name, choices)
    accepted = re.search(r"`--quantization humming` SGLang's code accepts ([^.]*?) as well", PAGE)
    assert accepted is not None
    for name in re.findall(r"\w+", accepted[1].replace("and", "")):
        preset = group_named(name if name in SCHEMES else f"{name}A16")
        if name == "W4A8":
            preset["format"] = "pack-quantized"
        choice = kernel_of(SGLANG, written_scheme(preset), HOPPER)
        assert (choice.kernel, choice.option) == ("Humming", "--quantization humming")


# ------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("scheme", "label", "words"),
    [
        (integers(2, 64), "W2A16 G64", "INT2, symmetric, groups of 64"),
        (
            integers(8, -1, False),
            "W8A16 asym channel",
            "INT8, asymmetric, one scale for each output channel",
        ),
        ("W8A8", "W8A8 channel dynamic", None),
        ("W4AFP8", "W4AFP8 G128 dynamic", None),
        ("FP8", "FP8 tensor static", "FP8, one scale for each tensor"),
        ("FP8_BLOCK", "FP8 block 128x128 dynamic", "FP8, blocks of 128 x 128"),
        ("MXFP4A16", "MXFP4A16", "MXFP4, groups of 32"),
        ("NVFP4", "NVFP4", "NVFP4, groups of 16"),
    ],
)
def test_schemes_in_words(scheme, label, words):
    scheme = written_scheme(group_named(scheme)) if isinstance(scheme, str) else scheme
    assert scheme.label == label
    assert words is None or scheme.weights == words


def test_config_groups_of_others_are_understood():
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
        "input_activations": None,
    }
    scheme = Scheme.of_group(group, "mxfp4-pack-quantized")
    assert scheme is not None
    assert scheme.family == "mxfp4a16"
    assert Scheme.of_group({"targets": ["LlamaAttention"], "weights": None}) is None


def test_a_humming_option_needs_one_group():
    vllm, sglang, *_ = supports_of([{**W2, "targets": ["Linear"]}])
    assert vllm.command == "vllm serve FOLDER"
    assert sglang.command.endswith("--model-path FOLDER --quantization humming")
    _, sglang, *_ = supports_of([{**W4, "targets": ["Linear"]}])
    assert sglang.kernels[GPUS[0]][0].option == "--quantization humming"
    assert sglang.command.endswith("--model-path FOLDER")  # as on most GPUs
    _, sglang, *_ = supports_of([{**W4, "targets": ["re:.*attn"]}, {**W2, "targets": ["Linear"]}])
    assert not sglang.loads
    assert any("one config group that targets `Linear`" in reason for reason in sglang.reasons)


def test_folders_are_quoted_in_commands():
    layers, folder = [AlikeLayers(integers(4, 64))], "/models/my model"
    vllm, sglang, *_, transformers = (find_support(x, layers, folder) for x in ENGINE_TABLES)
    assert vllm.command == "vllm serve '/models/my model'"
    assert sglang.command.endswith("--model-path '/models/my model'")
    assert "from_pretrained('/models/my model', " in transformers.command


def test_packed_experts_have_no_kernel_on_cpus():
    assert kernel_of(VLLM, integers(4, 64), CPU, experts=True).kernel is None
    assert kernel_of(VLLM, integers(2, 64), HOPPER, experts=True).kernel is not None


def test_hardware_in_words():
    assert in_words(ELSEWHERE) == "NVIDIA 7.5+, AMD GPU, Intel GPU, Apple GPU, CPU"
    assert in_words(GPUS[1:]) == "NVIDIA 8.0+"
    assert in_words([HOPPER]) == "NVIDIA 9.0"
    assert in_words([GPUS[0], HOPPER, CPU]) == "NVIDIA 7.5, 9.0, CPU"
    assert in_words([]) == ""


def test_this_machine_is_asked_without_importing_engines():
    found = this_environment()
    assert found.engines["Transformers"]
    assert found.hardware.platform in ("cpu", "cuda", "rocm", "xpu", "mps")


def test_a_description_names_aliases_and_recipes():
    (entry,) = describe_schemes(["int8"])
    assert (entry.name, entry.aliases) == ("W8A8", ("INT8",))
    assert entry.recipes == ("w8a8_autoround",)
    assert [x.engine for x in entry.engines] == [table.engine for table in ENGINE_TABLES]
