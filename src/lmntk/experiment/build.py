"""From arguments to what a run works with: task, prompts, tokenizer, data sets, model."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lmntk.config.arguments import (
    GENERAL_LORA_ALPHA,
    GENERAL_LORA_RANK,
    ActiveTrainer,
    DataArguments,
    ModelArguments,
    TrainingArguments,
)
from lmntk.config.prompt_settings import resolve_prompts, task_of
from lmntk.data.examples import Example, check_queries, read_examples
from lmntk.data.tasks import Task
from lmntk.distributed import on_rank_zero
from lmntk.errors import SettingError, UsageError
from lmntk.experiment.experiment import Experiment, LoadedKernels
from lmntk.experiment.prompting import Prompting
from lmntk.experiment.run_splits import (
    are_described,
    file_of,
    mode_and_task_of,
    needs_model,
    place_of,
    splits_of,
    stored_splits,
)
from lmntk.models.checkpoints import HEAD_FILE
from lmntk.models.classifier import PromptClassifier
from lmntk.models.loading import LoadOptions, load_classifier, load_prompt_model
from lmntk.models.lora_files import LoraSettings
from lmntk.models.source import GGUF_CACHE, ModelSource, converted_source, find_source, load_config_and_tokenizer
from lmntk.prompts.features import Collator, FeatureDataset, PromptBuilder, ResampledDemonstrations

logger = logging.getLogger(__name__)


def build(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> Experiment | LoadedKernels:
    """Read the data, then the tokenizer, then the model: what fails soonest comes first.

    Args:
        model_args: The arguments of the model.
        data_args: The arguments of the data.
        training_args: The arguments of the run.

    Raises:
        UsageError: A file is missing or damaged, or does not fit the arguments.
    """
    inputs = _read_inputs(model_args, data_args, training_args)
    return inputs if isinstance(inputs, LoadedKernels) else _with_model(inputs, model_args, data_args, training_args)


def build_with_queries(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    queries: Sequence[tuple[str, ...]],
) -> Experiment:
    """Build a run whose test examples are given texts.

    Args:
        model_args: The arguments of the model.
        data_args: The arguments of the data.
        training_args: The arguments of the run, which reads no split but train.
        queries: The sentences of each text.

    Raises:
        UsageError: As `build`, or a text is blank or has another number of sentences than the task.
    """
    task = task_of(data_args, model_args.few_shot_type)
    check_queries(task, queries)
    examples = [Example(sentences, task.labels[0]) for sentences in queries]
    inputs = _read_inputs(model_args, data_args, training_args, examples)
    assert not isinstance(inputs, LoadedKernels)
    return _with_model(inputs, model_args, data_args, training_args)


def check_inputs(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Read and check everything that `build` reads, except the model's weights.

    Raises:
        UsageError: As `build`.
    """
    _read_inputs(model_args, data_args, training_args)


@dataclass(frozen=True)
class _Inputs:
    """Everything that is read before the model's weights."""

    prompting: Prompting
    builders: Mapping[str, PromptBuilder]
    datasets: Mapping[str, FeatureDataset]
    data_files: Mapping[str, Path]
    source: ModelSource
    config: PretrainedConfig


def _read_inputs(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    queries: Sequence[Example] = (),
) -> _Inputs | LoadedKernels:
    task = task_of(data_args, model_args.few_shot_type)
    splits = splits_of(task, training_args, data_args.data_dir)
    if not needs_model(training_args, task, splits):
        return _load_kernels(model_args, data_args, training_args, task, splits)
    shows_others = model_args.few_shot_type == "prompt-demo"
    read = [*splits] if "train" in splits or not shows_others else ["train", *splits]
    data_files = {split: file_of(task, data_args.data_dir, split) for split in read}
    examples: dict[str, Sequence[Example]] = {split: read_examples(task, path) for split, path in data_files.items()}
    if queries:
        splits, examples["test"] = [*splits, "test"], queries
    _warn_of_labels_without_examples(task, examples)
    source, downloads = source_of(model_args), model_args.cache_dir
    if model_args.gguf_file is not None:
        cache = _gguf_cache(data_args.data_dir, downloads)
        source = on_rank_zero(converted_source, source, model_args.gguf_file, cache, downloads)
    config, tokenizer = config_and_tokenizer(model_args, source)
    prompting = Prompting.resolve(
        task, data_args, model_args.few_shot_type, training_args.seed, examples, config, tokenizer
    )
    builders = prompting.builders(splits)
    datasets = prompting.datasets(builders, config, training_args)
    if config.model_type == "bert" and "segments" in training_args.published_settings:
        logger.info("`as_published=True`: BERT is not told which sentence a token belongs to (`no_segments`)")
    return _Inputs(prompting, builders, datasets, data_files, source, config)


def _with_model(
    inputs: _Inputs, model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> Experiment:
    prompting, config, source = inputs.prompting, inputs.config, inputs.source
    longest = max(data.longest for data in inputs.datasets.values())
    model = _load_model(model_args, training_args, source, config, prompting.task, prompting.label_words, longest)
    resampled = None
    if prompting.prompts.demonstrations is not None and "train" in inputs.builders:
        resampled = ResampledDemonstrations(inputs.builders["train"], training_args.seed)
    takes_segments = config.model_type == "bert" and model_args.segments
    return Experiment(
        task=prompting.task,
        prompts=prompting.prompts,
        data_dir=data_args.data_dir,
        data_files=inputs.data_files,
        datasets=inputs.datasets,
        tokenizer=prompting.tokenizer,
        label_words=prompting.label_words,
        lora=source.lora,
        segments=_segments(model_args, config),
        model=model,
        collator=Collator(prompting.tokenizer.pad_token_id or 0, segments=takes_segments),
        base_name=source.weights,
        resampled=resampled,
    )


def _warn_of_labels_without_examples(task: Task, examples: Mapping[str, Sequence[Example]]) -> None:
    if task.columns and "train" in examples:
        seen = {example.label for example in examples["train"]}
        for label in (label for label in task.labels if label not in seen):
            logger.warning("no training example has the label '%s' of `mapping`: it still gets a logit", label)


def _segments(model_args: ModelArguments, config: PretrainedConfig) -> bool:
    """Return whether the model, if it is a BERT, is told the segments; see `RunInputs.segments`."""
    return model_args.segments or config.model_type != "bert"


def config_and_tokenizer(
    model_args: ModelArguments, source: ModelSource, *, local_only: bool = False
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Load what prompts are made with; `local_only` downloads nothing."""
    return load_config_and_tokenizer(
        source,
        config_name=model_args.config_name,
        tokenizer_name=model_args.tokenizer_name,
        family=model_args.model_family,
        fills_masks=model_args.few_shot_type != "finetune",
        cache_dir=model_args.cache_dir,
        local_only=local_only,
    )


def source_of(model_args: ModelArguments) -> ModelSource:
    """Find out what `model_name_or_path` is: a checkpoint, or LoRA adapters that name theirs."""
    rank, alpha = model_args.lora_r, model_args.lora_alpha
    new = LoraSettings(rank or GENERAL_LORA_RANK, alpha or GENERAL_LORA_ALPHA) if model_args.apply_lora else None
    return find_source(model_args.model_name_or_path, new, rank, alpha)


def _gguf_cache(data_dir: str, cache_dir: str | None) -> Path:
    """The folder of converted GGUF files: `cache_dir`, else beside the folder of k-shot splits."""
    if cache_dir:
        return Path(cache_dir)
    place = Path(data_dir).absolute()
    beside = next((folder.parent for folder in place.parents if folder.name.startswith("k-shot")), place.parent)
    return beside / GGUF_CACHE


def _load_kernels(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    task: Task,
    splits: Sequence[str],
) -> LoadedKernels:
    """Read what loaded kernels are compared with: the examples and their tokens, as far as they are at hand."""
    prompts = resolve_prompts(task, data_args, None, model_args.few_shot_type)
    shown = prompts.demonstrations
    folder, source = str(training_args.load_kernels), source_of(model_args)
    # One generator draws the demonstrations of all splits, one split after the other.
    drawn = splits if shown is None else stored_splits(folder, task, splits)
    places = {split: place_of(task, data_args.data_dir, split) for split in drawn}
    files = {split: path for split, path in places.items() if path.is_file()}
    missing = [f"{path} is not there" for split, path in places.items() if split not in files]
    examples = {split: read_examples(task, path) for split, path in files.items()}
    loaded = LoadedKernels(
        task=task,
        prompts=prompts,
        data_dir=data_args.data_dir,
        data_files=files,
        datasets={
            split: FeatureDataset.labelled(
                split, mode_and_task_of(split, task)[1], examples.get(split, ()), prompts.samples(split)
            )
            for split in splits
        },
        lora=source.lora,
        segments=model_args.segments or None,
        missing=missing,
        length_is_known=data_args.max_seq_length is not None and not data_args.use_full_length and shown is None,
    )
    if not files or not are_described(folder, task, splits) or (shown is not None and missing):
        return loaded
    if model_args.gguf_file is not None:
        return replace(loaded, missing=[*missing, f"{model_args.gguf_file} is not opened"])
    try:
        config, tokenizer = config_and_tokenizer(model_args, source, local_only=True)
    except UsageError:
        name = model_args.tokenizer_name or source.tokenizer
        return replace(loaded, missing=[*missing, f"no tokenizer of '{name}' is at hand"])
    prompting = Prompting.resolve(
        task, data_args, model_args.few_shot_type, training_args.seed, examples, config, tokenizer
    )
    rendered = prompting.datasets(prompting.builders(files), config, training_args)
    return replace(
        loaded,
        prompts=prompting.prompts,
        datasets={split: rendered.get(split, data) for split, data in loaded.datasets.items()},
        tokenizer=tokenizer,
        label_words=prompting.label_words,
        segments=_segments(model_args, config),
        length_is_known=True,
    )


def _load_model(
    model_args: ModelArguments,
    training_args: TrainingArguments,
    source: ModelSource,
    config: PretrainedConfig,
    task: Task,
    label_words: Sequence[int],
    longest: int,
) -> PromptClassifier:
    options = LoadOptions(
        random_segment=model_args.random_segment,
        random_init=training_args.random_model_init,
        seed=training_args.seed,
        dtype=getattr(torch, training_args.kernel_dtype),
        cache_dir=model_args.cache_dir,
        lora=source.lora,
        longest=longest,
    )
    binary = training_args.binary_classification
    model: PromptClassifier
    if model_args.few_shot_type == "finetune":
        own_head = training_args.from_linearhead
        if not own_head and source.adapters is None and (Path(source.weights) / HEAD_FILE).is_file():
            raise SettingError(
                f"`model_name_or_path={source.weights}` holds a head on the first token: add `from_linearhead=True` to "
                f"use it, or remove its {HEAD_FILE}",
                setting="from_linearhead",
                value=False,
            )
        stored_head = (source.adapters or Path(source.weights)) / HEAD_FILE
        if own_head and training_args.active_trainer == ActiveTrainer.ZERO_SHOT and not stored_head.is_file():
            raise SettingError(
                "`from_linearhead`: the head on the first token is fitted to train, and nothing is trained here: leave "
                f"it out, or `no_train`, or name a `model_name_or_path` that holds {HEAD_FILE}",
                setting="from_linearhead",
                value=True,
            )
        model = load_classifier(
            source.weights,
            config,
            1 if task.regression else len(task.labels),
            options,
            first_token=own_head,
            binary_classification=binary,
        )
    else:
        model = load_prompt_model(source.weights, config, label_words, options, binary_classification=binary)
    return model
