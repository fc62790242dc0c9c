"""The command line: parse, load the config, call one function, print its result.

    app        the commands by name, and `main`
    before     init, check, preview, params, estimate-vram, schema
    runs       train, eval
    generation generate, and the chat
    merging    merge, extract, export
    options    what several commands share
    help       the grouped help page, and typos
    failures   errors -> a message and an exit code
    quiet      what libraries say to each other stays off the screen
    network    no half minute of retries where there is no network

A command imports what it needs in its body: `lora --help` loads nothing, and a broken config is refused
before torch is loaded. Only this room exits. Screens are in `report`.
"""

from lora_cli.cli.app import main

__all__ = ["main"]
