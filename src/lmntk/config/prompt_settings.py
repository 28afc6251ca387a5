"""Resolve the settings that turn examples into prompts: flags first, then the task's row, then general defaults."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmntk.config.arguments import GENERAL_MAX_SEQ_LENGTH, GENERAL_NUM_SAMPLE, DataArguments
from lmntk.data.tasks import CUSTOM, Task, custom_task, find_task
from lmntk.errors import SettingError
from lmntk.prompts.demonstrations import DemonstrationSettings
from lmntk.prompts.label_words import parse_mapping, read_mapping
from lmntk.prompts.prompt_files import PromptSources, choose_prompts
from lmntk.prompts.render import Limits
from lmntk.prompts.templates import plain_text_template

logger = logging.getLogger(__name__)

TASK_DEFAULTS = ("max_seq_length", "first_sent_limit", "other_sent_limit", "num_sample")
"""The settings that a task's row completes, besides its template and label words."""


@dataclass(frozen=True)
class PromptSettings:
    """What turns examples into prompts, every default resolved.

    Attributes:
        templates: One, or several whose logits are averaged; without their demonstrations.
        mapping: The label word of each label; empty where a classification head stands for the classes.
        limits: Where tokens are cut.
        num_demonstration_samples: How many draws of demonstrations a dev or test example gets with each template.
        demonstrations: How they are drawn and shown; None where there are none.
    """

    templates: tuple[str, ...]
    mapping: Mapping[str, str]
    limits: Limits
    num_demonstration_samples: int = 1
    demonstrations: DemonstrationSettings | None = None

    def samples(self, split: str) -> int:
        """How often each example of a split is asked; train examples have one draw of demonstrations."""
        return len(self.templates) * (1 if split == "train" else self.num_demonstration_samples)


def task_of(data_args: DataArguments, few_shot_type: str) -> Task:
    """Look up the task that the arguments name, or make it from their description of the user's own data.

    Args:
        data_args: The arguments of the data.
        few_shot_type: ``"finetune"``, ``"prompt"`` or ``"prompt-demo"``.

    Raises:
        UnknownNameError: There is no such task.
        SettingError: A setting that the user's own data needs is missing.
    """
    if data_args.custom_columns is None:
        if data_args.task_name.lower() == CUSTOM:
            raise SettingError(
                f"--task_name {data_args.task_name} is for your own data: add --custom_columns, the names of the text "
                "columns and, last, of the label column, as in --custom_columns text,label",
                setting="custom_columns",
                value=None,
            )
        return find_task(data_args.task_name)
    bare = custom_task(data_args.custom_columns, name=data_args.task_name.lower())
    # A file overrides a flag; `resolve_prompts` logs that later.
    beaten = [flag for flag in ("template", "mapping") if data_args.prompt_path or getattr(data_args, f"{flag}_path")]
    nothing: dict[str, Any] = dict.fromkeys(beaten)
    templates, words = _chosen_prompts(bare, dataclasses.replace(data_args, **nothing))
    if not words:
        raise SettingError(
            "--custom_columns needs --mapping, every label of your data and its word, in the order of the logits: "
            "as in --mapping \"{'0': 'terrible', '1': 'great'}\"",
            setting="mapping",
            value=None,
        )
    labels = tuple(read_mapping(words))
    if len(labels) < 2:
        raise SettingError(f"--mapping {words} needs at least two labels", setting="mapping", value=words)
    if not all(templates) and few_shot_type != "finetune":
        sentences = "".join(f"*{'+' if i else ''}sent_{i}*" for i in range(bare.num_sentences))
        raise SettingError(
            f"--custom_columns needs --template, as in --template '*cls*{sentences}_It_was*mask*.*sep+*', or "
            "--few_shot_type finetune, which takes none",
            setting="template",
            value=None,
        )
    return custom_task(bare.columns, labels, bare.name)


def resolve_prompts(
    task: Task, data_args: DataArguments, model_limit: int | None, few_shot_type: str = "prompt"
) -> PromptSettings:
    """Complete the arguments from the task's row, then from the general defaults.

    Args:
        task: The row of the table of tasks.
        data_args: The arguments of the data.
        model_limit: The longest sequence that the model can read; None where no model is open.
        few_shot_type: ``"finetune"``, ``"prompt"`` or ``"prompt-demo"``.

    Raises:
        UsageError: The arguments contradict each other, or the mapping does not fit the task.
    """
    limits = _resolve_limits(task, data_args, model_limit, few_shot_type)
    if few_shot_type == "finetune":
        given = ("template", "mapping", "template_path", "mapping_path", "prompt_path", "first_sent_limit")
        idle = [f"--{flag}" for flag in (*given, "other_sent_limit") if getattr(data_args, flag) is not None]
        if task.columns:  # the mapping names the labels
            idle = [flag for flag in idle if flag not in ("--mapping", "--mapping_path", "--prompt_path")]
        if idle:
            logger.warning("--few_shot_type finetune takes the plain text: %s not used", " and ".join(idle))
        return PromptSettings((plain_text_template(task.num_sentences),), {}, limits)
    templates, words = _chosen_prompts(task, data_args)
    settings = PromptSettings(tuple(templates), parse_mapping(words, task.labels), limits)
    if few_shot_type == "prompt":
        return settings
    samples = _first_given(data_args.num_sample, _row(task, data_args).num_sample, GENERAL_NUM_SAMPLE)
    assert samples is not None
    return dataclasses.replace(settings, num_demonstration_samples=samples, demonstrations=_demonstrations(data_args))


def _chosen_prompts(task: Task, data_args: DataArguments) -> tuple[list[str], str | Mapping[str, str]]:
    """Return the templates and the mapping that arguments and files give, or else the task's own."""
    names = (field.name for field in dataclasses.fields(PromptSources))
    return choose_prompts(task, PromptSources(**{name: getattr(data_args, name) for name in names}))


def _demonstrations(data_args: DataArguments) -> DemonstrationSettings:
    head, tail = data_args.gpt3_in_context_head, data_args.gpt3_in_context_tail
    return DemonstrationSettings(
        num_demo=data_args.num_demo,
        in_context="head" if head else "tail" if tail else "",
        in_context_num=data_args.gpt3_in_context_num,
        filter_rate=data_args.demo_filter_rate,
        filter_model=data_args.demo_filter_model if data_args.demo_filter else None,
        auto=data_args.auto_demo,
    )


def _resolve_limits(task: Task, data_args: DataArguments, model_limit: int | None, few_shot_type: str) -> Limits:
    task = _row(task, data_args)
    usual = _first_given(task.max_seq_length, GENERAL_MAX_SEQ_LENGTH)
    assert usual is not None
    asked = data_args.max_seq_length
    if model_limit is not None and asked is not None and asked > model_limit:
        raise SettingError(
            f"`max_seq_length` is {asked}, but this model reads at most {model_limit} tokens",
            setting="max_seq_length",
            value=asked,
        )
    longest = asked or usual
    demonstrations = few_shot_type == "prompt-demo"
    if demonstrations and data_args.double_demo:
        longest *= 2
    in_context = demonstrations and (data_args.gpt3_in_context_head or data_args.gpt3_in_context_tail)
    if model_limit is not None:
        longest = model_limit if data_args.use_full_length or in_context else min(longest, model_limit)
    plain = few_shot_type == "finetune"
    return Limits(
        max_seq_length=longest,
        first_sent_limit=None if plain else _first_given(data_args.first_sent_limit, task.first_sent_limit),
        other_sent_limit=None if plain else _first_given(data_args.other_sent_limit, task.other_sent_limit),
        truncate_head=data_args.truncate_head and (demonstrations or not data_args.truncate_demonstrations_only),
    )


def _row(task: Task, data_args: DataArguments) -> Task:
    """Return the task as far as its row completes the arguments: not lengths and draws with `no_task_defaults`."""
    if data_args.task_defaults:
        return task
    nothing: dict[str, Any] = dict.fromkeys(TASK_DEFAULTS)
    return dataclasses.replace(task, **nothing)


def _first_given(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
