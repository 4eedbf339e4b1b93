"""Names of settings in other programs, for the message about an unknown key."""

from __future__ import annotations

from collections.abc import Callable

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
    "num_train_epochs": ("train.train_iters", "an epoch is the number of prompts over the prompts of a step"),
    "warmup_ratio": ("train.lr_warmup_iters", "the ratio times train.train_iters"),
    "max_length": ("data.max_prompt_length", "for the prompt alone; data.overlong=skip in place of cutting"),
    "max_seq_length": ("data.max_prompt_length", "for the prompt alone; data.overlong=skip in place of cutting"),
    "temperature": ("rollout.temperature", "of sampling; loss.temperature is the loss's"),
    "top_p": ("rollout.top_p", ""),
    "top_k": ("rollout.top_k", ""),
    "max_completion_length": ("rollout.max_completion_length", ""),
    "use_peft": ("lora.r", "a rank switches adapters on"),
    "attn_implementation": ("precision.backend", ""),
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
    "dataset_path": ("data.path", "with data.source"),
    "ema_decay": ("teacher.ema_decay", "with teacher.kind=ema; of the weights' normalization: weighting.ema_decay"),
    "task_type": ("data.student_view", "and data.teacher_view: math, code, or one with the solution"),
    "jsd_token_clip": ("loss.entry_clip", ""),
    "use_renio": ("weighting.name", "renio or uniform"),
    "imp_token_threshold": ("weighting.threshold", ""),
    "kd_clamp": ("weighting.ceiling", ""),
    "kd_sgo_tem": ("weighting.temperature", ""),
    "weight_norm_type": ("weighting.normalize", "batch_mean is group with group_size, or batch over the whole step"),
    # Megatron and NeMo, where names differ
    "eval_interval": ("evaluate.every", ""),
    "eval_iters": ("evaluate.samples", "a number of problems"),
    "lr_warmup_fraction": ("train.lr_warmup_iters", "the fraction times train.train_iters"),
    "train_samples": ("train.train_iters", "over train.global_batch_size"),
    "recompute_activations": ("train.recompute_granularity", "selective"),
    "seq_length": ("data.max_prompt_length", "and rollout.max_completion_length"),
    "data_path": ("data.path", "with data.source"),
    "fp8_format": ("precision.fp8", ""),
    "transformer_impl": ("precision.backend", ""),
    "save": ("output_dir", ""),
    "checkpoint_dir": ("output_dir", ""),
    "log_dir": ("output_dir", ""),
    "expert_parallel_size": ("parallel.expert_model_parallel_size", ""),
    "expert_tensor_parallel": ("parallel.expert_tensor_parallel_size", ""),
    "model_name": ("model", ""),
    "max_num_steps": ("train.train_iters", ""),
    "max_num_epochs": ("train.train_iters", "an epoch is the number of prompts over the prompts of a step"),
    "num_prompts_per_step": ("train.global_batch_size", "times rollout.completions_per_prompt"),
    "train_mb_tokens": ("train.max_tokens_per_micro_batch", ""),
    "val_period": ("evaluate.every", ""),
    "max_val_samples": ("evaluate.samples", ""),
    "save_period": ("checkpoint.save_interval", ""),
    "keep_top_k": ("checkpoint.keep_last", "the newest, not the best"),
    "kl_type": ("loss.divergence", "or loss.beta"),
    "mixed_kl_weight": ("loss.beta", ""),
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

_SAMPLES_ITSELF = "the student samples itself, in its own layout. Leave it out."
_LABEL = "in the paper's release it is a label without effect. Leave it out; output_dir names a run."
_NO_PARSER = "no program of the paper's release reads it. Leave it out."
_EACH_STEP = "each step is logged. Leave it out."
_WHOLE_VOCABULARY = "the loss reads the whole vocabulary. Leave it out."
_NO_DROPOUT = "only adapters drop features, by lora.dropout; a model's own layers drop nothing. Leave it out."
_THE_MODELS_OWN = "the tokenizer is that of the model's directory. Leave it out."
_ADAM = "Adam is the only optimizer. Leave it out; its settings are train.adam_beta1, train.adam_beta2, train.adam_eps."

ABSENT: dict[str, str] = {
    "logging_steps": _EACH_STEP,
    "log_interval": _EACH_STEP,
    "optim": _ADAM,
    "optimizer": _ADAM,
    "use_vllm": _SAMPLES_ITSELF,
    "vllm_mode": _SAMPLES_ITSELF,
    "vllm_gpu_memory_utilization": _SAMPLES_ITSELF,
    "vllm_tensor_parallel_size": _SAMPLES_ITSELF,
    # the paper's release
    "lmbda": "every completion is the student's own; the paper's release reads it nowhere. Leave it out; given "
    "completions are learned by `renio sft`.",
    "presence_penalty": "sampling has no penalties; it is 0 in every script of the paper. Leave it out.",
    "reason_first": "a teacher's analysis before it scores is not built; it is in no published figure. Leave it out.",
    "top_k_loss": _WHOLE_VOCABULARY,
    "use_tinker_loss": "that loss is not built; the paper's release leaves the weights out on that path. Leave it out, "
    "and choose loss.divergence or loss.beta.",
    "kd_type": _LABEL,
    "run_config": _LABEL,
    "ratio_type": _NO_PARSER,
    "enable_signal_analysis": _NO_PARSER,
    # Megatron and NeMo-RL
    "attention_dropout": _NO_DROPOUT,
    "hidden_dropout": _NO_DROPOUT,
    "tokenizer_type": _THE_MODELS_OWN,
    "tokenizer_model": _THE_MODELS_OWN,
    "topk_logits_k": _WHOLE_VOCABULARY,
    "zero_outside_topk": _WHOLE_VOCABULARY,
    "val_at_start": "with evaluate.every the start is evaluated as well. Leave it out.",
}
"""Name of what is not here -> why, and what to do."""

NORMALIZATIONS: dict[str, str] = {
    "batch_mean": "the release's mean over a device's batch is normalize=group, with weighting.group_size the "
    "sequences of a device; normalize=batch takes the whole step.",
    "clamp": "it is not built: weights begin at 1, so of its bounds .1 and 10 only the upper one does anything, and "
    "that is weighting.ceiling=2.3 (ln 10) for sequences with one pivotal token. Set that, and normalize=batch or "
    "group.",
}
"""The paper's release's own values of `weight_norm_type` -> what to do."""

_OF_ONE_SECTION = ("weighting.", "loss.")
"""Keys whose names elsewhere mean another thing."""


def foreign(key: str, is_key: Callable[[str], bool] = lambda key: False) -> tuple[str, str] | None:
    """The key that another program's name stands for, and what to mind; None for a name of none.

    A key of the section in which the name was written is preferred, of which `is_key` says whether there is one.

    >>> foreign("--learning-rate")
    ('train.lr', '')
    >>> foreign("teacher.torch_dtype", lambda key: key == "teacher.bf16")
    ('teacher.bf16', 'true or false')
    """
    section, name = _parts(key)
    found = FOREIGN.get(name)
    if found is None or not section or found[0].startswith(_OF_ONE_SECTION):
        return found
    inside = (f"{section}.{found[0]}", f"{section}.{found[0].rpartition('.')[2]}")
    return next(((one, found[1]) for one in inside if is_key(one)), found)


def absent(key: str) -> str | None:
    """Why another program's setting is not here, and what to do; None for a name of none.

    >>> absent("logging-steps")
    'each step is logged. Leave it out.'
    """
    return ABSENT.get(_parts(key)[1])


def _parts(key: str) -> tuple[str, str]:
    section, _, name = key.rpartition(".")
    return section, name.strip("-").replace("-", "_")
