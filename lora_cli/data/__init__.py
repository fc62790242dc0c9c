"""From files and hub ids to tokenized examples with an exact loss mask, in a reproducible order.

    sources    a file, a saved folder or a hub id -> rows, each with its place
    formats    a row -> a conversation, a prompt with its completion, or a text
    jinja      messages -> text, the same on every day
    template   a conversation -> rendered text with the spans that count (`shapes` makes it fast)
    plain      the layouts for tokenizers without a chat template
    encoding   rendered text -> token ids with one flag each
    tokenizing rows -> examples
    chunks     all rows of a source -> arrays, with the tally of every row (`parallel`: by several processes)
    loading    a config's sources -> train and validation examples (`cache`, `parts`, `mixing`, `account`)
    order      seed, epoch, step -> which examples
    packing    lengths -> micro-batches, and shares of ranks

Knows tokenizers; knows nothing about models, devices or training.
"""
