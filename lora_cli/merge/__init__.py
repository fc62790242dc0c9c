"""Merging: an adapter into its base, streamed from disk to disk and verified.

    shards         safetensors files, byte by byte
    layout         tensors on disk <-> parameters of the model, through transformers' conversions
    base           the base's parameters, as on disk or as a quantized run saw them
    adapter        PEFT's layers on `meta`: the arithmetic of one module
    placing        which tensor of an adapter belongs where, and whether all fit
    combination    several adapters as one
    work           every tensor that will be written, planned
    streaming      the work, done: one module in memory, summed in float32, rounded once
    staging        the folder: built beside its name, renamed when whole
    forward        logits of a model larger than memory
    rows           the text to compare on
    verification   merged against base + adapter, and against the base
    choice         original or quantized base
    heap           memory used again, a core left for the disk
    card, result   what is said about it
    merging        all of it, in order

Knows nothing about training or screens.
"""

from lora_cli.merge.combination import combine_adapters
from lora_cli.merge.merging import merge
from lora_cli.merge.result import CombinedAdapter, MergeReport

__all__ = ["CombinedAdapter", "MergeReport", "combine_adapters", "merge"]
