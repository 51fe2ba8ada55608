"""What was said of an earlier checkpoint in a folder is not true of the one that replaces it."""

from __future__ import annotations

from pathlib import Path

from autoround_modifier.report.schema import EVALUATION_FILE

__all__ = ["remove_outdated"]


def remove_outdated(folder: Path) -> None:
    """
    Remove the evaluation, the page and the card that this package wrote; those of others stay.

    :param folder: in which a checkpoint was replaced
    """
    from autoround_modifier.report import card, page

    (folder / EVALUATION_FILE).unlink(missing_ok=True)
    for name, mark in ((page.PAGE_FILE, page.MARK), (card.CARD_FILE, card.MARK)):
        path = folder / name
        if path.is_file() and mark in path.read_text(encoding="utf-8", errors="replace"):
            path.unlink()
