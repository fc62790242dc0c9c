"""What an evaluation leaves behind, all of it or none: figures, rows, and a page to read."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_cli.errors import RunFolderError
from lora_cli.runs.atomic import sync, write_json, write_text
from lora_cli.runs.folder import EvaluationFolder

Rows = Mapping[str, Sequence[Any]]
"""Columns, one value for each row."""


def refuse_occupied(folder: Path) -> None:
    """Refuse a folder that an evaluation must not replace, before any work is done.

    Raises:
        RunFolderError: it is no folder, or holds anything but an evaluation.
    """
    if EvaluationFolder(folder).holds_something_else:
        raise RunFolderError(
            f"{folder.absolute()} holds something else than an evaluation",
            remedy="Give a new folder with --output; an earlier evaluation would be replaced.",
        )


def refuse_unwritable(folder: Path) -> None:
    """Refuse a folder that can't be made, before any work is done. Leaves nothing behind.

    Raises:
        RunFolderError: the nearest folder that there is takes no new one.
    """
    nearest = folder.absolute().parent
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".writing-", dir=nearest))
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"{folder.absolute()} can't be written: {error.strerror or error}")


def write_records(folder: Path, summary: Mapping[str, Any], rows: Rows, page: str) -> None:
    """Write an evaluation whole, in place of one of the same name.

    Args:
        rows: the columns of rows.parquet.

    Raises:
        RunFolderError: the folder can't be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    inside = EvaluationFolder(temporary)
    try:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_json(inside.summary_file, summary)
        write_text(inside.report_file, page)
        pq.write_table(pa.table(dict(rows)), inside.rows_file)
        if folder.exists():
            os.rename(folder, old)
        os.rename(temporary, folder)
        sync(folder.parent)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
