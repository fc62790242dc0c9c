"""Text from a base and from adapters on it, for prompts as a user types them.

A prompt is laid out as the rows were in training: through the chat template where there is one, as a task
where the run was trained on instructions, as it is otherwise. Knows nothing about figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_cli.data.formats import Completion
from lora_cli.data.jinja import JinjaTemplate
from lora_cli.data.loading import open_sources, set_chat_template
from lora_cli.data.plain import PlainLayout
from lora_cli.engine.generation import Generated, Sampling
from lora_cli.errors import DataError, UserError
from lora_cli.evaluate.answers import answer_all
from lora_cli.evaluate.models import Reader, load_target, read_target
from lora_cli.evaluate.target import Target, adapter_folder, find_target
from lora_cli.report.comparison import Generations, Output
from lora_cli.report.events import Emit, Working, ignore


def generate(
    target: Path | str,
    *,
    prompts: Sequence[str],
    adapters: Sequence[str] = (),
    sampling: Sampling,
    overrides: Sequence[str] = (),
    raw: bool = False,
    emit: Emit = ignore,
) -> Generations:
    """Answers of the base, of the target's adapter, and of further adapters on the same base.

    Args:
        raw: give the prompts to the model as they are.

    Raises:
        UserError: no prompt, a prompt that is too long, or anything wrong with target and adapters.
    """
    if not prompts:
        raise UserError("no prompt", remedy="Give --prompt TEXT or --prompts-file PATH.")
    found = find_target(target, overrides)
    folders = [found.result, *map(adapter_folder, adapters)]
    reader = read_target(found)
    set_chat_template(found.config.data, reader.tokenizer)
    tokens = [prompt_tokens(prompt, found, reader, raw=raw) for prompt in prompts]
    loaded = load_target(found, reader, emit)

    def progress(done: int, total: int) -> None:
        emit(Working("generating", done, total, "answers"))

    by_adapter: dict[str | None, list[Generated]] = {
        None: answer_all(loaded.base, loaded, reader, tokens, sampling, progress=progress)
    }
    for folder in folders:
        with loaded.trained(folder) as model:
            by_adapter[str(folder)] = answer_all(model, loaded, reader, tokens, sampling, progress=progress)
    return Generations(
        tuple(
            Output(prompt, adapter, answers[number].text, answers[number].stop_reason)
            for number, prompt in enumerate(prompts)
            for adapter, answers in by_adapter.items()
        )
    )


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """Prompts as given, then those of a file, one in each line that isn't blank.

    Raises:
        UserError: the file can't be read.
    """
    if file is None:
        return list(prompts)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts-file {file.absolute()} can't be read: {error}") from error
    return [*prompts, *(line for line in lines if line.strip())]


def prompt_tokens(prompt: str, target: Target, reader: Reader, *, raw: bool) -> list[int]:
    """The token ids that a model is given for a prompt.

    Raises:
        UserError: it is empty, or leaves no room to answer in.
    """
    tokenizer = reader.tokenizer
    if tokenizer.chat_template and not raw:
        text = JinjaTemplate(tokenizer).render([{"role": "user", "content": prompt}], (), generation=True)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        laid_out = PlainLayout(tokenizer).completion(
            Completion(prompt, "", instruction=not raw and _trained_on_instructions(target))
        )
        ids = [*laid_out.before, *tokenizer(laid_out.text, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise UserError("an empty prompt", remedy="Give at least one word.")
    if reader.position_limit is not None and len(ids) >= reader.position_limit:
        begins = f"{prompt[:40]!r}..."
        raise UserError(
            f"a prompt of {len(ids):,} tokens fills the model's {reader.position_limit:,} positions: {begins}"
        )
    return ids


def _trained_on_instructions(target: Target) -> bool:
    if target.bare:
        return False
    data = target.config.data
    try:
        return open_sources(data.train)[0].reader(data).format == "instruction"
    except DataError:  # the rows are no longer there
        return data.format == "instruction"
