"""`plan`: what a run will take, before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoround_modifier import defaults
from autoround_modifier.cli.options import AsJson, Platform, TrustRemoteCode
from autoround_modifier.cli.outcome import REFUSED, UsageError
from autoround_modifier.cli.tables import print_json, print_table
from autoround_modifier.engines.hardware import device_named

if TYPE_CHECKING:
    from autoround_modifier.planning import Plan

__all__ = ["plan"]

AUTO = "auto"
NUMBERS = ("size", "time", "parameters", "as loaded", "as saved")


def plan(
    model: Annotated[str, typer.Argument(help="folder with a config.json, or a name on the Hub")],
    recipe: Annotated[
        str | None,
        typer.Option(help=f"file, or name of a shipped recipe; default: {defaults.RECIPE}"),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(help="instead of a recipe: of all linear layers, such as W4A16 or W2A16G64"),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="best, default, light, opt_rtn or rtn")] = None,
    iters: Annotated[int | None, typer.Option(help="sign-gradient steps of each block")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="calibration samples in each batch")
    ] = None,
    gradient_accumulate_steps: Annotated[
        int | None, typer.Option(help="batches in each step")
    ] = None,
    num_calibration_samples: Annotated[int | None, typer.Option(help="calibration samples")] = None,
    max_seq_length: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"tokens of a calibration sample; default: {defaults.MAX_SEQ_LENGTH}"
        ),
    ] = None,
    model_on_disk: Annotated[
        bool, typer.Option("--model-on-disk", help="weights stay on the disk, block by block")
    ] = False,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", metavar="FORMAT", help="also written, as in `quantize`, such as gptq,awq"
        ),
    ] = None,
    platform: Platform = None,
    revision: Annotated[str | None, typer.Option(help="of the model on the hub")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="h100, a100, rtx4090, ..., the size of its memory such as 24GB, or cpu; default: "
            "the device of this machine"
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="where the checkpoint is to run, for the kernels of engines: sm75, sm80, sm89, "
            "sm90, sm100, sm120, cpu, rocm, xpu or metal; auto is what --gpu says"
        ),
    ] = AUTO,
    ram: Annotated[
        str | None, typer.Option(help="host memory, such as 64GB; default: that of this machine")
    ] = None,
    disk: Annotated[
        str | None,
        typer.Option(help="folder that files go to, or free space such as 500GB; default: here"),
    ] = None,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    What a run will take: memory, disk, hours; and which engines will run its checkpoint, with which
    kernels. Refuses what will not fit, and says what to change.

    Only config.json is read.
    """
    if recipe is not None and scheme is not None:
        raise UsageError("--recipe and --scheme exclude each other")
    given: dict[str, Any] = {
        "preset": preset,
        "iters": iters,
        "batch_size": batch_size,
        "gradient_accumulate_steps": gradient_accumulate_steps,
        "num_calibration_samples": num_calibration_samples,
    }
    from autoround_modifier.cli.logs import WARNING, own_logs

    with own_logs(WARNING):
        from autoround_modifier.hub import resolve_model
        from autoround_modifier.planning import find_machine, plan
        from autoround_modifier.planning.tables import as_data

        try:
            if device != AUTO:
                device_named(device)
            machine = find_machine(gpu, ram, disk)
        except ValueError as error:
            raise UsageError(str(error)) from error
        found = plan(
            resolve_model(model, platform, revision),
            recipe or defaults.RECIPE,
            scheme=scheme,
            max_seq_length=max_seq_length,
            model_on_disk=model_on_disk,
            machine=machine,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            formats=formats,
            **{name: value for name, value in given.items() if value is not None},
        )
    if as_json:
        print_json(as_data(found))
    else:
        _show(found)
    if not found.fits:
        raise typer.Exit(REFUSED)


def _show(found: Plan) -> None:
    from autoround_modifier.planning.tables import summary, tables, verdict

    typer.echo(summary(found))
    for table in tables(found):
        typer.echo()
        print_table(table.columns, table.rows, NUMBERS, table.title)
        for remark in table.remarks:
            typer.echo(remark)
    typer.echo()
    for note in found.notes:
        typer.echo(f"note: {note}")
    for line in verdict(found):
        typer.echo(line)
