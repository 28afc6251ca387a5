"""From flags to what a run works with: task, prompts, tokenizer, data sets, model."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lmntk.arguments import GENERAL_MAX_SEQ_LENGTH, DataArguments, ModelArguments, TrainingArguments
from lmntk.errors import UsageError
from lmntk.examples import read_examples, split_file
from lmntk.features import Collator, FeatureDataset
from lmntk.models.loading import NUM_SEGMENTS, load_config, load_prompt_model, load_tokenizer, max_positions
from lmntk.models.prompt_model import PromptModel
from lmntk.prompts import Limits, choose_prompts, label_word_ids, parse_mapping
from lmntk.results import logits_path
from lmntk.tasks import Task, find_task
from lmntk.templates import Template

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptSettings:
    """What turns examples into prompts, every default resolved.

    Attributes:
        templates: One, or several whose logits are averaged.
        mapping: The label word of each label.
        limits: Where tokens are cut.
    """

    templates: tuple[str, ...]
    mapping: Mapping[str, str]
    limits: Limits


@dataclass(frozen=True)
class Run:
    """What a trainer needs.

    Attributes:
        task: The row of the table of tasks.
        prompts: The templates, label words and limits.
        data_files: The file of each split.
        datasets: The features of each split.
        model: The model that answers the prompts; None where loaded kernels make it unnecessary.
        collator: Makes batches of features.
    """

    task: Task
    prompts: PromptSettings
    data_files: Mapping[str, Path]
    datasets: Mapping[str, FeatureDataset]
    model: PromptModel | None
    collator: Collator


def build(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Run:
    """Read the data, then the tokenizer, then the model: what fails soonest comes first.

    Raises:
        UsageError: Anything a user can mend, in one sentence.
    """
    task = find_task(data_args.task_name)
    splits = _splits(training_args)
    if not _needs_model(training_args, task, splits):
        placeholders = {split: FeatureDataset(split, task, []) for split in splits}
        return Run(task, resolve_prompts(task, data_args, None), {}, placeholders, None, Collator(0, segments=False))
    data_files = {split: split_file(task, data_args.data_dir, split) for split in splits}
    examples = {split: read_examples(task, path) for split, path in data_files.items()}

    model_name = model_args.model_name_or_path
    config = load_config(model_args.config_name or model_name, model_args.cache_dir)
    tokenizer = load_tokenizer(model_args.tokenizer_name or model_name, model_args.cache_dir)
    prompts = resolve_prompts(task, data_args, max_positions(config))
    label_words = label_word_ids(prompts.mapping, task.labels, tokenizer)
    templates = [_parse(template, task) for template in prompts.templates]
    datasets = {
        split: FeatureDataset.build(split, task, rows, templates, tokenizer, prompts.limits, label_words)
        for split, rows in examples.items()
    }
    _check_tokens(datasets, label_words, config, model_args.tokenizer_name or model_name)
    model = load_prompt_model(
        model_name,
        config,
        label_words,
        binary_classification=training_args.binary_classification,
        random_segment=model_args.random_segment,
        random_init=training_args.random_model_init,
        seed=training_args.seed,
        dtype=getattr(torch, training_args.kernel_dtype),
        cache_dir=model_args.cache_dir,
    )
    collator = Collator(_pad_token_id(tokenizer), segments=config.model_type == "bert")
    return Run(task, prompts, data_files, datasets, model, collator)


def resolve_prompts(task: Task, data_args: DataArguments, model_limit: int | None) -> PromptSettings:
    """Complete the flags from the task's row, and that from the general defaults.

    Args:
        task: The row.
        data_args: The flags.
        model_limit: The longest sequence the model can read.

    Raises:
        UsageError: Flags that contradict each other, or a mapping that does not fit the task.
    """
    templates, words = choose_prompts(
        default_template=task.template,
        default_mapping=task.mapping,
        template=data_args.template,
        mapping=data_args.mapping,
        template_path=data_args.template_path,
        template_id=data_args.template_id,
        mapping_path=data_args.mapping_path,
        mapping_id=data_args.mapping_id,
        prompt_path=data_args.prompt_path,
        prompt_id=data_args.prompt_id,
        top_n_template=data_args.top_n_template,
    )

    def first_given(*values: int | None) -> int | None:
        return next((value for value in values if value is not None), None)

    usual = first_given(task.max_seq_length, GENERAL_MAX_SEQ_LENGTH)
    assert usual is not None
    if model_limit is None:
        longest = data_args.max_seq_length or usual
    elif data_args.max_seq_length is not None and data_args.max_seq_length > model_limit:
        raise UsageError(
            f"--max_seq_length is {data_args.max_seq_length}, but this model reads at most {model_limit} tokens"
        )
    else:
        longest = model_limit if data_args.use_full_length else data_args.max_seq_length or min(usual, model_limit)
    limits = Limits(
        max_seq_length=longest,
        first_sent_limit=first_given(data_args.first_sent_limit, task.first_sent_limit),
        other_sent_limit=first_given(data_args.other_sent_limit, task.other_sent_limit),
        truncate_head=data_args.truncate_head,
    )
    return PromptSettings(tuple(templates), parse_mapping(words, task.labels), limits)


def _splits(training_args: TrainingArguments) -> list[str]:
    """The splits that a run reads; a kernel always has the train examples along its first axis."""
    wanted = {
        "train": training_args.trainer == "kernel" and not training_args.no_train,
        "dev": training_args.do_eval,
        "test": training_args.do_predict,
    }
    return [split for split, needed in wanted.items() if needed]


def _needs_model(training_args: TrainingArguments, task: Task, splits: Iterable[str]) -> bool:
    """Loaded kernels need neither model nor data, unless f₀ is asked for and lies not beside them."""
    folder = training_args.load_kernels
    if folder is None:
        return True
    return training_args.adjust_for_init and not all(logits_path(folder, s, task.key).exists() for s in splits)


def _parse(text: str, task: Task) -> Template:
    template = Template.parse(text, task.num_sentences, len(task.labels), task.name)
    if not template.has_sentence:
        raise UsageError(f"--template has no sentence, such as *sent_0*: all prompts would be alike; it is '{text}'")
    return template


def _check_tokens(
    datasets: Mapping[str, FeatureDataset], label_words: Sequence[int], config: PretrainedConfig, tokenizer_name: str
) -> None:
    features = [feature for data in datasets.values() for feature in data.features]
    largest = max([*label_words, *(max(feature.input_ids) for feature in features)])
    if largest >= config.vocab_size:
        raise UsageError(
            f"the tokenizer of '{tokenizer_name}' gives token {largest}, but the model knows {config.vocab_size}; "
            "--tokenizer_name must name the model's own tokenizer"
        )
    segments = 1 + max((max(feature.token_type_ids) for feature in features), default=0)
    if config.model_type == "bert" and segments > NUM_SEGMENTS:
        raise UsageError(f"--template has {segments} segments, but BERT has {NUM_SEGMENTS}: use *sep* for some *sep+*")


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # Padding is masked, so that any token would do.
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
