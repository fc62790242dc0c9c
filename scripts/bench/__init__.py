"""lora beside its peers: the same model and rows, in turn, each a process of its own. Run by `bench_peers.py`."""
