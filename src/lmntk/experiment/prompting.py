"""From examples to token features: the templates, label words and demonstrations of every split."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lmntk.config.arguments import DataArguments, TrainingArguments
from lmntk.config.prompt_settings import PromptSettings, resolve_prompts
from lmntk.data.examples import Example
from lmntk.data.tasks import Task
from lmntk.errors import SettingError, TemplateError
from lmntk.experiment.run_splits import mode_and_task_of
from lmntk.experiment.token_checks import check_tokens
from lmntk.models.families import is_causal, max_positions
from lmntk.prompts.demonstrations import DemonstrationSampler, template_with_demonstrations
from lmntk.prompts.features import FeatureDataset, PromptBuilder
from lmntk.prompts.label_words import label_word_ids
from lmntk.prompts.render import warn_of_unknown_text
from lmntk.prompts.sentence_embeddings import read_embeddings
from lmntk.prompts.templates import EXAMPLE_TEMPLATE, Template

logger = logging.getLogger(__name__)

ANY_NUMBER_OF_SENTENCES = 10**6  # more than demonstrations can have


@dataclass(frozen=True)
class Prompting:
    """The examples of a run and the settings that turn them into prompts for one tokenizer.

    Attributes:
        task: The task.
        prompts: The templates, label words, limits and demonstrations.
        examples: Those of each split, train among them if there are demonstrations.
        tokenizer: The model's.
        label_words: The tokens of the label words, in the order of the logits.
        data_dir: The folder of the examples, where sentence embeddings are too.
        seed: Starts the draws of demonstrations.
        causal: Whether the model is a causal language model, which reads only what precedes the mask.
    """

    task: Task
    prompts: PromptSettings
    examples: Mapping[str, Sequence[Example]]
    tokenizer: PreTrainedTokenizerBase
    label_words: Sequence[int]
    data_dir: str
    seed: int
    causal: bool

    @classmethod
    def resolve(
        cls,
        task: Task,
        data_args: DataArguments,
        few_shot_type: str,
        seed: int,
        examples: Mapping[str, Sequence[Example]],
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
    ) -> "Prompting":
        """Complete the settings by what the model's configuration and tokenizer say.

        Raises:
            UsageError: The settings contradict each other, or a label word is not one token.
        """
        prompts = resolve_prompts(task, data_args, max_positions(config), few_shot_type)
        words = label_word_ids(prompts.mapping, task.labels, tokenizer) if prompts.mapping else []
        prompting = cls(task, prompts, examples, tokenizer, words, data_args.data_dir, seed, is_causal(config))
        if prompting.causal:
            check_causal_prompts(task, prompts)
        return prompting

    def builders(self, splits: Iterable[str]) -> dict[str, PromptBuilder]:
        """Return the prompt builder of each split.

        One generator draws the demonstrations of dev, then those of test. Train has its own with the same seed, since
        LM-BFF's training draws from the start.
        """
        shared = np.random.RandomState(self.seed)
        return {
            split: self._builder(split, np.random.RandomState(self.seed) if split == "train" else shared)
            for split in splits
        }

    def datasets(
        self, builders: Mapping[str, PromptBuilder], config: PretrainedConfig, args: TrainingArguments
    ) -> dict[str, FeatureDataset]:
        """Render all prompts, split after split, and check that the model has an embedding for each token."""
        templates = (template for builder in builders.values() for template in builder.templates)
        warn_of_unknown_text(templates, self.tokenizer)
        in_sampler_order = args.fits_linear_head and args.linear_head_order == "sampler"
        datasets = {
            split: FeatureDataset.build(builder, self.prompts.num_demonstration_samples)
            if split != "train"
            else FeatureDataset.build(builder, sampler_seed=args.seed if in_sampler_order else None)
            for split, builder in builders.items()
        }
        check_tokens(datasets, self.label_words, config, self.tokenizer.name_or_path)
        return datasets

    def _builder(self, split: str, generator: np.random.RandomState) -> PromptBuilder:
        mode, task = mode_and_task_of(split, self.task)
        shown = self.prompts.demonstrations
        texts, num_sentences, sampler = self.prompts.templates, self.task.num_sentences, None
        if shown is not None:
            sampler = self._sampler(split, mode, task, generator)
            num_sentences = sampler.num_sentences
            texts = tuple(
                template_with_demonstrations(text, self.task, shown, sampler.shown, self.causal) for text in texts
            )
        templates = [
            parse_template(text, task, num_sentences, bool(self.prompts.mapping), self.causal) for text in texts
        ]
        limits = self.prompts.limits
        return PromptBuilder(
            split, task, self.examples[split], templates, self.tokenizer, limits, self.label_words, sampler
        )

    def _sampler(self, split: str, mode: str, task: Task, generator: np.random.RandomState) -> DemonstrationSampler:
        settings = self.prompts.demonstrations
        assert settings is not None
        support_embeddings = query_embeddings = None
        if settings.filter_model is not None:
            name = settings.filter_model
            support_embeddings = read_embeddings(task, self.data_dir, "train", name, len(self.examples["train"]))
            query_embeddings = read_embeddings(task, self.data_dir, mode, name, len(self.examples[split]))
        return DemonstrationSampler(
            task,
            self.examples["train"],
            settings,
            generator,
            excludes_query=split == "train",
            support_embeddings=support_embeddings,
            query_embeddings=query_embeddings,
        )


def parse_template(text: str, task: Task, num_sentences: int, needs_mask: bool, causal: bool) -> Template:
    """Parse a template for a kind of model.

    Args:
        text: The template.
        task: Gives the number of label words.
        num_sentences: How many sentences the template may name.
        needs_mask: Whether the template must have a mask, as with label words.
        causal: Whether to leave out what follows the mask.

    Raises:
        TemplateError: The template is malformed, or names no sentence.
    """
    template = Template.parse(text, num_sentences, len(task.labels), task.name, needs_mask)
    if causal:
        template = template.for_causal()
    if not template.has_sentence:
        raise TemplateError(
            f"`template` has no sentence, such as *sent_0*: all prompts would be the same; it is '{text}'",
            template=text,
        )
    return template


def check_causal_prompts(task: Task, prompts: PromptSettings) -> None:
    """Warn of sentences of a query that follow the mask, where a causal model does not read them.

    Args:
        task: Gives the number of sentences of a query.
        prompts: The templates and demonstrations.

    Raises:
        TemplateError: No sentence precedes the mask.
        SettingError: In-context examples are to follow the query.
    """
    shown = prompts.demonstrations
    if shown is not None and shown.in_context == "tail":
        raise SettingError(
            "`gpt3_in_context_tail` puts examples after the query, where a causal language model reads nothing: take "
            "`gpt3_in_context_head`",
            setting="gpt3_in_context_tail",
            value=True,
        )
    for text in prompts.templates:
        whole = parse_template(text, task, ANY_NUMBER_OF_SENTENCES, bool(prompts.mapping), causal=False)
        read = whole.for_causal().sentences
        unread = sorted(whole.sentences - read)
        names = " and ".join(f"sent_{index}" for index in unread) or "sent_0"
        # A template of the user may show demonstrations there, whose sentences have the higher numbers.
        if not read & set(range(task.num_sentences)):
            raise TemplateError(
                f"`template`: a causal language model reads what precedes *mask*, and in '{text}' that is no "
                f"sentence{' of the query' if read else ''}: put {names} before it, as in {EXAMPLE_TEMPLATE}",
                template=text,
            )
        if unread:
            verb, pronoun = ("follows", "it") if len(unread) == 1 else ("follow", "them")
            logger.warning(
                f"{names} {verb} *mask* in '{text}': a causal language model never reads {pronoun}; a `template` with "
                "all sentences before *mask* asks about them all"
            )
