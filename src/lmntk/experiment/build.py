"""From flags to what a run works with: task, prompts, tokenizer, data sets, model."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lmntk.config.arguments import (
    GENERAL_LORA_ALPHA,
    GENERAL_LORA_RANK,
    DataArguments,
    ModelArguments,
    TrainingArguments,
)
from lmntk.config.prompt_settings import PromptSettings, resolve_prompts, task_of
from lmntk.data.examples import Example, read_examples
from lmntk.data.tasks import Task
from lmntk.distributed import on_rank_zero
from lmntk.errors import UsageError
from lmntk.experiment.run_splits import (
    are_described,
    file_of,
    mode_and_task_of,
    needs_model,
    place_of,
    splits_of,
    stored_splits,
)
from lmntk.experiment.token_checks import check_tokens
from lmntk.models.checkpoints import HEAD_FILE
from lmntk.models.classifier import PromptClassifier
from lmntk.models.families import is_causal, max_positions
from lmntk.models.loading import LoadOptions, load_classifier, load_prompt_model
from lmntk.models.lora_files import LoraSettings
from lmntk.models.source import GGUF_CACHE, ModelSource, converted_source, find_source, load_config_and_tokenizer
from lmntk.prompts.demonstrations import DemonstrationSampler, DemonstrationSettings, template_with_demonstrations
from lmntk.prompts.features import Collator, FeatureDataset, PromptBuilder, ResampledDemonstrations
from lmntk.prompts.label_words import label_word_ids
from lmntk.prompts.render import warn_of_unknown_text
from lmntk.prompts.sentence_embeddings import read_embeddings
from lmntk.prompts.templates import EXAMPLE_TEMPLATE, Template

logger = logging.getLogger(__name__)

MANY_SENTENCES = 10**6  # more than demonstrations can have


@dataclass(frozen=True)
class Experiment:
    """What a trainer needs.

    Attributes:
        task: The row of the table of tasks.
        prompts: The templates, label words and limits.
        data_files: The file of each split.
        datasets: The features of each split, train first; ``"test:mnli-mm"`` is the second test set of mnli.
        model: The model that is asked; None where loaded kernels make it unnecessary.
        collator: Makes batches of features.
        tokenizer: The model's.
        redrawn: The train split with demonstrations drawn at every visit; None where there are none.
        lora: The adapters on the model; None where there are none.
        segments: Whether a BERT is told which sentence a token belongs to; True for all other models, None where
            --no_segments meets loaded kernels of a model that is not there to look at.
        base_name: The checkpoint that the model, adapters aside, was loaded from.
        label_words: The tokens of the label words, in the order of the logits; none without words or tokenizer.
        missing: What loaded kernels cannot be compared with, a clause each.
        data_dir: ``--data_dir``.
        length_is_known: Whether ``prompts.limits.max_seq_length`` is final: most flags leave it to the model.
    """

    task: Task
    prompts: PromptSettings
    data_files: Mapping[str, Path]
    datasets: Mapping[str, FeatureDataset]
    model: PromptClassifier | None
    collator: Collator
    tokenizer: PreTrainedTokenizerBase | None = None
    redrawn: ResampledDemonstrations | None = None
    lora: LoraSettings | None = None
    base_name: str = ""
    label_words: Sequence[int] = ()
    missing: Sequence[str] = ()
    data_dir: str = ""
    segments: bool | None = True
    length_is_known: bool = True


def build(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments, opens_model: bool = True
) -> Experiment:
    """Read the data, then the tokenizer, then the model: what fails soonest comes first.

    Args:
        model_args: The model's flags.
        data_args: The data's flags.
        training_args: The flags of the run.
        opens_model: Whether the model is loaded; without it all else is read and checked.

    Raises:
        UsageError: Anything a user can mend, in one sentence.
    """
    task = task_of(data_args, model_args.few_shot_type)
    splits = splits_of(task, training_args, data_args.data_dir)
    if not needs_model(training_args, task, splits):
        return _without_model(model_args, data_args, training_args, task, splits)
    shows_others = model_args.few_shot_type == "prompt-demo"
    read = [*splits] if "train" in splits or not shows_others else ["train", *splits]
    data_files = {split: file_of(task, data_args.data_dir, split) for split in read}
    examples = {split: read_examples(task, path) for split, path in data_files.items()}
    if task.columns and "train" in examples:
        seen = {example.label for example in examples["train"]}
        for label in (label for label in task.labels if label not in seen):
            logger.warning("no training example has the label '%s' of --mapping: its logit counts all the same", label)

    source, downloads = source_of(model_args), model_args.cache_dir
    if model_args.gguf_file is not None:
        cache = _gguf_cache(data_args.data_dir, downloads)
        source = on_rank_zero(converted_source, source, model_args.gguf_file, cache, downloads)
    config, tokenizer = config_and_tokenizer(model_args, source)
    asked = _ask(model_args, data_args, training_args, task, splits, examples, config, tokenizer)
    redrawn = None
    if shows_others and "train" in asked.renderers:
        redrawn = ResampledDemonstrations(asked.renderers["train"], training_args.seed)
    words = asked.label_words
    model = None
    if opens_model:
        longest = max(data.longest for data in asked.datasets.values())
        model = _load_model(model_args, training_args, source, config, task, words, longest)
    if config.model_type == "bert" and "segments" in training_args.published_settings:
        logger.info("--as_published: BERT is not told which sentence a token belongs to (--no_segments)")
    collator = Collator(tokenizer.pad_token_id or 0, segments=config.model_type == "bert" and model_args.segments)
    return Experiment(
        task, asked.prompts, data_files, asked.datasets, model, collator, tokenizer, redrawn, source.lora,
        source.weights, asked.label_words, data_dir=data_args.data_dir, segments=_segments(model_args, config),
    )  # fmt: skip


def _segments(model_args: ModelArguments, config: PretrainedConfig) -> bool:
    """Whether the model is told segments, if it is a BERT: `Experiment.segments`."""
    return model_args.segments or config.model_type != "bert"


@dataclass(frozen=True)
class _Asked:
    """What a tokenizer makes of the examples."""

    prompts: PromptSettings
    label_words: Sequence[int]
    renderers: Mapping[str, PromptBuilder]
    datasets: Mapping[str, FeatureDataset]


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


def _ask(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    task: Task,
    splits: Iterable[str],
    examples: Mapping[str, Sequence[Example]],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> _Asked:
    """Render the examples of some splits as the model is asked about them."""
    causal = is_causal(config)
    prompts = resolve_prompts(task, data_args, max_positions(config), model_args.few_shot_type)
    words = label_word_ids(prompts.mapping, task.labels, tokenizer) if prompts.mapping else []
    if causal:
        _check_what_is_read(task, prompts)
    renderers = _renderers(
        task, prompts, examples, splits, data_args.data_dir, training_args.seed, tokenizer, words, causal
    )
    warn_of_unknown_text((template for renderer in renderers.values() for template in renderer.templates), tokenizer)
    sampled = training_args.fits_linear_head and training_args.linear_head_order == "sampler"
    datasets = {
        split: FeatureDataset.build(renderer, prompts.num_demonstration_samples)
        if split != "train"
        else FeatureDataset.build(renderer, sampler_seed=training_args.seed if sampled else None)
        for split, renderer in renderers.items()
    }
    check_tokens(datasets, words, config, tokenizer.name_or_path)
    return _Asked(prompts, words, renderers, datasets)


def _without_model(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    task: Task,
    splits: Sequence[str],
) -> Experiment:
    """Build what loaded kernels are compared with: the examples and their tokens, as far as they are at hand."""
    prompts = resolve_prompts(task, data_args, None, model_args.few_shot_type)
    folder, source = str(training_args.load_kernels), source_of(model_args)
    # Demonstrations of all splits are drawn by one generator, one split after the other.
    drawn = splits if prompts.demonstrations is None else stored_splits(folder, task, splits)
    places = {split: place_of(task, data_args.data_dir, split) for split in drawn}
    files = {split: path for split, path in places.items() if path.is_file()}
    missing = [f"{path} is not there" for split, path in places.items() if split not in files]
    examples = {split: read_examples(task, path) for split, path in files.items()}
    datasets = {
        split: FeatureDataset.labelled(split, mode_and_task_of(split, task)[1], examples.get(split, ()),
                                       prompts.samples(split))
        for split in splits
    }  # fmt: skip
    nothing = Collator(0, segments=False)
    run = Experiment(
        task, prompts, files, datasets, None, nothing, lora=source.lora, data_dir=data_args.data_dir,
        segments=model_args.segments or None,
        length_is_known=(
            data_args.max_seq_length is not None
            and not data_args.use_full_length
            and prompts.demonstrations is None
        ),
    )  # fmt: skip
    if not files or not are_described(folder, task, splits) or (prompts.demonstrations is not None and missing):
        return replace(run, missing=missing)
    if model_args.gguf_file is not None:
        return replace(run, missing=[*missing, f"{model_args.gguf_file} is not opened"])
    try:
        config, tokenizer = config_and_tokenizer(model_args, source, local_only=True)
    except UsageError:
        name = model_args.tokenizer_name or source.tokenizer
        return replace(run, missing=[*missing, f"no tokenizer of '{name}' is at hand"])
    asked = _ask(model_args, data_args, training_args, task, files, examples, config, tokenizer)
    rendered = {split: asked.datasets[split] for split in splits if split in files}
    return replace(
        run, prompts=asked.prompts, datasets=datasets | rendered, tokenizer=tokenizer, label_words=asked.label_words,
        missing=missing, segments=_segments(model_args, config), length_is_known=True,
    )  # fmt: skip


def _renderers(
    task: Task,
    prompts: PromptSettings,
    examples: Mapping[str, Sequence[Example]],
    splits: Iterable[str],
    data_dir: str,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    label_words: Sequence[int],
    causal: bool,
) -> dict[str, PromptBuilder]:
    """What makes the prompts of each split.

    One generator draws the demonstrations of dev, then those of test; train has its own, with the same seed, as the
    draws of LM-BFF's training start anew.
    """
    shared = np.random.RandomState(seed)
    renderers = {}
    for split in splits:
        mode, own = mode_and_task_of(split, task)
        demonstrator = None
        texts = prompts.templates
        num_sentences = task.num_sentences
        if prompts.demonstrations is not None:
            demonstrator = _demonstrator(
                own, prompts.demonstrations, examples, split, mode, data_dir,
                np.random.RandomState(seed) if split == "train" else shared,
            )  # fmt: skip
            num_sentences = demonstrator.num_sentences
            texts = tuple(
                template_with_demonstrations(text, task, prompts.demonstrations, demonstrator.shown, causal)
                for text in texts
            )
        templates = [_parse(text, own, num_sentences, bool(prompts.mapping), causal) for text in texts]
        renderers[split] = PromptBuilder(
            split, own, examples[split], templates, tokenizer, prompts.limits, label_words, demonstrator
        )
    return renderers


def _demonstrator(
    task: Task,
    settings: DemonstrationSettings,
    examples: Mapping[str, Sequence[Example]],
    split: str,
    mode: str,
    data_dir: str,
    generator: np.random.RandomState,
) -> DemonstrationSampler:
    support_embeddings = query_embeddings = None
    if settings.filter_model is not None:
        name = settings.filter_model
        support_embeddings = read_embeddings(task, data_dir, "train", name, len(examples["train"]))
        query_embeddings = read_embeddings(task, data_dir, mode, name, len(examples[split]))
    return DemonstrationSampler(
        task,
        examples["train"],
        settings,
        generator,
        excludes_query=split == "train",
        support_embeddings=support_embeddings,
        query_embeddings=query_embeddings,
    )


def _check_what_is_read(task: Task, prompts: PromptSettings) -> None:
    """Warn of sentences of a query that stand behind the mask, where a causal model predicts and reads no more.

    Raises:
        UsageError: There is none before it; or in-context examples are to go there.
    """
    if prompts.demonstrations is not None and prompts.demonstrations.in_context == "tail":
        raise UsageError(
            "--gpt3_in_context_tail puts examples behind the query, where a causal language model reads nothing: take "
            "--gpt3_in_context_head"
        )
    for text in prompts.templates:
        whole = _parse(text, task, MANY_SENTENCES, bool(prompts.mapping), causal=False)
        read = whole.for_causal().sentences
        unread = sorted(whole.sentences - read)
        names = " and ".join(f"sent_{index}" for index in unread) or "sent_0"
        # A template of the user's own may show demonstrations there, whose sentences have the higher numbers.
        if not read & set(range(task.num_sentences)):
            raise UsageError(
                f"--template: a causal language model reads what stands before *mask*, and in '{text}' that is no "
                f"sentence{' of the query' if read else ''}: put {names} before it, as in {EXAMPLE_TEMPLATE}"
            )
        if unread:
            stand, it = ("stands", "it") if len(unread) == 1 else ("stand", "them")
            logger.warning(
                "%s %s behind *mask* in '%s': a causal language model never reads %s; a --template with all sentences "
                "before *mask* asks about them all",
                *(names, stand, text, it),
            )


def _parse(text: str, task: Task, num_sentences: int, needs_mask: bool, causal: bool) -> Template:
    template = Template.parse(text, num_sentences, len(task.labels), task.name, needs_mask)
    if causal:
        template = template.for_causal()
    if not template.has_sentence:
        raise UsageError(f"--template has no sentence, such as *sent_0*: all prompts would be alike; it is '{text}'")
    return template


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


def _load_model(
    model_args: ModelArguments,
    training_args: TrainingArguments,
    source: ModelSource,
    config: PretrainedConfig,
    task: Task,
    label_words: Sequence[int],
    longest: int,
) -> PromptClassifier:
    options: LoadOptions = {
        "random_segment": model_args.random_segment,
        "random_init": training_args.random_model_init,
        "seed": training_args.seed,
        "dtype": getattr(torch, training_args.kernel_dtype),
        "cache_dir": model_args.cache_dir,
        "lora": source.lora,
        "longest": longest,
    }
    binary = training_args.binary_classification
    model: PromptClassifier
    if model_args.few_shot_type == "finetune":
        own_head = training_args.from_linearhead
        if not own_head and source.adapters is None and (Path(source.weights) / HEAD_FILE).is_file():
            raise UsageError(
                f"--model_name_or_path {source.weights} holds a head on the first token: add --from_linearhead to use "
                f"it, or remove its {HEAD_FILE}"
            )
        stored_head = (source.adapters or Path(source.weights)) / HEAD_FILE
        if own_head and training_args.active_trainer == "zero-shot" and not stored_head.is_file():
            raise UsageError(
                "--from_linearhead: the head on the first token is fitted to train, and nothing is trained here: leave "
                f"the flag out, or --no_train, or name a --model_name_or_path that holds {HEAD_FILE}"
            )
        model = load_classifier(
            source.weights,
            config,
            1 if task.regression else len(task.labels),
            first_token=own_head,
            binary_classification=binary,
            **options,
        )
    else:
        model = load_prompt_model(source.weights, config, label_words, binary_classification=binary, **options)
    return model
