"""From files and hub ids to tokenized examples with an exact loss mask, in a reproducible order.

    sources    a file, a saved folder or a hub id -> rows, each with its place
    formats    a row -> a conversation, a prompt with its completion, or a text
    template   a conversation -> rendered text with the spans that count (`shapes` makes it fast)
    plain      the layouts for tokenizers without a chat template
    encoding   rendered text -> token ids with one flag each
    tokenizing all rows of a source -> examples, with the account of every row
    loading    a config's sources -> train and validation examples (`cache`, `mixing`, `account`)
    order      seed, epoch, step -> which examples
    packing    lengths -> micro-batches, and shares of ranks

Knows tokenizers; knows nothing about models, devices or training.
"""
