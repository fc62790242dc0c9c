"""What a run noted of its base: whether the weights that lie there now are those that it was made on."""

from __future__ import annotations

import json
from pathlib import Path

from lora_cli.model.fingerprint import weights_fingerprint
from lora_cli.runs.folder import RunFolder


def base_has_changed(run: RunFolder, weights: Path) -> bool:
    """Whether `run` was made on other weights than those in the folder `weights`.

    False where the run noted nothing: it has not begun, or its base came from the hub, whose revision tells it.
    """
    if not run.environment_file.is_file() or not weights.is_dir():
        return False
    noted = json.loads(run.environment_file.read_text(encoding="utf-8")).get("fingerprints", {}).get("base")
    return noted is not None and noted != weights_fingerprint(weights)
