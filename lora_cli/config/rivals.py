"""What other tools call the things that a config says here.

Names of axolotl, LLaMA-Factory, TRL and transformers, torchtune and Unsloth, each with the key that it is
here, or with what to do instead. Used only to answer an unknown key.
"""

from __future__ import annotations

_BATCH = "train.batch_size, the examples per optimizer step over all devices"
_PACKED = "nothing to set: examples are always packed, and never see each other"
_WHERE = "nothing to set: every evaluation and checkpoint goes into the run folder"

KEYS: dict[str, str] = {
    "model.name_or_path": (
        "base_model model_name model_name_or_path model_id model_path pretrained_model_name_or_path"
    ),
    "model.revision": "model_revision revision_of_model base_model_revision",
    "model.dtype": "torch_dtype bf16 fp16 pure_bf16 precision compute_type",
    "model.quantization": "quantization_config quantize_base bnb_config quantization_method",
    "model.quantization.type": "bnb_4bit_quant_type quantization_type quant_type",
    "model.quantization.double_quant": (
        "bnb_4bit_use_double_quant use_bnb_nested_quant double_quantization use_double_quant"
    ),
    "model.quantization.compute_dtype": "bnb_4bit_compute_dtype",
    "model.attn_implementation": (
        "flash_attention flash_attn use_flash_attention use_flash_attention_2 sdp_attention attention"
    ),
    "model.resize_embeddings": "resize_token_embeddings_to_32x resize_vocab",
    "adapter": "lora peft peft_config lora_config finetuning_type use_peft lora_parameters",
    "adapter.r": "lora_r lora_rank rank",
    "adapter.lora_alpha": "alpha lora_scaling",
    "adapter.lora_dropout": "dropout",
    "adapter.target_modules": (
        "lora_target lora_target_modules lora_target_linear lora_attn_modules apply_lora_to_mlp lora_layers targets"
    ),
    "adapter.modules_to_save": "lora_modules_to_save additional_target",
    "adapter.use_dora": "peft_use_dora dora",
    "adapter.use_rslora": "peft_use_rslora rslora use_rs_lora",
    "adapter.init_lora_weights": "peft_init_lora_weights pissa_init",
    "adapter.layers_to_transform": "peft_layers_to_transform lora_layers_to_transform",
    "adapter.target_parameters": "lora_target_parameters",
    "adapter.path": "adapter_name_or_path lora_model_dir lora_path adapter_path",
    "data": "dataset_config",
    "data.train": (
        "dataset datasets dataset_name dataset_path data_path train_file train_data train_dataset train_path"
    ),
    "data.validation": (
        "eval_dataset test_datasets val_set_size val_size validation_file validation_dataset eval_file "
        "val_data valid val eval_data test_size"
    ),
    "data.format": "dataset_format formatting type",
    "data.max_length": (
        "max_seq_length max_seq_len cutoff_len sequence_len model_max_length block_size max_len "
        "seq_length sequence_length context_length"
    ),
    "data.overlong": "excess_length_strategy truncation",
    "data.train_on": (
        "train_on_inputs train_on_input train_on_source completion_only_loss assistant_only_loss "
        "roles_to_train train_on_responses_only mask_history mask_prompt"
    ),
    "data.columns": ("dataset_text_field column_map field_messages field_instruction message_property_mappings tags"),
    "data.chat_template": "chat_template_jinja chat_template_path template",
    "data.cache": "dataset_prepared_path overwrite_cache tokenized_path",
    "train": "training trainer training_args training_arguments sft hyperparameters",
    "train.num_train_epochs": "epochs num_epochs n_epochs train_epochs max_epochs",
    "train.max_steps": "max_steps_per_epoch num_steps iters total_steps train_steps",
    "train.learning_rate": "lr learning_rate_max peak_lr",
    "train.lr_scheduler_type": "lr_scheduler scheduler lr_schedule schedule scheduler_type",
    "train.lr_scheduler_kwargs": "scheduler_kwargs lr_scheduler_args cosine_min_lr_ratio",
    "train.warmup_steps": "warmup_ratio warmup num_warmup_steps lr_warmup_steps",
    "train.weight_decay": "wd",
    "train.max_grad_norm": "clip_grad_norm gradient_clipping grad_clip max_gradient_norm max_norm",
    "train.optim": "optimizer optimizer_name optimiser",
    "train.gradient_checkpointing": (
        "enable_activation_checkpointing activation_checkpointing use_gradient_checkpointing grad_checkpoint"
    ),
    "train.activation_offloading": "enable_activation_offloading offload_activations cpu_offload_activations",
    "train.logging_steps": "log_every_n_steps log_steps log_interval steps_per_report",
    "train.eval_steps": (
        "evals_per_epoch eval_strategy evaluation_strategy do_eval run_val_every_n_steps steps_per_eval "
        "eval_interval eval_every"
    ),
    "train.save_steps": "saves_per_epoch save_strategy save_every save_every_n_steps checkpoint_every",
    "train.save_total_limit": "keep_last_n_checkpoints max_checkpoints",
    "train.early_stopping_patience": "early_stopping patience",
    "train.report_to": "use_wandb wandb_project use_tensorboard use_mlflow logger trackers use_swanlab",
    "train.seed": "random_seed random_state data_seed",
    "train.micro_batch_tokens": "tokens_per_batch max_tokens_per_batch batch_max_tokens",
    "output_dir": "output out_dir save_dir output_path output_directory",
}

ADVICE: dict[str, str] = {
    "load_in_4bit": "model.quantization: {type: nf4}",
    "load_in_8bit": "model.quantization: {type: int8}",
    "quantization_bit": "model.quantization: {type: nf4}, or int8 for 8 bits",
    "per_device_train_batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "micro_batch_size": f"{_BATCH}; memory is train.micro_batch_tokens",
    "global_batch_size": _BATCH,
    "gradient_accumulation_steps": f"{_BATCH}; memory is train.micro_batch_tokens",
    "gradient_accumulation": f"{_BATCH}; memory is train.micro_batch_tokens",
    "iters_to_accumulate": f"{_BATCH}; memory is train.micro_batch_tokens",
    "per_device_eval_batch_size": "train.micro_batch_tokens, which holds for evaluation too",
    "eval_batch_size": "train.micro_batch_tokens, which holds for evaluation too",
    "packing": _PACKED,
    "sample_packing": _PACKED,
    "neat_packing": _PACKED,
    "multipack": _PACKED,
    "padding_free": _PACKED,
    "pad_to_sequence_len": _PACKED,
    "group_by_length": _PACKED,
    "overwrite_output_dir": "nothing to set: a run folder is never overwritten",
    "logging_dir": _WHERE,
    "plot_loss": _WHERE,
    "resume_from_checkpoint": "`lora train CONFIG --resume`",
    "auto_resume_from_checkpoints": "`lora train CONFIG --resume`",
    "hf_token": "the environment variable HF_TOKEN",
    "hub_token": "the environment variable HF_TOKEN",
    "token": "the environment variable HF_TOKEN",
    "wandb_api_key": "the environment variable WANDB_API_KEY",
    "device": "nothing to set: CUDA where there is one, else the CPU (CUDA_VISIBLE_DEVICES chooses)",
    "merge_lora": "`lora merge RUN --output DIR`, after the run",
    "do_train": "nothing to set: `lora train CONFIG` trains",
    "stage": "nothing to set: this is supervised fine-tuning",
}


def our_name(key: str) -> str | None:
    """What `key` of another tool is here: a dotted key, or advice in words."""
    return OURS.get(key.lower().replace("-", "_"))


OURS = {theirs: ours for ours, names in KEYS.items() for theirs in names.split()} | ADVICE
"""Every name of another tool, with the answer to it."""
