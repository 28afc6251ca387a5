"""The names of settings as a command line spells them: `kernel_dtype=float64` is ``--kernel_dtype float64``."""

import logging
import re
from collections.abc import Collection

# fmt: off
RUN_SETTINGS = (
    "adafactor", "adjust_for_init", "apply_lora", "array_id", "as_published", "auto_demo", "bf16_full_eval",
    "binary_classification", "cache_dir", "cg_tolerance", "clip_frozen", "config_name", "custom_columns", "data_dir",
    "dataloader_drop_last", "debug_mode", "decay_head_norm", "demo_filter", "demo_filter_model", "demo_filter_rate",
    "do_eval", "do_predict", "do_train", "double_demo", "dry_run", "eval_strategy", "evaluate_during_training",
    "exclude_embeddings", "exclude_first_layers", "exclude_head", "f0_scaling", "few_shot_type", "fine_tuned_model",
    "first_sent_limit", "fix_layers", "flattened_targets", "fp16_backend", "fp16_opt_level", "from_linearhead",
    "gguf_file", "gpt3_in_context_head", "gpt3_in_context_num", "gpt3_in_context_tail", "group_by_length",
    "kernel_dtype", "kernel_engine", "kernel_formula", "kernel_gamma", "kernel_influence", "kernel_lambda",
    "kernel_lora_rank", "kernel_lora_targets", "kernel_memory_gb", "kernel_parts", "kernel_per_layer",
    "kernel_regularization", "kernel_solver", "kernel_steps", "kernel_variance", "l2_loss", "learning_rate",
    "linear_head_halved", "linear_head_order", "load_kernels", "logging_dir", "lora_alpha", "lora_r",
    "lr_scheduler_type", "lstsq_method", "mapping", "mapping_id", "mapping_path", "max_seq_length", "max_steps",
    "metric_for_best_model", "model_family", "model_id", "model_name_or_path", "no_predict", "no_segments",
    "no_task_defaults", "no_train", "num_demo", "num_k", "num_sample", "num_train_epochs", "only_biases", "optimizer",
    "optimizer_variant", "other_sent_limit", "output_dir", "overwrite_cache", "overwrite_kernels",
    "overwrite_output_dir", "past_index", "per_device_eval_batch_size", "per_device_train_batch_size", "plain_lbfgs",
    "projection_check", "projection_seed", "projection_tolerance", "projection_width", "prompt_id", "prompt_path",
    "random_model_init", "random_segment",
    "report_to", "resume_from_checkpoint", "save_at_last", "save_logit", "save_logit_dir", "save_logit_pairs",
    "save_strategy", "seed", "segments", "select_by", "sharded_ddp", "sweep", "tag", "task_defaults", "task_name",
    "template", "template_id", "template_path", "tokenizer_name", "top_n_template", "tpu_metrics_debug",
    "tpu_num_cores", "trainer", "truncate_demonstrations_only", "truncate_head", "use_cache", "use_full_length",
    "use_task_word", "warmup_ratio", "weight_decay",
)
# fmt: on
"""The settings of run.py that sentences may name: all but those of transformers that no sentence names.

The list stands here, held by a test, since importing `config.arguments` takes seconds.
"""

_SETTING = re.compile(r"`([a-z]\w*)(?:=([^`]*))?`")


def in_flags(sentence: str, names: Collection[str]) -> str:
    """Write the settings that a sentence names in backticks as flags.

    Args:
        sentence: Of an error or a log line, such as ``needs `kernel_dtype=float64` and `overwrite_kernels=True```.
        names: The flags of the command line, without ``--``; other words in backticks stay as they are.

    Returns:
        The sentence; ``needs --kernel_dtype float64 and --overwrite_kernels`` in the example.
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name not in names:
            return match[0]
        return f"--{name}" if value in (None, "True") else f"--{name} {value}"

    return _SETTING.sub(flag, sentence)


class FlagFormatter(logging.Formatter):
    """Formats log lines with flags in place of settings.

    Args:
        fmt: As for `logging.Formatter`.
        datefmt: As for `logging.Formatter`.
        names: The flags of the command line, without ``--``.
    """

    def __init__(self, fmt: str, datefmt: str | None, names: Collection[str]) -> None:
        super().__init__(fmt, datefmt)
        self._names = names

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return in_flags(super().format(record), self._names)
