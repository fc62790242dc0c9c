"""Trained models for other programs: GGUF for llama.cpp, a Modelfile for Ollama, a command line for vLLM.

    architectures  what GGUF says of an architecture, and how its tensors lie there
    vocabulary     the tokenizer, in GGUF's words
    gguf           a whole model as a GGUF file
    adapter        an adapter as a GGUF file, unmerged
    converter      llama.cpp's own converter, where it is present
    turns          a chat template taken apart, and put together in Ollama's language
    ollama         the Modelfile
    vllm           the command line that serves an adapter unmerged, and what vLLM refuses
    exporting      all of it

What can't be converted says why. Knows nothing about training or screens; reads models with `merge`'s eyes.
"""

from lora_cli.export.exporting import Destination, Exported, export

__all__ = ["Destination", "Exported", "export"]
