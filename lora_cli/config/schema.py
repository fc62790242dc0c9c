"""The config as frozen, typed values: every key with its type, range, default and documentation.

The string under a field is its documentation; the JSON Schema, the starter config, the errors and the
reference page all take it from here, and its first sentence must make sense alone. Knows nothing of YAML
(`load`), of rules between fields (`contradictions`), or of torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lora_cli.config.kinds import (
    Alpha,
    BelowOne,
    Count,
    Dtype,
    ListOf,
    ListOrEmpty,
    LocalOrHub,
    NonNegativeNumber,
    Optimizer,
    PositiveNumber,
    RowFormat,
    Scheduler,
    Section,
    Share,
    Text,
    Tracker,
    as_sources,
)


class QuantizationConfig(Section):
    """Base weights in 4 or 8 bits, through bitsandbytes."""

    type: Literal["nf4", "fp4", "int8"]
    """How the base weights are stored. nf4 is QLoRA's."""

    double_quant: bool = Field(
        default_factory=lambda data: data.get("type") != "int8", json_schema_extra={"default": True}
    )
    """Quantize the 4-bit scales as well. Saves about 0.4 bits per weight; int8 has no such scales."""

    compute_dtype: Dtype = "auto"
    """The dtype that weights are dequantized to. auto is the model's dtype."""

    allow_partial: bool = False
    """Accept a base of which more than 10 % stays unquantized. Fused experts, for instance."""


class ModelConfig(Section):
    """The base model."""

    name_or_path: LocalOrHub
    """A hub id, or a folder with config.json, weights and tokenizer."""

    revision: Text | None = None
    """A branch, tag or commit on the hub. null is the newest commit of the main branch."""

    dtype: Dtype = "auto"
    """The dtype of the frozen weights. auto is bfloat16 where it is native, else float16 on CUDA, else
    float32."""

    quantization: QuantizationConfig | None = None
    """{type: nf4}, fp4 or int8 for a quantized base, or null. nf4 makes it QLoRA."""

    attn_implementation: Literal["auto", "documents", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    """The attention operator, by transformers' names. auto is documents, which keeps packed examples
    apart, where it is proven."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    resize_embeddings: bool = False
    """Add rows for a tokenizer that is larger than the model. Without it, such a pair is refused."""


class AdapterConfig(Section):
    """The LoRA adapter, by the names of PEFT's LoraConfig."""

    r: Count = 16
    """Rank of the update."""

    lora_alpha: Alpha = Field(default_factory=lambda data: 2 * data.get("r", 1), json_schema_extra={"default": None})
    """Scale of the update is lora_alpha / r; null is twice r."""

    lora_dropout: BelowOne = 0.0
    """Dropout before the adapter. Above 0, results depend on how examples are packed."""

    target_modules: Text | ListOf[Text] | None = "all-linear"
    """Modules that get one: all-linear, names, or a regular expression. It matches full names."""

    exclude_modules: Text | ListOf[Text] | None = None
    """Modules left out, as a list of names or a regular expression."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained."""

    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r). Steadier at high ranks."""

    use_dora: bool = False
    """Weight-decomposed LoRA. Slower, sometimes better at low ranks."""

    modules_to_save: ListOf[Text] | None = None
    """Modules trained in full and saved with the adapter. Such as lm_head or embed_tokens."""

    init_lora_weights: Literal["gaussian", "orthogonal"] | bool = True
    """How A starts. true is PEFT's default, with B at zero; false starts away from the base, for tests."""

    layers_to_transform: Annotated[int, Field(ge=0)] | ListOf[Annotated[int, Field(ge=0)]] | None = None
    """Numbers of the layers that get an adapter, counted from 0. null is all."""

    rank_pattern: dict[str, Count] | None = None
    """Other ranks for some modules, by name or regular expression."""

    alpha_pattern: dict[str, Count] | None = None
    """Other lora_alpha for some modules, by name or regular expression."""

    target_parameters: ListOf[Text] | None = None
    """Parameters, not modules, that get an adapter. For experts that are kept in one tensor."""

    path: LocalOrHub | None = None
    """An existing adapter to go on from."""


class Source(Section):
    """One source of rows."""

    path: LocalOrHub
    """A jsonl, json, csv or parquet file, a folder saved by datasets, or a hub id."""

    split: Text | None = None
    """The split of a dataset that has several."""

    revision: Text | None = None
    """A branch, tag or commit on the hub."""

    format: RowFormat | None = None
    """What a row is. null is data.format."""

    weight: PositiveNumber | None = None
    """Expected share of the examples, relative to the other sources' weights."""

    columns: dict[str, Text] | None = None
    """Other column names. null is data.columns."""


Sources = Annotated[
    ListOf[Source],
    BeforeValidator(as_sources, json_schema_input_type=Text | Source | ListOf[Text | Source]),
]


class DataConfig(Section):
    """What is trained on."""

    train: Sources
    """A file, a hub id, or a list of {path, split, format, weight}."""

    validation: Share | Sources | None = None
    """Held-out rows: the same, or a share of the training rows. Such as 0.05, drawn by train.seed."""

    format: RowFormat = "auto"
    """What a row is. auto looks at the columns."""

    max_length: Annotated[int, Field(ge=2)] = 2048
    """Longest example, in tokens."""

    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What becomes of a longer one. It is counted and reported in any case."""

    train_on: Literal["assistant", "all"] = "assistant"
    """Whose words are trained. Text rows always train everything."""

    columns: dict[str, Text] | None = None
    """Other column names, such as {messages: dialog}."""

    chat_template: Text | None = None
    """A Jinja file to use instead of the tokenizer's chat template."""

    cache: bool = True
    """Keep tokenized rows for the next start."""


class TrainConfig(Section):
    """How it is trained, by the names of transformers' TrainingArguments where one exists."""

    num_train_epochs: PositiveNumber = 3.0
    """Passes over the data."""

    max_steps: Count | None = None
    """Optimizer steps. Overrides num_train_epochs."""

    batch_size: Count = 16
    """Examples per optimizer step, all devices together. The result depends on it."""

    micro_batch_tokens: Literal["auto"] | Count = "auto"
    """Tokens that go through the model at once. Changes memory and speed, not the result."""

    learning_rate: PositiveNumber = 2e-4
    """The highest learning rate of the schedule."""

    lr_scheduler_type: Scheduler = "cosine"
    """Shape of the learning rate over the run, by transformers' names."""

    lr_scheduler_kwargs: dict[str, int | float] = Field(default_factory=dict)
    """Numbers that the schedule takes, such as {min_lr_rate: 0.1}."""

    warmup_steps: Annotated[int, Field(ge=0)] | BelowOne = Field(
        default_factory=lambda data: 0 if data.get("lr_scheduler_type") == "constant" else 0.03,
        json_schema_extra={"default": 0.03},
    )
    """Steps until the learning rate is reached; below 1, a share of all."""

    weight_decay: NonNegativeNumber = 0.0
    """Decoupled weight decay."""

    adam_beta1: BelowOne = 0.9
    """Decay of the mean of gradients."""

    adam_beta2: BelowOne = 0.999
    """Decay of the mean of squared gradients."""

    adam_epsilon: PositiveNumber = 1e-8
    """Added to the denominator of Adam's update."""

    max_grad_norm: PositiveNumber | None = 1.0
    """Gradients with a larger norm are scaled down to it. null is no clipping."""

    optim: Optimizer = "adamw_torch"
    """The optimizer, by transformers' names."""

    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass. Less memory, about a third more time."""

    activation_offloading: Literal["auto"] | bool = "auto"
    """With checkpointing, keep each layer's input in host memory meanwhile. auto does so where nothing else fits."""

    loss: Literal["chunked", "full"] = "chunked"
    """chunked never holds all logits. full is transformers' own loss, for comparisons."""

    fused: bool = True
    """Layers of known make run by arithmetic that is proven equal to their own at start-up, and faster."""

    flash_attention_4: bool = True
    """Attention by FlashAttention 4, where the package flash-attn-4 is installed and proven right on the card:
    Hopper, Blackwell."""

    logging_steps: Count = 10
    """Steps between two lines of metrics."""

    eval_steps: Count | Share | None = None
    """Steps between two evaluations; below 1, a share of all. null evaluates at the end."""

    save_steps: Count | None = None
    """Steps between two checkpoints; null saves at the end."""

    save_minutes: PositiveNumber | None = None
    """Minutes between two checkpoints, as well as save_steps or instead of it."""

    save_total_limit: Count | None = 2
    """Checkpoints that are kept. null keeps all."""

    load_best_model_at_end: bool = False
    """The result is the state with the lowest validation loss, not the last one."""

    early_stopping_patience: Count | None = None
    """Stop after this many evaluations without a lower validation loss."""

    report_to: ListOrEmpty[Tracker] = ()
    """Experiment trackers: tensorboard, wandb, mlflow, trackio."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Order of the data, validation share, start of the adapter, dropout."""


class HalvingConfig(Section):
    """Early stopping of the worst members of a sweep."""

    every: Count
    """Steps between two rankings by validation loss. Members that are dropped end there, with their adapter."""

    keep: Share = 0.5
    """Share of the members that goes on, rounded up. 0.5 is successive halving."""

    at_least: Count = 1
    """Members that always go on."""


class SweepConfig(Section):
    """What `lora sweep` varies. Every other command takes the config around it."""

    grid: dict[Text, ListOf[Any]] = Field(min_length=1)
    """Settings by their dotted names, each with a list of values. Every combination is a member."""

    halving: HalvingConfig | None = None
    """{every: 100} drops the worst half of the members every 100 steps; null trains all to the end."""

    max_members: Count = 64
    """A grid with more combinations is refused."""


class Config(Section):
    """The whole config of a run."""

    model: ModelConfig
    """The base model."""

    adapter: AdapterConfig | None = Field(default_factory=AdapterConfig)
    """The LoRA adapter; null trains all weights."""

    data: DataConfig
    """What is trained on."""

    train: TrainConfig = Field(default_factory=TrainConfig)
    """How it is trained."""

    sweep: SweepConfig | None = None
    """A grid of settings whose combinations `lora sweep` trains at the same time. Other commands don't read it."""

    output_dir: LocalOrHub
    """The folder of this run. It must not hold another one."""
