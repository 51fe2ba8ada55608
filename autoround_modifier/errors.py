"""What can be wrong with a recipe, a model or its calibration data: one class each."""

from pydantic import ValidationError

__all__ = [
    "BackendError",
    "CalibrationError",
    "CheckpointError",
    "CompressedSourceError",
    "EvaluationError",
    "ExportError",
    "FailedError",
    "HubError",
    "MissingExtraError",
    "NonFiniteError",
    "OutputExistsError",
    "RecipeError",
    "SavingError",
    "SchemeError",
    "described_problems",
    "listed",
]


class RecipeError(ValueError):
    """A recipe that cannot be read, or that would silently do nothing."""


class SchemeError(ValueError):
    """A quantization scheme that does not fit the layers it targets."""


class CalibrationError(ValueError):
    """Calibration data that is missing, empty or cannot be used."""


class CompressedSourceError(ValueError):
    """A model whose weights are compressed already."""


class FailedError(RuntimeError):
    """
    Work that had begun and did not end. The message says what is kept and how to go on; the cause
    is the error that ended it.
    """


class EvaluationError(ValueError):
    """An evaluation that cannot be run, or results that cannot be compared."""


class ExportError(ValueError):
    """A checkpoint that another format cannot hold without a change of its numbers."""


class HubError(OSError):
    """A model that cannot be downloaded, or a checkpoint that cannot be uploaded."""


class MissingExtraError(ImportError):
    """
    A package that is installed with an extra of this one.

    :param what: needs the package
    :param package: that is not installed
    :param extra: of this package
    """

    def __init__(self, what: str, package: str, extra: str):
        super().__init__(
            f"{what} needs the package `{package}`: pip install 'autoround-modifier[{extra}]'"
        )


class NonFiniteError(ValueError):
    """NaN or infinity in a weight or an activation."""


class OutputExistsError(FileExistsError):
    """An output folder that already holds files."""


class SavingError(ValueError):
    """A model that could not be saved after the run."""


class BackendError(ValueError):
    """A backend that is not there, or cannot run the layers of a checkpoint."""


class CheckpointError(ValueError):
    """A folder of finished blocks of another run, or a checkpoint that cannot be read."""


def described_problems(error: ValidationError) -> str:
    """:return: one part for each field: where it is, and what is wrong with it"""
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or error.title}: {item['msg']}"
        for item in error.errors(include_url=False)
    )


def listed(names: list[str], limit: int = 8) -> str:
    """:return: names for a message, the first few of many"""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
