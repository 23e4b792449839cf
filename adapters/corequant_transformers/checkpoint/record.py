"""Writing results of ``evaluate`` into the directory of the evaluated model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corequant.errors import CheckpointError
from corequant.storage.files import read_text
from corequant_transformers.checkpoint.figures import SECTION, evaluation_section, merged
from corequant_transformers.checkpoint.reader import is_quantized
from corequant_transformers.checkpoint.reports import read_report
from corequant_transformers.files.atomic import file_sha256, replacing, sync
from corequant_transformers.files.digests import REPORT, report_digests, sealed_report
from corequant_transformers.files.marks import CARD

__all__ = ["record_evaluation", "records"]


def records(path: str | Path) -> bool:
    """Return whether a path is a directory that ``quantize`` wrote, with files of its own.

    In the Hugging Face cache they are links to what other snapshots may share.
    """
    folder = Path(path)
    own = folder / REPORT
    return folder.is_dir() and is_quantized(folder) and own.is_file() and not own.is_symlink()


def record_evaluation(path: str | Path, evaluation: Mapping[str, Any]) -> bool:
    """Write figures into a directory's report, as ``evaluation``, and into its model card.

    Their digests are those of the new files; no other file changes. A card that was changed since
    it was written is somebody's own, and stays as it is.

    Parameters
    ----------
    path : str or Path
        A directory that ``quantize`` wrote, for which ``records`` is true.
    evaluation : mapping
        As ``flat`` returns. Earlier figures of other tasks stay.

    Returns
    -------
    bool
        Whether the card has them, too.

    Raises
    ------
    CheckpointError
        If the report isn't as it was written, the card can't be read, or the directory is from
        before there were digests.
    OutputError
        If it can't be written. Files are as they were then.
    """
    folder = Path(path)
    digests, report = report_digests(folder), read_report(folder)
    report["evaluation"] = merged(report.get("evaluation"), evaluation)
    card = _new_card(folder / CARD, digests.get(CARD), report["evaluation"])
    with replacing(folder / REPORT) as part:
        if card is None:
            part.write_bytes(sealed_report(report, folder, digests).encode())
            return False
        # The card gets its name before the report, which has its digest; both are on the disk.
        with replacing(folder / CARD) as other:
            other.write_bytes(card.encode())
            digests[CARD] = file_sha256(other)
            part.write_bytes(sealed_report(report, folder, digests).encode())
            sync(part)
    return True


def _new_card(file: Path, known: str | None, evaluation: Mapping[str, Any]) -> str | None:
    """Return a card's text with figures; None if it was changed or is missing."""
    if known is None or file.is_symlink():
        return None
    try:
        text = read_text(file) if file_sha256(file) == known else ""
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error
    before, found, _ = text.rpartition(f"\n{SECTION}")
    return f"{before}\n{evaluation_section(evaluation)}" if found else None
