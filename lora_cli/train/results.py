"""What a run leaves: the adapter with tokenizer and card, summary.json, report.html."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_cli.config import Config, Source
from lora_cli.config.resolved import with_absolute_paths
from lora_cli.data.examples import Examples
from lora_cli.data.preview import token_texts
from lora_cli.engine.assembly import causal_lm
from lora_cli.engine.generation import Sampling, generate_batch
from lora_cli.engine.planning import Prepared
from lora_cli.plan import ModuleKind, ParameterReport
from lora_cli.report.events import Emit, Summary, Working
from lora_cli.report.html import ReportInput, render_report
from lora_cli.report.sections import MaskedExample, Sample
from lora_cli.report.svg import Mark
from lora_cli.runs.atomic import settle, write_json, write_text
from lora_cli.runs.card import model_card
from lora_cli.runs.folder import RunFolder
from lora_cli.train.disk import tensors_into
from lora_cli.train.loop import Loop
from lora_cli.train.memory import peak_memory_bytes
from lora_cli.train.position import LOSS_SPAN

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

SAMPLES = 5
SAMPLE_TOKENS = 64


def write_results(
    folder: RunFolder,
    model: PreTrainedModel | PeftModel,
    prepared: Prepared,
    loop: Loop,
    emit: Emit,
    base_texts: Sequence[str] | None = None,
) -> Summary:
    """Write the result of a finished run; every process calls it, the main one writes.

    Args:
        base_texts: what the base makes of the sample prompts, where it is known: `base_samples`.
    """
    if not loop.world.is_main:
        loop.world.wait()
        return _summary(folder, prepared, loop)
    emit(Working("writing the adapter"))
    _save_adapter(folder, model, prepared)
    summary = _summary(folder, prepared, loop)
    if prepared.config.adapter is not None:
        card = model_card(folder.path.name, prepared.plan, summary.as_json(), _sources(prepared.config))
        write_text(folder.adapter_dir / "README.md", card)
    emit(Working("writing samples"))
    samples = _samples(model, prepared, loop, base_texts)
    write_text(folder.report_file, _report(folder, prepared, loop, summary, samples))
    write_json(folder.summary_file, summary.as_json())  # last: a run that has one is finished
    loop.world.wait()
    return summary


def read_summary(folder: RunFolder) -> Summary | None:
    """The summary of a finished run; None while there is none, or what it speaks of isn't there."""
    if not (folder.summary_file.is_file() and folder.adapter_dir.is_dir()):
        return None
    values = json.loads(folder.summary_file.read_text(encoding="utf-8"))
    counts = values.pop("parameters")
    kinds = tuple(ModuleKind(**kind) for kind in counts["by_module"].values())
    return Summary(**values, parameters=ParameterReport(counts["trainable"], counts["total"], kinds))


def _save_adapter(folder: RunFolder, model: PreTrainedModel | PeftModel, prepared: Prepared) -> None:
    """The adapter (or the whole model in full fine-tuning) in PEFT's or transformers' own format, atomically."""
    from peft import PeftModel

    temporary = folder.adapter_dir.with_name(".adapter.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if isinstance(model, PeftModel):  # found again from any working directory
        base = with_absolute_paths(prepared.config).model.name_or_path
        model.peft_config["default"].base_model_name_or_path = base
    with tensors_into(temporary):
        model.save_pretrained(str(temporary))
    prepared.tokenizer.save_pretrained(temporary)
    settle(temporary)
    before = folder.adapter_dir.with_name(".adapter.before.tmp")  # of a run that was extended
    shutil.rmtree(before, ignore_errors=True)
    if folder.adapter_dir.exists():
        os.replace(folder.adapter_dir, before)
    os.replace(temporary, folder.adapter_dir)
    shutil.rmtree(before, ignore_errors=True)


def _summary(folder: RunFolder, prepared: Prepared, loop: Loop) -> Summary:
    position = loop.position
    span = min(LOSS_SPAN, max(1, position.steps_counted // 2))
    evaluations = position.eval_losses
    return Summary(
        steps=position.step,
        num_tokens=position.num_tokens,
        num_supervised_tokens=position.num_supervised_tokens,
        train_seconds=position.train_seconds,
        tokens_per_second=position.num_tokens / max(position.train_seconds, 1e-9),
        first_loss=_mean(position.first_losses[:span]),
        final_loss=_mean(position.last_losses[-span:]),
        loss_span=span,
        first_eval_loss=evaluations[0][1] if evaluations else None,
        final_eval_loss=evaluations[-1][1] if evaluations else None,
        best_eval_loss=position.best_eval_loss,
        best_step=position.best_step,
        peak_memory_bytes=peak_memory_bytes(loop.world.device),
        output_dir=str(folder.path),
        adapter_dir=str(folder.adapter_dir),
        adapter_bytes=sum(path.stat().st_size for path in folder.adapter_dir.glob("*.safetensors")),
        stopped=loop.stopped,
        parameters=prepared.plan.parameters,
    )


def _mean(losses: list[list[float]]) -> float:
    """The token-weighted mean of [loss sum, supervised tokens] pairs."""
    total = sum(count for _, count in losses)
    return sum(loss for loss, _ in losses) / total if total else float("nan")


def base_samples(model: PreTrainedModel | PeftModel, prepared: Prepared, loop: Loop) -> list[str]:
    """What the base makes of the first validation prompts; nothing in full fine-tuning, whose base is gone."""
    from peft import PeftModel

    if prepared.validation is None or not isinstance(model, PeftModel):
        return []
    with model.disable_adapter():
        return _texts(model, prepared, loop)


def _samples(
    model: PreTrainedModel | PeftModel, prepared: Prepared, loop: Loop, base_texts: Sequence[str] | None
) -> list[Sample]:
    """What base and adapter make of the same prompts."""
    before = base_samples(model, prepared, loop) if base_texts is None else base_texts
    if not before:
        return []
    after, decode = _texts(model, prepared, loop), prepared.tokenizer.decode
    return [
        Sample(
            prompt=str(decode(prompt)),
            reference=str(decode(reference, skip_special_tokens=True)),
            base=base,
            adapter=adapter,
        )
        for (prompt, reference), base, adapter in zip(_sample_rows(prepared), before, after, strict=True)
    ]


def _texts(model: PreTrainedModel | PeftModel, prepared: Prepared, loop: Loop) -> list[str]:
    prompts, sampling = [prompt for prompt, _ in _sample_rows(prepared)], Sampling(max_new_tokens=SAMPLE_TOKENS)
    computation, stops = loop.learner.computation, prepared.stop_token_ids
    answers = generate_batch(causal_lm(model), computation, prepared.tokenizer, prompts, stops, sampling)
    return [answer.text for answer in answers]


def _sample_rows(prepared: Prepared) -> list[tuple[list[int], list[int]]]:
    assert prepared.validation is not None
    return [prompt_and_reference(prepared.validation, i) for i in range(min(SAMPLES, len(prepared.validation)))]


def prompt_and_reference(examples: Examples, index: int) -> tuple[list[int], list[int]]:
    """Token ids before the first trained token, and the first run of trained ones."""
    example = examples.example(index)
    start = int(np.argmax(example.trained))
    rest = example.trained[start:]
    length = len(rest) if rest.all() else int(np.argmin(rest))
    return example.input_ids[:start].tolist(), example.input_ids[start : start + length].tolist()


def _report(folder: RunFolder, prepared: Prepared, loop: Loop, summary: Summary, samples: list[Sample]) -> str:
    config, metrics = prepared.config, folder.read_metrics()
    return render_report(
        ReportInput(
            name=folder.path.name,
            config_text=folder.config_file.read_text(encoding="utf-8"),
            environment=json.loads(folder.environment_file.read_text(encoding="utf-8")),
            metrics=metrics,
            summary=summary.as_json(),
            samples=samples,
            command="lora train config.yaml --output-dir NEW",
            warnings=(*prepared.plan.warnings, *prepared.plan.engine.notes),
            marks=_marks(folder.checkpoint_steps(), loop.position.resumed_after, metrics),
            data=asdict(prepared.train.account),
            max_length=config.data.max_length,
            example=_first_example(prepared),
            non_defaults=_non_defaults(config),
            max_grad_norm=config.train.max_grad_norm,
            estimated_bytes=None if prepared.plan.memory is None else prepared.plan.memory.allocated_bytes,
        )
    )


def _marks(checkpoints: Sequence[int], resumed: Sequence[int], metrics: Sequence[Mapping[str, Any]]) -> list[Mark]:
    """What happened on the way: checkpoints that are there, resumes, micro-batches halved for want of memory."""
    halvings = [line for line in metrics if line.get("out_of_memory")]
    return [
        *(Mark(step, "checkpoint", f"checkpoint at step {step:,}") for step in checkpoints),
        *(Mark(step, "resume", f"resumed after step {step:,}") for step in resumed),
        *(
            Mark(line["step"], "halving", f"out of memory: micro-batches of {line['micro_batch_tokens']:,} tokens")
            for line in halvings
        ),
    ]


def _first_example(prepared: Prepared) -> MaskedExample:
    """The first training example, its text in pieces that are trained or not."""
    example = prepared.train.example(0)
    texts = token_texts(prepared.tokenizer, example.input_ids.tolist())
    pairs = zip(texts, map(bool, example.trained), strict=True)
    pieces = [
        ("".join(text for text, _ in group), trained) for trained, group in groupby(pairs, key=lambda pair: pair[1])
    ]
    return MaskedExample(prepared.train.places[0], pieces)


def _non_defaults(config: Config) -> frozenset[str]:
    """Dotted keys of the settings that the user gave or that a device decided."""
    found: set[str] = set()

    def walk(value: Any, prefix: str) -> None:
        for name in type(value).model_fields:
            inner, key = getattr(value, name), f"{prefix}{name}"
            if hasattr(type(inner), "model_fields"):
                walk(inner, f"{key}.")
            elif name in value.model_fields_set and inner != type(value).model_fields[name].default:
                found.add(key)

    walk(config, "")
    return frozenset(found)


def _sources(config: Config) -> list[str]:
    sources: tuple[Source, ...] = config.data.train
    return [source.path for source in sources]
