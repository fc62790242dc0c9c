"""Secrets that must stay where they are: in the environment, in a home folder, in a config that is refused.

Every command runs among them. What it wrote (run folder, trackers, cache, merged model) and what it printed is then
searched for each of them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random
from typing import Any

from proofs.bench import RUN_SECONDS, Tally, Workplace

_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "AWS_SECRET_ACCESS_KEY",
    "OPENAI_API_KEY",
    "SOME_PASSWORD",
)
_KEYS = (
    "model.name_or_path",
    "data.train",
    "data.chat_template",
    "adapter.target_modules",
    "adapter.path",
    "train.seed",
    "train.report_to",
    "output_dir",
    "wandb_api_key",
    "train.hub_token",
)


def secrets_in_nothing(place: Workplace) -> Tally:
    """Run every command among secrets, and look for them in all that is left."""
    tally = Tally("secrets")
    canaries = [_letters(place.random, 32) for _ in range(len(_VARIABLES) + 2)]
    home = place.folder / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text(canaries[-1], encoding="utf-8")
    (home / ".netrc").write_text(f"machine huggingface.co login me password {canaries[-2]}\n", encoding="utf-8")
    hidden = {home / ".cache" / "huggingface" / "token", home / ".netrc"}

    def among_secrets() -> None:
        os.environ.update(zip(_VARIABLES, canaries, strict=False))
        os.environ["HOME"] = str(home)

    heldout = {"validation": str(place.folder / "heldout.jsonl"), "cache": True}
    config = place.config("canaries", data=heldout, train={"max_steps": 3, "save_steps": 1, **_tracked()})
    run = place.run("canaries")
    for arguments in (
        ["check", config],
        ["train", config, "--debug"],
        ["train", config, "--resume", "--set", "train.max_steps=5", "--json"],
        ["train", config],
        ["params", config, "--json"],
        ["preview", config],
        ["estimate-vram", config, "--json"],
        ["eval", run, "--json"],
        ["generate", run, "--prompt", "noon", "--max-new-tokens", "4"],
        ["merge", run, "--output", run.with_name("canaries-merged")],
    ):
        child = place.command(
            [str(one) for one in arguments], place.folder / f"canaries-{tally.tried}.log", among_secrets
        )
        expected = 2 if tally.tried == 3 else 0  # the folder is occupied
        tally.check(
            child.wait(RUN_SECONDS) == expected, f"{arguments[0]} ended with {child.code}: {child.said()[-900:]}"
        )
        tally.tried += 1
    written = _config_secrets(tally, place)
    files = [path for path in place.folder.rglob("*") if path.is_file() and path not in hidden | written]
    for path in files:
        content = path.read_bytes() + str(path).encode()
        found = [
            name
            for name, canary in zip((*_VARIABLES, ".netrc", "token"), canaries, strict=True)
            if canary.encode() in content
        ]
        tally.check(not found, f"{path.relative_to(place.folder)} holds {', '.join(found)}")
    tally.facts = {"files searched": len(files)}
    return tally


def _tracked() -> dict[str, Any]:
    """With every tracker that needs no account and is installed."""
    from lora_cli.errors import UserError
    from lora_cli.train.trackers import require_trackers

    try:
        require_trackers(("tensorboard",))
    except UserError:
        return {}
    return {"report_to": ["tensorboard"]}


def _config_secrets(tally: Tally, place: Workplace) -> set[Path]:
    """Configs with a secret at each of many places: refused, and the secret not shown. The files that hold them."""
    written = set()
    for key in _KEYS:
        letters = _letters(place.random, 32)
        for form in (f"hf_{letters}", f"https://me:{letters}@example.org/a", f"https://example.org/a?token={letters}"):
            name = f"secret-{tally.tried}"
            config = place.config(name)
            _put(config, key, form)
            written.add(config)
            for arguments in ([str(config)], [str(place.config("plain")), "--set", f"{key}={form}"]):
                child = place.command(["train", *arguments], place.folder / f"{name}.log")
                code, said = child.wait(RUN_SECONDS), child.said()
                where = f"{key}: {form.replace(letters, '...')}"
                tally.check(code == 2, f"{where}: ended with {code}: {said[-600:]}")
                tally.check(letters not in said, f"{where}: shown: {said[-600:]}")
                tally.check(not place.run(name).exists(), f"{where}: something was written")
                tally.tried += 1
    return written


def _put(config: Path, key: str, value: str) -> None:
    content = json.loads(config.read_text(encoding="utf-8"))
    *sections, last = key.split(".")
    section = content
    for one in sections:
        section = section[one]
    section[last] = value
    config.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _letters(random: Random, count: int) -> str:
    return "".join(random.choices("abcdefghijkmnpqrstuvwxyzABCDEFGH23456789", k=count))
