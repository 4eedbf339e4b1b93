"""Names of settings in other programs, for the message about an unknown key."""

from __future__ import annotations

FOREIGN: dict[str, tuple[str, str]] = {
    # transformers' TrainingArguments and TRL's configurations
    "learning_rate": ("train.lr", ""),
    "lr_scheduler_type": ("train.lr_decay_style", "transformers' own default is linear"),
    "warmup_steps": ("train.lr_warmup_iters", ""),
    "max_steps": ("train.train_iters", ""),
    "per_device_train_batch_size": ("train.micro_batch_size", "train.global_batch_size counts those of all ranks"),
    "gradient_accumulation_steps": (
        "train.global_batch_size",
        "it counts the sequences of a step: per device x accumulation x processes",
    ),
    "max_grad_norm": ("train.clip_grad", ""),
    "adam_epsilon": ("train.adam_eps", ""),
    "gradient_checkpointing": ("train.recompute_granularity", "full, with recompute_method and recompute_num_layers"),
    "dtype": ("train.bf16", "true or false"),
    "torch_dtype": ("train.bf16", "true or false"),
    "save_steps": ("checkpoint.save_interval", ""),
    "save_total_limit": ("checkpoint.keep_last", ""),
    "eval_steps": ("evaluate.every", ""),
    "model_name_or_path": ("model", ""),
    "teacher_model_name_or_path": ("teacher.model", ""),
    "lora_r": ("lora.r", ""),
    "lora_alpha": ("lora.alpha", ""),
    "lora_dropout": ("lora.dropout", ""),
    "lora_target_modules": ("lora.targets", ""),
    "target_modules": ("lora.targets", ""),
    "dataset_name": ("data.path", "with data.source=datasets"),
    "dataset_config": ("data.subset", ""),
    "dataset_train_split": ("data.split", ""),
    "dataset_test_split": ("data.eval_split", ""),
    "max_new_tokens": ("rollout.max_completion_length", ""),
    "num_generations": ("rollout.completions_per_prompt", ""),
    # the paper's release
    "teacher_path": ("teacher.model", ""),
    "teacher_lora_path": ("teacher.adapter", ""),
    "fixed_teacher": ("teacher.kind", "initial"),
    "use_ema_teacher": ("teacher.kind", "ema"),
    "dataset_path": ("data.path", ""),
    "jsd_token_clip": ("loss.entry_clip", ""),
    "use_renio": ("weighting.name", "renio or uniform"),
    "imp_token_threshold": ("weighting.threshold", ""),
    "kd_clamp": ("weighting.ceiling", ""),
    "kd_sgo_tem": ("weighting.temperature", ""),
    "weight_norm_type": ("weighting.normalize", "batch_mean is group with group_size, or batch over the whole step"),
    # Megatron and NeMo, where names differ
    "eval_interval": ("evaluate.every", ""),
    "save": ("output_dir", ""),
    "save_dir": ("output_dir", ""),
    "tensor_parallel_size": ("parallel.tensor_model_parallel_size", ""),
    "pipeline_parallel_size": ("parallel.pipeline_model_parallel_size", ""),
    "context_parallel": ("parallel.context_parallel_size", ""),
    "train_global_batch_size": ("train.global_batch_size", ""),
    "train_micro_batch_size": ("train.micro_batch_size", ""),
    "max_total_sequence_length": ("rollout.max_completion_length", "and data.max_prompt_length"),
    "num_generations_per_prompt": ("rollout.completions_per_prompt", ""),
}
"""Name -> (the key here, what to mind); underscores stand for dashes."""


def foreign(key: str) -> tuple[str, str] | None:
    """The key that another program's name stands for, and what to mind; None for a name of none.

    >>> foreign("--learning-rate")
    ('train.lr', '')
    """
    return FOREIGN.get(key.rpartition(".")[2].strip("-").replace("-", "_"))
