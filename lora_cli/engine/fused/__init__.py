"""The arithmetic of adapted layers by hand: one autograd node where PEFT and transformers make dozens.

`layer` is a whole decoder layer of Llama's kind; `linear` an adapted linear layer of any model. Both are tried on a
small copy of the model at start-up, values and gradients, before they are used (`engine.selftest`); a model that they
don't fit runs PEFT's own code. For a CPU: what they avoid is passes over memory.
"""
