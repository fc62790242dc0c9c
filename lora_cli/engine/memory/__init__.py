"""The memory of a training step, before there is a device: the step run on `meta`, its storages recorded, and CUDA's
caching allocator replayed.

Knows nothing of configs, cards or screens.
"""
