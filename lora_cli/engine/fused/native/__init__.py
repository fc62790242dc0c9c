"""The fused layer's passes and its attention as C, compiled once by the machine's own compiler.

`compiled` finds the compiler and keeps what it makes; `kernels` calls it on tensors; `layer` is the decoder layer that
runs on it. Where there is no compiler, or what it makes doesn't load, plain PyTorch runs instead (`fused.layer`). What
is computed is proven at start-up as everything in `fused` is.
"""
