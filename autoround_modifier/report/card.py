"""A model card from the files beside a checkpoint. What they do not say, it does not say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from autoround_modifier.checkpoints.gguf_blocks import SavedBlocks, find_blocks_file
from autoround_modifier.checkpoints.saved_config import quantization_of
from autoround_modifier.checkpoints.saved_files import CONFIG, read_json
from autoround_modifier.errors import CheckpointError
from autoround_modifier.report.own_files import check_own, write_own
from autoround_modifier.report.results_table import result_rows
from autoround_modifier.report.rounding_method import rounding_method
from autoround_modifier.report.saved_schemes import SavedScheme, saved_schemes
from autoround_modifier.report.schema import (
    Evaluation,
    QuantizationReport,
    check_folder,
    read_evaluation,
    read_report,
)
from autoround_modifier.report.summary import command_text, mean_bits, summary
from autoround_modifier.report.templates import template
from autoround_modifier.report.words import hub_name, model_name

__all__ = ["CARD_FILE", "Card", "CardOptions", "make_card", "write_card"]

CARD_FILE = "README.md"
GGUF_LABEL = "GGUF "  # of layers that were tuned in types of GGUF
MARK = "<!-- made by autoround-modifier card -->"


@dataclass(frozen=True)
class CardOptions:
    """
    What only the author knows; None where the files say it, or nobody does.

    :param repo: name under which the checkpoint will be published, ``owner/name``
    :param base_model: name of the original on the hub
    :param license: as the hub spells it, such as ``apache-2.0``
    :param language: codes, such as ``en``
    """

    repo: str | None = None
    base_model: str | None = None
    license: str | None = None
    language: tuple[str, ...] = ()


@dataclass
class Card:
    """
    :param text: front matter and Markdown
    :param left_out: parts of a card for which there is no data: name and reason
    """

    text: str = ""
    left_out: list[tuple[str, str]] = field(default_factory=list)


def write_card(
    checkpoint: Path,
    options: CardOptions,
    output: Path | None = None,
    overwrite: bool = False,
) -> tuple[Path, Card]:
    """
    :param checkpoint: folder with a report
    :param output: file; None for ``README.md`` in the folder
    :param overwrite: write over a file that is no such card
    :return: the file and what is in it
    :raises CheckpointError: if there is no report or no configuration, or one that cannot be read
    :raises OutputExistsError: if the file is there and is no such card
    """
    path = checkpoint / CARD_FILE if output is None else output
    card = make_card(checkpoint, options)
    check_own(path, MARK, overwrite)
    write_own(path, card.text, MARK, overwrite)
    return path, card


def make_card(checkpoint: Path, options: CardOptions) -> Card:
    """
    :param checkpoint: folder with a report
    :raises CheckpointError: see `write_card`
    """
    check_folder(checkpoint)
    report, evaluation = read_report(checkpoint), read_evaluation(checkpoint)
    config = read_json(checkpoint / CONFIG)
    schemes, method = saved_schemes(config), rounding_method(report.recipe)
    card = Card()
    data = _front_matter(checkpoint, report, config, schemes, options, card)
    name = (options.repo or checkpoint.resolve().name).rpartition("/")[2]
    # Markdown: what is not ours goes through `plain`, `code` and `fenced`
    markdown = template("card.md", autoescape=False, code=_code, fenced=_fenced, plain=_plain)
    body = markdown.render(
        mark=MARK,
        name=name,
        served=options.repo or f"./{name}",
        base_name=model_name(report.model.source),
        summary=summary(report, None),
        report=report,
        evaluation=evaluation,
        data=data,
        schemes=schemes,
        weight_tags=_listed(x.scheme.weight_tag for x in schemes),
        activation_tags=_listed(x.scheme.activation_tag or "none, 16 bits" for x in schemes),
        cache=_cache_tag(config),
        gguf_scheme=None
        if find_blocks_file(checkpoint) is None
        else SavedBlocks(checkpoint).scheme,
        bits=mean_bits(report),
        method=method,
        command=command_text(report),
        script=_script(report, str(data.base_model or report.model.source), name),
        rows=result_rows(evaluation.tasks) if evaluation is not None else [],
    )
    _name_left_out(report, evaluation, schemes, card)
    card.text = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body.strip()}\n"))
    return card


def _front_matter(
    checkpoint: Path,
    report: QuantizationReport,
    config: Mapping[str, Any],
    schemes: list[SavedScheme],
    options: CardOptions,
    card: Card,
) -> ModelCardData:
    source = _source_card(report)
    found: dict[str, Any] = {
        "base_model": options.base_model or _base_model(report),
        "license": options.license or source.get("license"),
        "language": list(options.language) or source.get("language"),
        "pipeline_tag": source.get("pipeline_tag") or _pipeline_tag(config),
    }
    reasons = {
        "base_model": "the model was loaded from a folder; name it with `--base-model`",
        "license": "no card of the original names one; use `--license`",
        "language": "no card of the original names one; use `--language`",
        "pipeline_tag": "not known of this architecture",
    }
    card.left_out += [(name, reasons[name]) for name, value in found.items() if not value]
    if found["license"] == "other" and not options.license:
        found |= {key: source.get(key) for key in ("license_name", "license_link")}
    tags = ["llmcompressor", "quantized"] if schemes else ["quantized"]
    tags += [x.scheme.weight_tag for x in schemes]
    tags += [tag for x in schemes if (tag := x.scheme.activation_tag) is not None]
    tags += ["compressed-tensors", "vllm"] if schemes else []
    if found["base_model"]:
        found["base_model_relation"] = "quantized"
    return ModelCardData(
        library_name="transformers",
        tags=list(dict.fromkeys(tags)),
        **{key: value for key, value in found.items() if value},
    )


def _source_card(report: QuantizationReport) -> ModelCardData:
    """:return: front matter of the original's card, where it is on this machine"""
    path = Path(report.model.source) / CARD_FILE
    if not path.is_file():
        base_model = _base_model(report)
        cached = base_model and try_to_load_from_cache(base_model, CARD_FILE)
        if not isinstance(cached, str):
            return ModelCardData()
        path = Path(cached)
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data
    except Exception as error:  # a card of somebody else, which may be any text
        raise CheckpointError(f"the card of the original, {path}: {error}") from error


def _base_model(report: QuantizationReport) -> str | None:
    """:return: the original's name on the hub, if it is known to have come from there"""
    source = report.model.source
    cached = hub_name(source)
    if cached is not None:
        return cached
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source)
    return source if named and report.model.revision else None


def _pipeline_tag(config: Mapping[str, Any]) -> str | None:
    architectures = config.get("architectures") or [""]
    if "vision_config" in config:
        return "image-text-to-text"
    return "text-generation" if architectures[0].endswith("ForCausalLM") else None


def _cache_tag(config: Mapping[str, Any]) -> str | None:
    """:return: what the key-value cache is quantized to"""
    cache = (quantization_of(config) or {}).get("kv_cache_scheme")
    if not cache:
        return None
    return f"{'FP' if cache.get('type') == 'float' else 'INT'}{cache.get('num_bits')}"


def _script(report: QuantizationReport, model: str, name: str) -> str | None:
    """
    :param model: name of the original on the hub where it has one, else its folder
    :return: Python that runs the recipe again; None if its data was in memory
    """
    arguments: dict[str, Any] = {"model": model, "recipe": "recipe.yaml"}
    if report.model.revision:
        arguments["model_revision"] = report.model.revision
    if report.data is not None:
        if report.data.source is None:
            return None
        arguments |= {
            "dataset": report.data.source,
            "num_calibration_samples": report.data.samples,
            "max_seq_length": report.data.max_length,
        }
    arguments["output_dir"] = name
    lines = [f"    {key}={_literal(value)}," for key, value in arguments.items()]
    return "\n".join(["from autoround_modifier import oneshot", "", "oneshot(", *lines, ")"])


def _literal(value: Any) -> str:
    """:return: as Python, strings in double quotes where they can be"""
    if isinstance(value, str) and not set(value) & set("\"'\\") and value.isprintable():
        return f'"{value}"'
    return repr(value)


def _name_left_out(
    report: QuantizationReport,
    evaluation: Evaluation | None,
    schemes: list[SavedScheme],
    card: Card,
) -> None:
    """Name the sections that the template has no data for."""
    in_gguf = any(layer.scheme.startswith(GGUF_LABEL) for layer in report.layers)
    if report.size is None:
        reason = "the report has none; it was written before saving"
        if in_gguf:
            reason = "that of a GGUF file is known once `export` has written it"
        card.left_out.append(("size", reason))
    if not schemes:
        reason = "`config.json` has no quantization_config of compressed-tensors"
        card.left_out += [("schemes", reason), ("deployment", reason)]
    if report.command is None:
        card.left_out.append(("command", "the model was quantized from Python"))
    if report.data is not None and report.data.source is None:
        card.left_out.append(("script", "the calibration data was in memory"))
    if evaluation is None:
        reason = "`autoround-modifier evaluate` was not run on it"
        card.left_out += [("evaluation", reason), ("accuracy", reason)]
        return
    if evaluation.divergence is None:
        card.left_out.append(("divergence", "it was not measured"))
    if not evaluation.tasks:
        card.left_out.append(("accuracy", "no tasks were evaluated"))


def _listed(names: Any) -> str:
    return ", ".join(dict.fromkeys(names))


def _plain(text: object) -> str:
    """:return: text that is neither HTML nor the end of a table's cell"""
    words = " ".join(str(text).split())
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|")):
        words = words.replace(character, entity)
    return words


def _code(text: object) -> str:
    """:return: a code span"""
    words = " ".join(str(text).split()).replace("|", "\\|")
    ticks = "`" * (_longest(words) + 1)
    return f"{ticks}{words}{ticks}" if ticks == "`" else f"{ticks} {words} {ticks}"


def _fenced(text: str, language: str = "") -> str:
    """:return: a block of code, whatever it holds"""
    fence = "`" * max(3, _longest(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest(text: str) -> int:
    """:return: length of the longest run of backticks"""
    return max(map(len, re.findall("`+", text)), default=0)
