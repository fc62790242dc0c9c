"""Merging: an adapter into its base, streamed from disk to disk and verified.

    shards         safetensors files, byte by byte
    layout         tensors on disk <-> parameters of the model, through transformers' conversions
    base           the base's parameters, as on disk or as a quantized run saw them
    packed         a base that lies on disk quantized
    adapter        PEFT's layers on `meta`: the arithmetic of one module
    placing        which tensor of an adapter belongs where, and whether all fit
    combination    several adapters as one
    work           every tensor that will be written, planned
    merger         the arithmetic of one job: summed in float32, rounded once
    slices         the same for a plain linear layer, in slices that stay in the cache
    streaming      the work, done: a few modules in memory at a time, a worker on every core
    output         the shards while they are written
    staging        the folder: built beside its name, renamed when whole
    forward        logits of a model larger than memory
    rows           the text to compare on
    verification   merged against base + adapter, and against the base
    choice         original or quantized base
    heap           memory used again, a thread of arithmetic per core
    card, result   what is said about it
    merging        all of it, in order
    factors        the low-rank product nearest to a matrix
    extraction     an adapter from a fully fine-tuned model

Knows nothing about training or screens.
"""

from lora_cli.merge.combination import combine_adapters
from lora_cli.merge.extraction import extract
from lora_cli.merge.merging import merge
from lora_cli.merge.result import CombinedAdapter, Extraction, MergeReport

__all__ = ["CombinedAdapter", "Extraction", "MergeReport", "combine_adapters", "extract", "merge"]
