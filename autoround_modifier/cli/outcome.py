"""How commands end: exit codes, and what is said of a failure."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import wraps
from typing import NoReturn, ParamSpec, TypeVar

import typer
from pydantic import ValidationError

from autoround_modifier.errors import (
    CalibrationError,
    CheckpointError,
    CompressedSourceError,
    EvaluationError,
    ExportError,
    FailedError,
    MissingExtraError,
    NonFiniteError,
    RecipeError,
    SavingError,
    SchemeError,
)

__all__ = ["DONE", "FAILED", "REFUSED", "USAGE", "UsageError", "reported"]

DONE = 0
REFUSED = 1
USAGE = 2
FAILED = 3

# What is wrong with the input, found before the work began
REFUSALS = (
    CalibrationError,
    CheckpointError,
    CompressedSourceError,
    EvaluationError,
    ExportError,
    MissingExtraError,
    NonFiniteError,
    RecipeError,
    SavingError,
    SchemeError,
    ValidationError,
    OSError,
)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class UsageError(Exception):
    """Flags that contradict each other, or a flag whose value is none that it can have."""


def reported(command: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """
    :param command: body of a command of the command line
    :return: the same, with its errors printed to stderr, and an exit code for each kind of them
    """

    @wraps(command)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except UsageError as error:
            raise typer.BadParameter(str(error)) from error
        except FailedError as error:
            if error.__cause__ is not None and not isinstance(error.__cause__, KeyboardInterrupt):
                _print_traceback(error.__cause__)
            _end(f"failed: {error}", FAILED)
        except KeyboardInterrupt:
            _end("interrupted", FAILED)
        except REFUSALS as error:
            _end(f"refused: {_explained(error)}", REFUSED)
        except Exception as error:
            _print_traceback(error)
            _end(f"failed: {type(error).__name__}: {error}", FAILED)

    return run


def _explained(error: Exception) -> str:
    """:return: the message; of pydantic, one line for each field"""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or error.title}: {item['msg']}"
        for item in error.errors(include_url=False)
    )


def _print_traceback(error: BaseException) -> None:
    traceback.print_exception(error, file=sys.stderr)


def _end(message: str, code: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)
