"""The engine: packed batches, isolated attention, the loss at supervised positions, the step, and what proves them.

Stands between the commands (`train`, `evaluate`, `estimate`) and the rooms that hold model and data.
"""
