"""`accuracy.py` on several models and texts."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Row", "add_arguments", "measured", "model_name", "models_of"]

ACCURACY = Path(__file__).parent / "accuracy.py"
SMOLLM2 = "SmolLM2-135M"
Row = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="*", type=Path, default=[], help="beside SmolLM2")
    parser.add_argument(
        "--bos-models",
        nargs="*",
        type=Path,
        default=[],
        help="more models, whose samples begin with BOS although their tokenizers add none, as "
        "converted GGUF files need",
    )
    parser.add_argument("--texts", nargs="+", type=Path, required=True)


def models_of(arguments: argparse.Namespace) -> list[Path | None]:
    """:return: SmolLM2, as None, and the models that are named"""
    return [None, *arguments.models, *arguments.bos_models]


def model_name(model: Path | None) -> str:
    return SMOLLM2 if model is None else model.name


def measured(
    arguments: argparse.Namespace,
    model: Path | None,
    text: Path,
    results: Path,
    methods: Sequence[str],
    others: Sequence[str],
) -> list[Row]:
    """
    :param arguments: of `add_arguments`
    :param model: None for SmolLM2
    :param results: a JSON file; rows that it already holds do not run again
    :param methods: see `accuracy.py`
    :param others: further arguments of it
    :return: its rows, with ``model`` and ``text``
    """
    command = [sys.executable, str(ACCURACY), "--text", str(text), "--output", str(results)]
    command += ["--methods", *methods, *others]
    command += [] if model is None else ["--model", str(model)]
    command += ["--add-bos-token"] if model in arguments.bos_models else []
    subprocess.run(command, check=True)
    labels = {"model": model_name(model), "text": text.stem}
    return [{**labels, **row} for row in json.loads(results.read_text())]
