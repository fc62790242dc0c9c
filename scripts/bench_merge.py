"""The streaming merge beside a plain copy of the files and beside PEFT's `merge_and_unload`, in one run.

    python scripts/bench_merge.py [--layers 22] [--folder DIR] [--pairs 5] [--only-merge]

Builds a random Llama of TinyLlama's shapes in bfloat16 (1.1B parameters with 22 layers, ten shards) and a LoRA of
rank 16 on all its linear layers, then times, each in a process of its own: pairs of copying and syncing the shards and
of the merge without its numeric verification, whose ratio is the figure; then the merge with it, and load +
merge_and_unload + save. A benchmark, not a test.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch


def build(folder: Path, layers: int) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.initialization import no_init_weights

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    size = sum(parameter.numel() * 2 for parameter in model.parameters())
    model.save_pretrained(folder / "base", max_shard_size=size // 10 + 10**7)
    model.config._name_or_path = model.name_or_path = str(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    adapted.save_pretrained(str(folder / "adapter"))


def copy(folder: Path) -> dict[str, float]:
    """Each shard through the kernel, then synced: what no merge can beat."""
    began = time.monotonic()
    (folder / "copied").mkdir()
    for file in sorted((folder / "base").glob("*.safetensors")):
        shutil.copyfile(file, folder / "copied" / file.name)
    for file in (folder / "copied").iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return {"seconds": time.monotonic() - began}


def streaming(folder: Path, *, verify: bool) -> dict[str, float]:
    from lora_cli.merge import merge

    began, worked = time.monotonic(), time.process_time()
    report = merge([str(folder / "adapter")], folder / "merged", max_shard_size="235MB", verify=verify)
    found = {"seconds": report.seconds, "merge_peak": report.peak_memory_bytes, "whole": time.monotonic() - began}
    found["processor"] = time.process_time() - worked
    if report.verification is not None:
        print(json.dumps(report.as_json()["verification"]), file=sys.stderr)
        found["verification"] = report.verification.seconds
    return found


def unload(folder: Path) -> dict[str, float]:
    """What a script would do."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    began = time.monotonic()
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload()
    merged.save_pretrained(folder / "merged", max_shard_size="235MB")
    for file in (folder / "merged").iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return {"seconds": time.monotonic() - began}


WAYS = {
    "copy": copy,
    "merge": lambda folder: streaming(folder, verify=False),
    "merge and verify": lambda folder: streaming(folder, verify=True),
    "merge_and_unload": unload,
}


def run(way: str, folder: Path) -> dict[str, float]:
    """One way in a process of its own; what it wrote goes away again."""
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    spelled = (f"{k} {v / 2**20:,.0f} MiB" if "peak" in k else f"{k} {v:.2f} s" for k, v in figures.items())
    print(f"{way:18} {', '.join(spelled)}", flush=True)
    for name in ("copied", "merged"):
        shutil.rmtree(folder / name, ignore_errors=True)
    os.sync()  # what the next one waits for is its own
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--folder", type=Path, help="keep base and adapter here, and use them again")
    parser.add_argument("--pairs", type=int, default=5, help="of copy and merge, after one to warm up")
    parser.add_argument("--only-merge", action="store_true", help="no verification, no merge_and_unload")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        found = WAYS[arguments.way](arguments.folder)
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(json.dumps({**found, "peak": int(peak.split()[1]) * 1024}))
        return
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="bench-merge-"))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "adapter").is_dir():
        build(folder, arguments.layers)
    pairs = [(run("copy", folder), run("merge", folder)) for _ in range(arguments.pairs + 1)][1:]
    ratios = sorted(merge["seconds"] / copied["seconds"] for copied, merge in pairs)
    print(f"merge / copy       {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} pairs)")
    if not arguments.only_merge:
        verified, plain = run("merge and verify", folder), run("merge_and_unload", folder)
        fastest = median(merge["seconds"] for _, merge in pairs)
        print(f"merge_and_unload   {plain['seconds'] / fastest:.2f} x the merge, {plain['peak'] / 2**20:,.0f} MiB")
        print(f"verification       {verified['verification']:.1f} s, whole process {verified['peak'] / 2**20:,.0f} MiB")
    if arguments.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
