"""Standard benchmarks: tasks of EleutherAI's lm-evaluation-harness, base beside adapter, document by document.

The harness asks and marks; base and adapter see the same documents, so that their difference has a paired interval,
which two separate runs of the harness don't give. Needs `pip install lora-cli[harness]`. A task is one that the harness
knows or a YAML file of one's own; such a file may run code, as the harness's own do. Knows nothing about our rows.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_cli.engine.generation import generating
from lora_cli.engine.trained import find_target
from lora_cli.errors import UserError
from lora_cli.evaluate.models import (
    Loaded,
    Reader,
    check_results,
    load_target,
    read_target,
    trained_folder,
)
from lora_cli.evaluate.records import refuse_occupied, refuse_unwritable, write_records
from lora_cli.evaluate.rows import rows_name
from lora_cli.evaluate.statistics import Ratio, compare
from lora_cli.report.comparison import Measure
from lora_cli.report.events import Emit, Warned, Working, ignore
from lora_cli.report.tasks import TaskComparison, TaskEvaluation, TaskFigure
from lora_cli.report.tasks_page import render_tasks_page

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel

_BATCH = 8

Key = tuple[str, str, str]
"""(task, metric, filter)"""


@dataclass(frozen=True)
class Marked:
    """What the harness made of one model."""

    figures: dict[Key, float]
    documents: dict[Key, list[Any]]
    """Of each figure, what every document was given."""
    higher_is_better: dict[tuple[str, str], bool]


@dataclass(frozen=True)
class Session:
    """The tasks, and how they are put."""

    tasks: tuple[str, ...]
    manager: TaskManager
    reader: Reader
    num_fewshot: int | None
    limit: int | None
    chat: bool

    def mark(self, model: PreTrainedModel, loaded: Loaded) -> Marked:
        """Run the tasks on a model, with its own attention and a cache."""
        from lm_eval import simple_evaluate

        with generating(model, loaded.computation), loaded.computation.autocast(loaded.device):
            results = simple_evaluate(
                model=_harness_model(model, self.reader),
                tasks=list(self.tasks),
                task_manager=self.manager,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                apply_chat_template=self.chat,
                bootstrap_iters=0,  # our intervals are paired
                log_samples=True,
            )
        assert results is not None
        return _read(results)


def evaluate_tasks(
    target: Path | str,
    tasks: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    adapters: Sequence[str] = (),
    as_trained: bool = True,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    fail_if_worse: bool = False,
    output: Path | str | None = None,
    emit: Emit = ignore,
) -> TaskEvaluation:
    """Base and adapter on tasks of the harness.

    Args:
        tasks: names that the harness knows, or YAML files.
        as_trained: the base quantized as in training; otherwise its original weights.
        num_fewshot, limit: as the harness has them; `limit` counts documents of each task.
        chat: put the questions through the tokenizer's chat template.
        fail_if_worse: kept in the result, whose `meets_demand` says if it is met.

    Raises:
        UserError: the harness isn't there, doesn't know a task or can't get its data; anything wrong with the target.
    """
    if find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness", remedy="pip install 'lora-cli[harness]'")
    found = find_target(target, overrides)
    results = [found.result, *map(trained_folder, adapters)]
    check_results(results)
    folder = Path(output).expanduser().absolute() if output is not None else None
    if folder is None and found.run is not None:
        folder = found.run.eval_dir(rows_name(", ".join(tasks)))
    elif folder is not None:
        refuse_occupied(folder)
        refuse_unwritable(folder)
    reader = read_target(found)
    if chat and not reader.tokenizer.chat_template:
        raise UserError("--apply-chat-template: the tokenizer has no chat template", remedy="Leave it out.")
    for text in found.doubts:
        emit(Warned(text))
    emit(Working("reading tasks"))
    session = Session(tuple(tasks), _load(tasks), reader, num_fewshot, limit, chat)
    loaded = load_target(found, reader, emit, quantized=as_trained)
    emit(Working(f"{', '.join(tasks)}: the base"))
    base = session.mark(loaded.base, loaded)
    comparisons = []
    marks = []
    for result in results:
        with loaded.trained(result) as model:
            emit(Working(f"{', '.join(tasks)}: {result}"))
            adapter = session.mark(model, loaded)
        marks.append(adapter)
        figures = _figures(base, adapter, seed=found.config.train.seed)
        comparisons.append(TaskComparison(str(result), loaded.precision_of(result), figures))
    evaluation = TaskEvaluation(
        found.name,
        tuple(tasks),
        comparisons[0],
        tuple(comparisons[1:]),
        num_fewshot,
        limit,
        chat,
        fail_if_worse,
        folder,
    )
    if folder is not None:
        write_records(folder, evaluation.as_json(), _columns(base, marks), render_tasks_page(evaluation))
    return evaluation


def _load(tasks: Sequence[str]) -> TaskManager:
    """The harness's task manager, after it has read every task and its data once."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = all(Path(task).is_file() for task in tasks)
    for task in tasks:
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
            raise UserError(f"--tasks: no file {Path(task).absolute()}")
    manager = TaskManager(include_defaults=not own)
    for task in tasks:
        try:
            found = manager.load([task])["tasks"]
        except KeyError as error:
            raise UserError(
                f"--tasks {task}: the harness knows no such task: {_first_line(error)}",
                remedy="`lm-eval ls tasks` lists what it knows; a task of your own is given as its YAML file.",
            ) from error
        except Exception as error:  # whatever a task's file, its code or its data's loader raise
            raise UserError(f"--tasks {task}: it can't be loaded: {_first_line(error)}") from error
        if not found:
            raise UserError(f"--tasks {task}: there is no task in it")
    return manager


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _harness_model(model: PreTrainedModel, reader: Reader) -> Any:
    """The live model as the harness takes it."""
    from lm_eval.models.huggingface import HFLM

    class Silent(HFLM):  # type: ignore[misc]
        """Without progress bars of its own."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    return Silent(
        pretrained=model,
        backend="causal",
        tokenizer=copy.deepcopy(reader.tokenizer),  # it sets a padding token
        max_length=reader.position_limit,
        batch_size=_BATCH,
        softmax_dtype=torch.float32,
    )


def _read(results: Any) -> Marked:
    figures: dict[Key, float] = {}
    documents: dict[Key, list[Any]] = {}
    for name, values in {**results["results"], **results.get("groups", {})}.items():
        for key, value in values.items():
            metric, comma, filter_ = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                figures[name, metric, filter_] = float(value)
    for name, samples in results["samples"].items():
        for sample in sorted(samples, key=lambda one: one["doc_id"]):
            for metric in sample["metrics"]:
                documents.setdefault((name, metric, sample["filter"]), []).append(sample[metric])
    better = {
        (name, metric): bool(value)
        for name, metrics in results["higher_is_better"].items()
        for metric, value in metrics.items()
        if value is not None
    }
    return Marked(figures, documents, better)


def _figures(base: Marked, adapter: Marked, *, seed: int) -> tuple[TaskFigure, ...]:
    found = []
    for key, value in base.figures.items():
        task, metric, filter_ = key
        name = metric if filter_ == "none" else f"{metric}, {filter_}"
        marks = [_as_mean(one.documents.get(key, []), one.figures[key]) for one in (base, adapter)]
        if marks[0] is not None and marks[1] is not None and len(marks[0]):
            ratio = Ratio(name, marks[0], marks[1], np.ones(len(marks[0])))
            [measure] = compare([ratio], seed=seed)
        else:
            measure = Measure(name, value, adapter.figures[key], adapter.figures[key] - value, np.nan, np.nan)
        higher = base.higher_is_better.get((task, metric), True)
        found.append(TaskFigure(task, measure, len(base.documents.get(key, [])), higher))
    return tuple(found)


def _as_mean(values: Sequence[Any], figure: float) -> Any:
    """What documents were given, if their mean is the figure; a perplexity or an F1 over all is none."""
    if not values or not all(isinstance(value, bool | int | float | np.number) for value in values):
        return None
    marks = np.array([float(value) for value in values])
    return marks if np.isclose(marks.mean(), figure, rtol=1e-9, atol=1e-12) else None


def _columns(base: Marked, adapters: Sequence[Marked]) -> dict[str, list[Any]]:
    """rows.parquet: what every document was given, by every model."""
    columns: dict[str, list[Any]] = {name: [] for name in ("task", "metric", "filter", "document", "base")}
    columns |= {"adapter" if number == 1 else f"adapter_{number}": [] for number in range(1, len(adapters) + 1)}
    for key, values in base.documents.items():
        if not all(isinstance(value, bool | int | float | np.number) for value in values):
            continue
        for number, value in enumerate(values):
            for name, text in zip(("task", "metric", "filter"), key, strict=True):
                columns[name].append(text)
            columns["document"].append(number)
            columns["base"].append(float(value))
            for position, one in enumerate(adapters, start=1):
                name = "adapter" if position == 1 else f"adapter_{position}"
                columns[name].append(float(one.documents[key][number]))
    return columns
