"""Which steps of a release have ended, and with which settings, so that it can go on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoround_modifier.errors import CheckpointError
from autoround_modifier.runs.digests import text_digest
from autoround_modifier.runs.files import write_atomically

__all__ = ["FinishedSteps"]


@dataclass
class FinishedSteps:
    """
    :param path: of the file that notes the steps of one checkpoint
    """

    path: Path

    def __post_init__(self) -> None:
        try:
            self._steps = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self._steps = {}
        except ValueError as error:
            raise CheckpointError(
                f"{self.path}: {error}; delete it to do all steps again"
            ) from error
        if not isinstance(self._steps, dict):
            raise CheckpointError(f"{self.path}: no JSON object; delete it to do all steps again")

    def is_done(self, step: str, settings: Any) -> bool:
        """
        :param settings: what the step is done with; plain data
        :return: whether it was noted with the same
        """
        return self._steps.get(step) == text_digest(settings)

    def note(self, step: str, settings: Any) -> None:
        self._steps[step] = text_digest(settings)
        write_atomically(self.path, json.dumps(self._steps, indent=1) + "\n")
