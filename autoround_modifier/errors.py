"""What can be wrong with a recipe, a model or its calibration data: one class each."""

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "CompressedSourceError",
    "FailedError",
    "NonFiniteError",
    "OutputExistsError",
    "RecipeError",
    "SavingError",
    "SchemeError",
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


class NonFiniteError(ValueError):
    """NaN or infinity in a weight or an activation."""


class OutputExistsError(FileExistsError):
    """An output folder that already holds files."""


class SavingError(ValueError):
    """A model that could not be saved after the run."""


class CheckpointError(ValueError):
    """A folder of finished blocks of another run, or a checkpoint that cannot be read."""


def listed(names: list[str], limit: int = 8) -> str:
    """:return: names for a message, the first few of many"""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
