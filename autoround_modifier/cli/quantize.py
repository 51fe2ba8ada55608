"""`quantize`: a model's name, and a recipe or a scheme, to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoround_modifier.cli.flags import FieldFlags, with_fields
from autoround_modifier.cli.options import AsJson, Platform, Quiet, TrustRemoteCode, Verbose
from autoround_modifier.cli.outcome import UsageError
from autoround_modifier.cli.tables import print_json
from autoround_modifier.command import COMMAND
from autoround_modifier.defaults import GENERATED_SEQ_LENGTH, MAX_SEQ_LENGTH
from autoround_modifier.fields import (
    AutoSchemeFields,
    DistillationFields,
    SchemeFields,
    TuningFields,
)
from autoround_modifier.readable import bytes_text, count_text
from autoround_modifier.report.schema import QuantizationReport

if TYPE_CHECKING:
    from autoround_modifier.run_outputs import RunOutputs

__all__ = ["quantize"]

# Flags that stand for a field of two modifiers
SHARED = frozenset({"targets", "ignore", "engine", "seed"})


@with_fields(
    schemes=FieldFlags(SchemeFields, "What layers are quantized to"),
    tuning=FieldFlags(
        TuningFields,
        "Tuning",
        names={"num_calibration_samples": ("--num-calibration-samples", "--nsamples")},
    ),
    auto_scheme=FieldFlags(
        AutoSchemeFields,
        "A scheme chosen for each layer (AutoSchemeModifier)",
        prefix="auto_scheme_",
        names={"avg_bits": ("--avg-bits", "--bits"), "options": ("--options",)},
        without=SHARED,
    ),
    distillation=FieldFlags(
        DistillationFields,
        "Scales trained end to end (ScaleDistillationModifier)",
        prefix="distill_",
        without=frozenset({"seed"}),
    ),
)
def quantize(
    model: Annotated[str, typer.Argument(help="name on the hub, or folder, of the model")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="folder to save the checkpoint in")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="compressed-tensors (the default), gptq, awq, auto_round, mlx, gguf:q2_0, "
            "gguf:q4_0, ...; several with commas, each of which gets a folder in --output",
        ),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(help="for GGUF: folder with llama.cpp's source; default: LLAMA_CPP_ROOT"),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="shipped recipe (`recipes list`), or YAML file")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="any other field of the recipe, such as "
            "`AutoRoundModifier.config_groups.group_0.weights.num_bits=3`; the value is YAML",
        ),
    ] = None,
    disable_opt_rtn: Annotated[
        bool,
        typer.Option(
            "--disable-opt-rtn",
            help="with `--iters 0`: round to nearest, without the scale search (`--preset rtn`)",
        ),
    ] = False,
    distill: Annotated[
        bool, typer.Option("--distill", help="add a ScaleDistillationModifier to the recipe")
    ] = False,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="calibration data: file of text or conversations, folder, dataset on the hub, or "
            "mixture (YAML). Default: text that the model writes itself"
        ),
    ] = None,
    max_seq_length: Annotated[
        int | None,
        typer.Option(
            "--max-seq-length",
            "--seqlen",
            min=2,
            help=f"tokens in each sample. Default: {MAX_SEQ_LENGTH}, of text that the model writes "
            f"{GENERATED_SEQ_LENGTH}",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="of the model on the hub")] = None,
    platform: Platform = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            help="of Transformers, such as `auto_offload` for weights that stay on the "
            "disk. Default: main memory, blocks go to the accelerator one by one"
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="save into a folder that holds files")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check, and print the recipe; load no weights")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
    *,
    schemes: dict[str, Any],
    tuning: dict[str, Any],
    auto_scheme: dict[str, Any],
    distillation: dict[str, Any],
) -> None:
    """
    Quantize a model, and save it with a report of what was done.

    autoround-modifier quantize MODEL --recipe w2a16_autoround --dataset my.jsonl --output DIR

    autoround-modifier quantize MODEL --scheme FP8_BLOCK --iters 0 --disable-opt-rtn --output DIR

    autoround-modifier quantize MODEL --bits 2.5 --options W2A16G64,W4A16G64 --output DIR

    autoround-modifier quantize MODEL --scheme W4A16 --format gptq,awq,gguf:q4_0 --output DIR
    """
    if output is None and not dry_run:
        raise UsageError("--output is missing: the folder to save the checkpoint in")
    if quiet and verbose:
        raise UsageError("--quiet and --verbose exclude each other")
    _check_schemes(recipe, schemes, auto_scheme)
    if disable_opt_rtn:
        tuning = _round_to_nearest(tuning)
    from autoround_modifier.cli.logs import level_of, own_logs
    from autoround_modifier.cli.progress import RunProgress

    with own_logs(level_of(quiet, verbose)) as console:
        from autoround_modifier.hub import resolve_model
        from autoround_modifier.job import QuantizationJob
        from autoround_modifier.recipe_composition import compose_recipe
        from autoround_modifier.recipe_files import recipe_name

        job = QuantizationJob(
            model=resolve_model(model, platform, revision),
            model_name=model,
            recipe=compose_recipe(
                recipe,
                auto_round={**schemes, **tuning},
                auto_scheme=_auto_scheme_fields(auto_scheme, schemes, tuning),
                distillation=_distillation_fields(distill, distillation, tuning),
                settings=settings or (),
            ),
            recipe_name=recipe_name(recipe),
            dataset=dataset,
            max_seq_length=max_seq_length,
            revision=revision,
            device_map=device_map,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            formats=formats,
            llama_cpp=llama_cpp,
        )
        report = None
        if output is None or dry_run:
            job.check(output)
        elif quiet:
            report = job.run(output)
        else:
            with RunProgress(console) as progress:
                report = job.run(output, progress)
    if report is None or output is None:
        if as_json:
            print_json({"recipe": job.recipe})
        else:
            typer.echo(job.recipe)
    elif as_json:
        by_format = {name: str(path) for name, path in job.outputs(output).by_format.items()}
        document = {"output": str(output), "formats": by_format}
        print_json({**document, "report": report.model_dump(mode="json")})
    else:
        typer.echo(_summary(report, output, job.outputs(output)))


def _summary(report: QuantizationReport, output: Path, outputs: RunOutputs) -> str:
    """:return: what was done, and what can be done next"""
    lines = [f"saved in {output}"]
    size = report.size
    if size is not None:
        lines[0] += (
            f": {bytes_text(size.saved_bytes)} instead of {bytes_text(size.original_bytes)}; "
            f"{count_text(size.quantized_weights)} weights are quantized, to "
            f"{size.quantized_bits:.2f} bits each"
        )
    if outputs.exports:
        lines += [f"  {name}: {path}" for name, path in outputs.by_format.items()]
    if outputs.is_kept:
        lines += [
            f"  {COMMAND} inspect {outputs.checkpoint}",
            f"  {COMMAND} evaluate {report.model.source} {outputs.checkpoint}",
        ]
    lines.append(f"  {COMMAND} report {outputs.report}")
    return "\n".join(lines)


def _check_schemes(
    recipe: str | None, schemes: dict[str, Any], auto_scheme: dict[str, Any]
) -> None:
    """:raises UsageError: unless there is one way to know how layers are quantized"""
    given = bool(schemes.get("scheme") or schemes.get("config_groups"))
    if recipe is not None and given:
        raise UsageError("--recipe says how layers are quantized; --scheme and --config-groups too")
    if recipe is None and not given and not auto_scheme:
        raise UsageError(
            "say how to quantize: --recipe (`recipes list`), --scheme (`schemes`), or --bits with "
            "--options"
        )
    if recipe is None and auto_scheme:
        missing = [x for x in ("avg_bits", "options") if x not in auto_scheme]
        if missing:
            flags = {"avg_bits": "--bits", "options": "--options"}
            raise UsageError(
                f"{' and '.join(flags[x] for x in missing)} missing: schemes are chosen from "
                "--options so that layers take --bits in the mean"
            )
        if given:
            raise UsageError("--scheme gives every layer one scheme; --bits chooses from --options")


def _round_to_nearest(tuning: dict[str, Any]) -> dict[str, Any]:
    """:return: the fields of tuning for rounding to nearest"""
    if tuning.get("iters") and "preset" not in tuning:
        raise UsageError("--disable-opt-rtn goes with --iters 0")
    if tuning.get("scale_search"):
        raise UsageError("--disable-opt-rtn leaves out what --scale-search asks for")
    rest = {name: value for name, value in tuning.items() if name not in ("iters", "preset")}
    return {"preset": "rtn", **rest}


def _auto_scheme_fields(
    auto_scheme: dict[str, Any], schemes: dict[str, Any], tuning: dict[str, Any]
) -> dict[str, Any]:
    """:return: with the flags that stand for fields of both modifiers; empty if none was given"""
    if not auto_scheme:
        return {}
    both = {**schemes, **tuning}
    return {**{name: both[name] for name in sorted(SHARED) if name in both}, **auto_scheme}


def _distillation_fields(
    distill: bool, distillation: dict[str, Any], tuning: dict[str, Any]
) -> dict[str, Any] | None:
    """:return: None where scales are not trained"""
    if not (distill or distillation):
        return None
    seed = {"seed": tuning["seed"]} if "seed" in tuning else {}
    return {**seed, **distillation}
