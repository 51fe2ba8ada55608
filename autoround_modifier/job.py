"""A model's name, a recipe and data, to a checkpoint: refused, stopped half way, or saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from autoround_modifier.calibration import self_generated
from autoround_modifier.command import command_line
from autoround_modifier.defaults import NUM_CALIBRATION_SAMPLES, calibration_length
from autoround_modifier.entrypoint import (
    check_dataset_name,
    load_tokenizer,
    oneshot,
    source_folders,
)
from autoround_modifier.errors import FailedError, OutputExistsError, RecipeError
from autoround_modifier.host.lifecycle import Modifier, as_recipe
from autoround_modifier.host.loading import (
    check_not_compressed,
    load_model,
    model_positions,
    source_config,
    stored_format,
)
from autoround_modifier.modifiers.auto_round import AutoRoundModifier
from autoround_modifier.modifiers.shape_checks import check_shapes
from autoround_modifier.progress.events import Event, Listener, PhaseStarted, listening
from autoround_modifier.report.recorder import RunRecorder, recording
from autoround_modifier.report.schema import QuantizationReport, read_report
from autoround_modifier.run_outputs import (
    COMPRESSED_TENSORS,
    RunOutputs,
    check_converter,
    read_formats,
)

__all__ = ["QuantizationJob"]


@dataclass(frozen=True)
class QuantizationJob:
    """
    :ivar model: folder, or name on the Hugging Face Hub
    :ivar model_name: as the report calls it, where it was downloaded from elsewhere
    :ivar recipe: YAML
    :ivar recipe_name: of the recipe or file that it is made of, or None
    :ivar dataset: path, or name on the hub; None lets the model write its own
    :ivar max_seq_length: tokens in each sample; None for `defaults.calibration_length`
    :ivar device_map: of Transformers
    :ivar formats: to write, as in `oneshot`
    :ivar llama_cpp: for GGUF, see `export`
    """

    model: str
    recipe: str
    max_seq_length: int | None = None
    model_name: str | None = None
    recipe_name: str | None = None
    dataset: str | None = None
    revision: str | None = None
    device_map: str | None = None
    overwrite: bool = False
    trust_remote_code: bool = False
    formats: str | Sequence[str] | None = None
    llama_cpp: Path | None = None

    def outputs(self, output: Path) -> RunOutputs:
        """
        :raises ExportError: if there is no such format
        """
        return RunOutputs.of(output, read_formats(self.formats))

    def check(self, output: Path | None) -> None:
        """
        What can be known without the weights: nothing but the config is read.

        :raises OutputExistsError: if ``output`` holds files, or the model
        :raises CompressedSourceError: if the model is compressed already
        :raises CalibrationError: if there is no such dataset
        :raises RecipeError: if the recipe has no `AutoRoundModifier`, or keeps finished blocks in
            ``output``; and the other errors of `check_shapes`
        :raises ExportError: if there is no such format, or it cannot hold what the recipe makes
        :raises OSError: if there is no such model, or ``output`` cannot be made
        """
        config = source_config(self.model, self.revision)
        if not config:
            raise FileNotFoundError(f"{self.model} has no config.json: it is no model")
        check_not_compressed(self.model, stored_format(config, self.model, self.revision))
        modifiers = as_recipe(self.recipe).modifiers
        if not any(isinstance(modifier, AutoRoundModifier) for modifier in modifiers):
            names = ", ".join(type(modifier).__name__ for modifier in modifiers)
            raise RecipeError(
                f"the recipe has no AutoRoundModifier, only {names}: `oneshot` of LLM-Compressor "
                "runs it"
            )
        if self.dataset is not None:
            check_dataset_name(self.dataset)
        if output is not None:
            self._check_output(output)
            _check_kept_apart(modifiers, output)
        formats = [x for x in read_formats(self.formats) if x != COMPRESSED_TENSORS]
        check_converter(formats, self.llama_cpp)
        check_shapes(self._config(), modifiers, self.trust_remote_code, formats)

    def _check_output(self, output: Path) -> None:
        try:
            outputs = self.outputs(output)
            outputs.check(self.overwrite, source_folders(self.model), self.llama_cpp)
        except OutputExistsError as error:
            raise OutputExistsError(f"{error} (here: --output, --overwrite)") from error

    def _config(self) -> PreTrainedConfig:
        with self._code_refused():
            return AutoConfig.from_pretrained(
                self.model, revision=self.revision, trust_remote_code=self.trust_remote_code
            )

    def run(self, output: Path, listener: Listener | None = None) -> QuantizationReport:
        """
        :param output: folder to save in
        :param listener: of what happens, for progress
        :return: what was done, as it was saved
        :raises FailedError: if it stops after the work has begun
        """
        self.check(output)
        recipe = as_recipe(self.recipe)
        recorder = RunRecorder(
            command_line(),
            self.recipe_name,
            self.dataset or "self-generated",
            self.model_name or self.model,
        )
        with (
            recording(recorder),
            listening(listener or (lambda event: None)),
            _said_what_is_kept(recipe.modifiers, self.dataset is not None),
        ):
            model = self._loaded()
            length = self._length(model.config)
            oneshot(
                model=model,
                recipe=recipe,
                dataset=self._samples(model, recipe.modifiers, length),
                output_dir=output,
                overwrite_output_dir=self.overwrite,
                max_seq_length=length,
                num_calibration_samples=_num_samples(recipe.modifiers),
                trust_remote_code_model=self.trust_remote_code,
                formats=self.formats,
                llama_cpp=self.llama_cpp,
            )
        return read_report(self.outputs(output).report)

    def _loaded(self) -> PreTrainedModel:
        device_map = {} if self.device_map is None else {"device_map": self.device_map}
        with self._code_refused():
            try:
                return load_model(
                    self.model,
                    revision=self.revision,
                    trust_remote_code=self.trust_remote_code,
                    **device_map,
                )
            except ValueError as error:
                if "device_map" not in str(error) or self.device_map is None:
                    raise
                raise RecipeError(f"--device-map: {error}") from error

    @contextlib.contextmanager
    def _code_refused(self) -> Iterator[None]:
        """Say what to do about a model with code of its own."""
        try:
            yield
        except ValueError as error:
            if "trust_remote_code" not in str(error) or self.trust_remote_code:
                raise
            raise RecipeError(
                f"{self.model} has code of its own, which is not run unless you trust it: read it, "
                "and add --trust-remote-code"
            ) from error

    def _length(self, config: PreTrainedConfig) -> int:
        """:return: tokens in each sample that the model has positions for"""
        positions = model_positions(config)
        wanted = self.max_seq_length or calibration_length(self.dataset is not None)
        if positions is None or wanted <= positions:
            return wanted
        logger.warning(
            f"samples have {positions} tokens instead of {wanted}: the model has "
            "positions for no more"
        )
        return positions

    def _samples(self, model: PreTrainedModel, modifiers: list[Modifier], length: int) -> Any:
        """:return: the dataset; what the model writes, where none is given and data is needed"""
        if self.dataset is not None or not any(x.requires_calibration_data for x in modifiers):
            return self.dataset
        tokenizer = load_tokenizer(
            self.model, revision=self.revision, trust_remote_code=self.trust_remote_code
        )
        return self_generated(model, tokenizer, _num_samples(modifiers), length)


def _check_kept_apart(modifiers: list[Modifier], output: Path) -> None:
    """
    Finished blocks in the folder of the checkpoint would be published, and loaded, with it, and the
    run could not go on, as the folder would hold files.
    """
    for modifier in modifiers:
        kept = getattr(modifier, "checkpoint_dir", None)
        if kept is not None and output.resolve() in (
            Path(kept).resolve(),
            *Path(kept).resolve().parents,
        ):
            raise RecipeError(
                f"checkpoint_dir {kept} is inside of the output folder {output}: choose a folder "
                "beside it"
            )


def _num_samples(modifiers: list[Modifier]) -> int:
    """:return: as many calibration samples as the modifier that wants most of them"""
    wanted = [getattr(modifier, "num_calibration_samples", None) or 0 for modifier in modifiers]
    return max(wanted, default=0) or NUM_CALIBRATION_SAMPLES


@contextlib.contextmanager
def _said_what_is_kept(modifiers: list[Modifier], same_data: bool) -> Iterator[None]:
    """
    Where the work has begun, an error becomes a `FailedError`.

    :param same_data: whether the same command would calibrate on the same data
    """
    begun = False

    def note(event: Event) -> None:
        nonlocal begun
        begun = begun or (isinstance(event, PhaseStarted) and event.name != "generation")

    try:
        with listening(note):
            yield
    except FailedError:  # an export, which says what is kept
        raise
    except BaseException as error:  # Ctrl-C among them
        if not begun:
            raise
        folders = [getattr(modifier, "checkpoint_dir", None) for modifier in modifiers]
        folder = next(filter(None, folders), None)
        kept = (
            "nothing is kept; with `--checkpoint-dir FOLDER` finished blocks are, and the same "
            "command goes on after them"
            if folder is None
            else f"finished blocks are kept in {folder}; the same command goes on after them"
        )
        if folder is not None and not same_data:
            kept += " (the model writes the same text again)"
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        raise FailedError(f"{what}\n{kept}") from error
