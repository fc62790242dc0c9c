"""The base model, its tokenizer and its adapter: read, quantized, attached and counted.

Knows transformers, PEFT and bitsandbytes; knows nothing about training steps, data or screens.
"""
