"""Folders that others made: what in them is refused before any library opens it.

A model or an adapter is data. Whatever in it would run code (a pickle, an import), read or write elsewhere (a path out
of the folder), or never end (a pipe in a file's place) is refused by name here, whether or not a library would have
noticed. Opens no weight file beyond its first bytes.
"""

from __future__ import annotations

import json
import stat
import struct
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from lora_cli.errors import ModelError

_SUFFIX = ".safetensors"
_LARGEST_HEADER = 100_000_000
"""Bytes; safetensors' own bound."""
_DISGUISES = {b"PK\x03\x04": "a zip archive, as torch.save writes", b"\x80": "a pickle"}
_TEMPLATES = "additional_chat_templates"
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_RUN_CODE = {
    "megatron_config": "it makes PEFT import megatron_core",
    "loftq_config": "it changes the base's weights",
    "corda_config": "it makes PEFT read a pickle, and changes the base's weights",
    "eva_config": "it changes how the adapter starts",
    "lora_ga_config": "it makes PEFT read a pickle, and changes the base's weights",
}
"""Settings of an adapter that do more than describe it, and what they do."""


def refuse_special_files(folder: Path) -> None:
    """Refuse a folder in which a pipe, a device or a socket stands where libraries read files.

    Raises:
        ModelError: with its name.
    """
    for place in (folder, folder / _TEMPLATES):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            try:
                mode = path.stat().st_mode
            except OSError:  # a link to nothing: whoever needs it says so
                continue
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                kind = "a named pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
                raise ModelError(f"{path.absolute()} is {kind}, not a file: reading it might never end")


def refuse_links_out(folder: Path) -> None:
    """Refuse a folder that somebody else's file led to, if it links out of itself: it would be read as that file's.

    In the hub's cache, files are links to blobs beside the snapshots.

    Raises:
        ModelError: with the link.
    """
    whole = folder.resolve()
    if whole.parent.name == "snapshots":
        whole = whole.parents[1]
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(whole):
            raise ModelError(
                f"{path.absolute()} links to {path.resolve()}, out of a folder that you didn't name yourself",
                remedy="If you trust it, name the base in a config, as model.name_or_path.",
            )


def refuse_config_settings(content: dict[str, Any], path: Path) -> None:
    """Refuse a config.json that leads elsewhere.

    Raises:
        ModelError: it names weights or attention code outside its folder, or an adapter beside the model.
    """
    if content.get("transformers_weights") is not None:
        raise ModelError(
            f"{path.absolute()}: transformers_weights names {content['transformers_weights']!r} as the weights",
            remedy="Weights are read from model.safetensors or from the shards of its index: remove that line.",
        )
    for key in ("attn_implementation", "_attn_implementation"):
        found = json.dumps(content.get(key))
        if "/" in found or ":" in found:
            raise ModelError(
                f"{path.absolute()}: {key} {found} is code from the hub, which would be fetched and run",
                remedy="Remove that line; model.attn_implementation chooses the attention.",
            )
    if (path.parent / "adapter_config.json").exists():
        raise ModelError(
            f"{path.parent.absolute()} holds an adapter beside the model: transformers would load both as one",
            remedy="Move adapter_config.json and adapter_model.safetensors elsewhere, and give them as adapter.path.",
        )


def refuse_adapter_settings(settings: Any, path: Path) -> None:
    """Refuse an adapter_config.json that does more than describe a LoRA.

    Raises:
        ModelError: it isn't a LoRA's, or asks for an import, a pickle or another base.
    """
    where = path.absolute()
    if not isinstance(settings, dict):
        raise ModelError(f"{where} is not a JSON object")
    if settings.get("peft_type") != "LORA":
        raise ModelError(f"{where}: peft_type {settings.get('peft_type')!r} is not LORA")
    for key, what in _RUN_CODE.items():
        if settings.get(key):
            raise ModelError(f"{where}: {key} is set, and {what}", remedy="Such an adapter can't be used here.")
    start = settings.get("init_lora_weights")
    if str(start).lower().startswith(_CHANGES_BASE) or not isinstance(start, str | bool | None):
        raise ModelError(
            f"{where}: init_lora_weights {start!r} takes a part out of the base's weights",
            remedy="It fits only a base changed in the same way. Save it as a plain LoRA: PEFT's save_pretrained with\n"
            "path_initial_model_for_weight_conversion.",
        )
    library = (settings.get("auto_mapping") or {}).get("parent_library", "transformers")
    if str(library).split(".")[0] != "transformers":
        raise ModelError(f"{where}: auto_mapping names {library!r}, a package to import", remedy="Remove that line.")


def refuse_disguised(path: Path) -> None:
    """Refuse a weight file that isn't what its name says, by its first bytes.

    Raises:
        ModelError: it is a pickle or an archive, or ends before its header does.
    """
    with path.open("rb") as file:
        head = file.read(9)
    for signature, what in _DISGUISES.items():
        if head.startswith(signature) and head[8:9] != b"{":
            raise ModelError(
                f"{path.absolute()} is {what}, under a name that ends in {_SUFFIX}",
                remedy="A pickle can run code when it is read: it wasn't opened. Take the safetensors version.",
            )
    length = struct.unpack("<Q", head[:8])[0] if len(head) == 9 else None
    if length is None or head[8:9] != b"{" or length > min(_LARGEST_HEADER, path.stat().st_size - 8):
        raise ModelError(
            f"{path.absolute()} is not a safetensors file, or ends too early",
            remedy="Copy or download it again; nothing was loaded.",
        )


def refuse_shard_names(shards: Iterable[Any], index: Path) -> None:
    """Refuse an index whose shards aren't safetensors files of its own folder.

    Raises:
        ModelError: with the first such name.
    """
    for shard in shards:
        name = PurePosixPath(shard) if isinstance(shard, str) else None
        if name is None or name.suffix != _SUFFIX:
            raise ModelError(f"{index.absolute()} names {shard!r} as a shard, which is no {_SUFFIX} file")
        if name.is_absolute() or ".." in name.parts:
            raise ModelError(f"{index.absolute()} names {shard!r} as a shard, which is outside of its folder")
