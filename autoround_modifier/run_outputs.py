"""The formats that a run writes: where each goes, what is checked before, what a failure leaves."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from autoround_modifier.command import COMMAND
from autoround_modifier.errors import ExportError, FailedError, OutputExistsError
from autoround_modifier.exports.export_formats import FORMATS, GGUF, find_format
from autoround_modifier.exports.exporting import Exported, export
from autoround_modifier.exports.gguf_template import converter_script
from autoround_modifier.gguf_schemes import gguf_scheme
from autoround_modifier.report.outdated import remove_outdated
from autoround_modifier.report.schema import REPORT_FILE
from autoround_modifier.runs.output_folder import check_output_folder

__all__ = ["COMPRESSED_TENSORS", "RunOutputs", "check_converter", "read_formats"]

COMPRESSED_TENSORS = "compressed-tensors"
# As auto-round calls them
OTHER_NAMES = {
    "llm_compressor": COMPRESSED_TENSORS,
    "compressed_tensors": COMPRESSED_TENSORS,
    "auto_gptq": "gptq",
    "auto_awq": "awq",
}


def read_formats(formats: str | Sequence[str] | None) -> tuple[str, ...]:
    """
    :param formats: names, or one text with commas between them; None for compressed-tensors
    :return: names, each once, in their order
    :raises ExportError: if there is no such format, or none is named
    """
    if formats is None:
        return (COMPRESSED_TENSORS,)
    parts = [formats] if isinstance(formats, str) else formats
    names = [name.strip() for part in parts for name in part.split(",") if name.strip()]
    if not names:
        raise ExportError(f"no format is named; use {', '.join((COMPRESSED_TENSORS, *FORMATS))}")
    return tuple(dict.fromkeys(_format_name(name) for name in names))


def _format_name(name: str) -> str:
    known = OTHER_NAMES.get(name.lower().replace("-", "_")) or gguf_scheme(name)
    if known is not None:
        return known
    try:
        return find_format(name).name
    except ExportError as error:
        raise ExportError(f"{error}, or {COMPRESSED_TENSORS}") from None


def check_converter(formats: Iterable[str], llama_cpp: str | os.PathLike[str] | None) -> None:
    """
    :param llama_cpp: see `export`
    :raises ExportError: if a format needs llama.cpp's converter, which is not there
    :raises MissingExtraError: if a format needs a package that is not installed
    """
    if any(name.startswith(GGUF) for name in formats):
        converter_script(llama_cpp)


@dataclass(frozen=True)
class RunOutputs:
    """
    A run saves a checkpoint of compressed-tensors, from which the other formats are made.

    :ivar output: folder that the user named
    :ivar checkpoint: folder of that checkpoint
    :ivar is_kept: whether it is one of the formats; otherwise it goes once all others are made
    :ivar exports: name of each other format -> folder, or for GGUF file
    """

    output: Path
    checkpoint: Path
    is_kept: bool
    exports: Mapping[str, Path]

    @classmethod
    def of(cls, output: Path, formats: Sequence[str]) -> RunOutputs:
        """
        One format takes the folder. Of several, each has a folder of its own in it. GGUF is a file
        in the folder.

        :param output: folder
        :param formats: `read_formats`
        """
        others = [name for name in formats if name != COMPRESSED_TENSORS]
        is_kept = COMPRESSED_TENSORS in formats
        single = len(formats) == 1
        exports = {}
        for name in others:
            if name.startswith(GGUF):
                exports[name] = output / f"{output.name}-{name.removeprefix(GGUF)}.gguf"
            else:
                exports[name] = output if single else output / name
        checkpoint = output / COMPRESSED_TENSORS
        if single:
            beside = output.with_name(f"{output.name}-{COMPRESSED_TENSORS}")
            checkpoint = output if is_kept else beside
        return cls(output, checkpoint, is_kept, exports)

    @property
    def by_format(self) -> dict[str, Path]:
        """Format -> folder, or for GGUF file."""
        kept = {COMPRESSED_TENSORS: self.checkpoint} if self.is_kept else {}
        return kept | dict(self.exports)

    @property
    def report(self) -> Path:
        """Folder with ``quantization_report.json``, in the end."""
        return self.checkpoint if self.is_kept else self.output

    def check(
        self,
        overwrite: bool,
        sources: Iterable[Path],
        llama_cpp: str | os.PathLike[str] | None = None,
    ) -> None:
        """
        Nothing is created.

        :param overwrite: the folder may hold files
        :param sources: folders from which the model is read
        :param llama_cpp: see `export`
        :raises OutputExistsError: if ``output`` holds files and ``overwrite`` is false, or if a
            folder of a checkpoint that would be removed does; see also `check_output_folder`
        :raises ExportError: if a format needs llama.cpp's converter, which is not there
        :raises MissingExtraError: if a format needs a package that is not installed
        :raises OSError: if they cannot be written to
        """
        sources = list(sources)
        check_output_folder(self.output, overwrite, sources)
        if not self.is_kept:
            try:
                check_output_folder(self.checkpoint, False, sources)
            except OutputExistsError as error:
                raise OutputExistsError(
                    f"{self.checkpoint} is where the run saves its checkpoint before it is "
                    f"exported, and holds files, perhaps of an earlier run: `{COMMAND} export` "
                    "them, or move them away"
                ) from error
        check_converter(self.exports, llama_cpp)

    def export_all(
        self, overwrite: bool, llama_cpp: str | os.PathLike[str] | None = None
    ) -> list[Exported]:
        """
        Where a format fails, the others are made nevertheless, and the checkpoint is kept.

        :param overwrite: files of earlier exports may be replaced
        :param llama_cpp: see `export`
        :return: what was exported
        :raises FailedError: if a format failed, or the export was interrupted; says what is kept
            and how to go on
        """
        done: list[Exported] = []
        failed: dict[str, BaseException] = {}
        for name, output in self.exports.items():
            try:
                logger.info(f"exporting to {name}: {output}")
                made = export(
                    self.checkpoint, name, output, overwrite=overwrite, llama_cpp=llama_cpp
                )
            except Exception as error:
                failed[name] = error
            except BaseException as error:  # Ctrl-C
                raise FailedError(
                    self._how_to_go_on(done, {name: error}, overwrite, llama_cpp)
                ) from error
            else:
                done.append(made)
                for note in made.notes:
                    logger.warning(f"{name}: {note}")
        if failed:
            first = next(iter(failed.values()))
            raise FailedError(self._how_to_go_on(done, failed, overwrite, llama_cpp)) from first
        if overwrite:
            for folder in {self.output, *(x for x in self.exports.values() if x.is_dir())}:
                remove_outdated(folder)
        if not self.is_kept:
            self._drop_checkpoint()
        return done

    def _drop_checkpoint(self) -> None:
        """Remove it; the report of the run stays."""
        report = self.checkpoint / REPORT_FILE
        if report.is_file():
            shutil.copyfile(report, self.output / REPORT_FILE)
        shutil.rmtree(self.checkpoint)

    def _how_to_go_on(
        self,
        done: Sequence[Exported],
        failed: Mapping[str, BaseException],
        overwrite: bool,
        llama_cpp: str | os.PathLike[str] | None,
    ) -> str:
        lines = [
            f"{name}: {'interrupted' if isinstance(error, KeyboardInterrupt) else error}"
            for name, error in failed.items()
        ]
        lines.append(
            f"the quantized model is kept in {self.checkpoint}; nothing has to be tuned again:"
        )
        finished = {one.format for one in done}
        for name, output in self.exports.items():
            if name in finished:
                continue
            command = [COMMAND, "export", str(self.checkpoint), name, str(output)]
            if overwrite:
                command.append("--overwrite")
            if llama_cpp is not None and name.startswith(GGUF):
                command += ["--llama-cpp", os.fspath(llama_cpp)]
            lines.append(f"  {shlex.join(command)}")
        return "\n".join(lines)
