"""What an evaluation leaves in the run folder, all of it or none: figures, rows, and a page to read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_cli.errors import RunFolderError
from lora_cli.report.comparison import Evaluation
from lora_cli.report.evaluation_page import render_evaluation_page
from lora_cli.runs.atomic import sync, write_json, write_text


def write_evaluation(folder: Path, evaluation: Evaluation, rows: Mapping[str, Sequence[Any]]) -> None:
    """Write an evaluation whole, in place of one of the same name.

    Args:
        rows: the columns of rows.parquet, one value for each row.

    Raises:
        RunFolderError: the folder can't be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    try:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_json(temporary / "summary.json", evaluation.as_json())
        write_text(temporary / "report.html", render_evaluation_page(evaluation, rows))
        pq.write_table(pa.table(dict(rows)), temporary / "rows.parquet")
        if folder.exists():
            os.rename(folder, old)
        os.rename(temporary, folder)
        sync(folder.parent)
    except OSError as error:
        raise RunFolderError(f"{folder.absolute()} can't be written: {error.strerror}") from error
    shutil.rmtree(old, ignore_errors=True)
