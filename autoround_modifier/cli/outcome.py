"""How commands end: exit codes, and what is said of a failure."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from typing import NoReturn, ParamSpec, TypeVar

import typer
from pydantic import ValidationError

from autoround_modifier.errors import (
    BackendError,
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
    described_problems,
)

__all__ = ["DONE", "FAILED", "REFUSED", "USAGE", "UsageError", "reported"]

DONE = 0
REFUSED = 1
USAGE = 2
FAILED = 3

# What is wrong with the input, found before the work began
REFUSALS = (
    BackendError,
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
            cause = _first_cause(error)
            if not isinstance(cause, (KeyboardInterrupt, FailedError, *REFUSALS)):
                _print_traceback(cause)
            _end(f"failed: {error}", FAILED)
        except KeyboardInterrupt:
            _end("interrupted", FAILED)
        except BrokenPipeError:  # who reads stdout, such as `head`, has left, which is no fault
            _drop_stdout()
            raise typer.Exit(REFUSED) from None
        except REFUSALS as error:
            _end(f"refused: {_explained(error)}", REFUSED)
        except Exception as error:
            _print_traceback(error)
            _end(f"failed: {type(error).__name__}: {error}", FAILED)

    return run


def _explained(error: Exception) -> str:
    """:return: the message; of pydantic, one part for each field"""
    return described_problems(error) if isinstance(error, ValidationError) else str(error)


def _first_cause(error: BaseException) -> BaseException:
    """:return: what a `FailedError` tells of, which may be another one"""
    while isinstance(error, FailedError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _drop_stdout() -> None:
    """Python would complain, as it ends, that it cannot write what is left."""
    with contextlib.suppress(OSError):  # a stdout that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_traceback(error: BaseException) -> None:
    traceback.print_exception(error, file=sys.stderr)


def _end(message: str, code: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)
