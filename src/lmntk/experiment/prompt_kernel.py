"""A language model that is asked about texts in memory: their prompts, their logits, and the kernel between them."""

import contextlib
import dataclasses
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lmntk.config.arguments import DataArguments, ModelArguments
from lmntk.config.prompt_settings import resolve_prompts
from lmntk.data.examples import Example
from lmntk.data.tasks import Task
from lmntk.errors import DataError, SettingError
from lmntk.experiment import build
from lmntk.experiment.projection_error import check_tolerance, choose_width, measure_error
from lmntk.experiment.prompting import check_causal_prompts, parse_template
from lmntk.experiment.token_checks import check_tokens
from lmntk.experiment.untrained_logits import untrained_logits
from lmntk.kernels import (
    ESTIMATES,
    FORMULAS,
    Engine,
    KernelProblem,
    MemoryBudget,
    MemoryBudgetError,
    ModuleModel,
    Plan,
    TileRequest,
    assemble,
    make_engine,
)
from lmntk.kernels.assembly import assemble_diagonal, sum_of_parts
from lmntk.kernels.engines import ProjectedEngine, projection_of
from lmntk.models.families import is_causal, max_positions, vocabulary_size
from lmntk.models.given_model import family_of_model
from lmntk.models.loading import LoadOptions, load_prompt_model
from lmntk.models.parameter_parts import parts_of
from lmntk.models.parameters import ParameterFilter, select_parameters
from lmntk.models.pretrained import check_tokenizer, load_tokenizer
from lmntk.models.self_check import find_out_about_padding
from lmntk.models.source import GGUF_CACHE, converted_source
from lmntk.prompts.features import Collator, FeatureDataset, FeatureExamples, PromptBuilder
from lmntk.prompts.label_words import label_word_ids
from lmntk.prompts.render import warn_of_unknown_text


class PromptKernel:
    """A model that is loaded, and the train texts that its kernels have along their first axis.

    Args:
        arguments: Those of `lmntk.KernelClassifier`, by attribute.
        task: Has the labels in the order of the logits, and the limits of prompts.
        words: The label word of each label.
        examples: The train texts with their labels.

    Attributes:
        model: The model, in eval mode, its parameters frozen.
        train: The prompts of the train texts.

    Raises:
        UsageError: The model cannot be loaded, or asked about these texts.
    """

    def __init__(self, arguments: Any, task: Task, words: Mapping[str, str], examples: Sequence[Example]) -> None:
        self._arguments = arguments
        with _random_state_kept():
            self._name, self._config, self._tokenizer, options = self._source()
            self._builder = self._make_builder(task, words, examples)
            self.train = self._render(self._builder)
            self._longest = self.train.longest
            self.model = load_prompt_model(
                self._name,
                self._config,
                self._builder.label_word_ids,
                replace(options, longest=self._longest),
                binary_classification=arguments.binary_classification,
            ).requires_grad_(False)
        self._device = torch.device("cuda" if torch.cuda.is_available() and not arguments.use_cpu else "cpu")
        self.model.to(self._device)
        segments = self._config.model_type == "bert" and arguments.segments
        self._collator = Collator(self._tokenizer.pad_token_id or 0, segments)
        chosen = ParameterFilter(
            exclude_embeddings=arguments.exclude_embeddings,
            exclude_head=arguments.exclude_head,
            only_biases=arguments.only_biases,
            exclude_first_layers=arguments.exclude_first_layers,
            only_adapters=arguments.apply_lora,
        )
        tokens = {token for feature in self.train.features for token in feature.input_ids}
        selected = select_parameters(self.model, chosen)
        logits_fn, self._params = self.model.as_function(selected, tokens)
        self._function = ModuleModel(logits_fn, self.model, partial_rows=self.model.partial_rows(selected))

    def prompts_of(self, texts: Sequence[tuple[str, ...]]) -> FeatureDataset:
        """Render texts that are to be predicted: their labels are not known, and any will do.

        Args:
            texts: The sentences of each example.

        Raises:
            UsageError: The texts have more or fewer sentences than the train texts, or cannot be rendered.
        """
        task = self._builder.task
        if len(texts[0]) != task.num_sentences:
            raise DataError(
                f"`texts` have {len(texts[0])} sentences each, but those of `fit` have {task.num_sentences}", example=0
            )
        examples = [Example(sentences, task.labels[0]) for sentences in texts]
        data = self._render(replace(self._builder, mode="predict", examples=examples))
        if data.longest > self._longest and not self.model.equal_lengths:
            find_out_about_padding(self.model, self._name, data.longest)
            self._longest = data.longest
        return data

    def kernel(self, data: FeatureDataset | None = None) -> np.ndarray:
        """Compute the kernel of the train texts with others, by default with themselves.

        Returns:
            float64 ``[N, C, X, C]``, or ``[2, N, C, X, C]`` where the formula has two directions.
        """
        return self.kernel_and_parts((), data)[0]

    def kernel_and_parts(
        self, keys: Sequence[str], data: FeatureDataset | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Compute a kernel with its parts, which sum to it.

        Args:
            keys: What the parameters of parts are told apart by; empty for no parts.
            data: As for `kernel`.

        Returns:
            The kernel, as `kernel` returns it, and the parts by name, of the same shape.
        """
        problem = self._problem(data, keys)
        with torch.inference_mode(False), torch.enable_grad():
            engine, plan = self._planned(problem)
            total = sum(1 for _ in plan) * engine.num_parameter_groups(plan)
            blocks = tqdm(engine.blocks(plan), total=total, unit="tile", disable=not self._arguments.verbose)
            slices = assemble(blocks, plan, problem).unflatten(0, (len(problem.parts), -1))
        slices = slices if problem.formula.is_asymmetric else slices[:, 0]
        if not keys:
            return slices[0].numpy(), {}
        return sum_of_parts(slices.unbind()).numpy(), dict(zip(problem.parts, slices.numpy(), strict=True))

    def diagonal(self, data: FeatureDataset) -> np.ndarray:
        """Compute K(x, x) of texts, float64 ``[X, C, C]``, for a formula of one direction."""
        problem = self._problem(data)
        with torch.inference_mode(False), torch.enable_grad():
            engine, plan = self._planned(problem)
            groups, x_tiles = range(engine.num_parameter_groups(plan)), plan.tile_rows[0].x_tiles
            parts = ((x, engine.diagonal(plan, x, group)) for group in groups for x in x_tiles)
            return assemble_diagonal(parts, problem)[0].numpy()

    def settle_projection(self) -> dict[str, Any] | None:
        """Choose the width of an estimate if a tolerance asks for it, and measure the error of the train kernel.

        Returns:
            The error, as the description of a kernel file has it; None for an exact kernel.

        Raises:
            SettingError: No width, or not the given one, reaches the tolerance.
        """
        arguments = self._arguments
        size, tolerance, width = arguments.projection_check, arguments.projection_tolerance, arguments.projection_width
        with torch.inference_mode(False), torch.enable_grad():
            engine = self._planned(self._problem(None))[0] if arguments.kernel_engine in ESTIMATES else None
            if not isinstance(engine, ProjectedEngine):
                return None
            if tolerance is not None and width is None:
                arguments.projection_width = choose_width(engine, size, tolerance, progress=arguments.verbose)
                engine = self._planned(self._problem(None))[0]
                assert isinstance(engine, ProjectedEngine)
            error = measure_error(engine, size, (self.train.labels, []), progress=arguments.verbose)
            if tolerance is not None and width is not None:
                check_tolerance(error, tolerance, engine, size)
        return error.description

    def _problem(self, data: FeatureDataset | None, keys: Sequence[str] = ()) -> KernelProblem:
        return KernelProblem(
            model=self._function,
            params=self._params,
            train=self._examples(self.train),
            x=None if data is None else self._examples(data),
            formula=FORMULAS[self._arguments.formula],
            num_logits=self.model.num_logits,
            part_of=parts_of(self._params, self.model, keys) if keys else None,
            projection=projection_of(
                self._arguments.kernel_engine, self._arguments.projection_width, self._arguments.projection_seed
            ),
        )

    def _planned(self, problem: KernelProblem) -> tuple[Engine, Plan]:
        arguments, memory_gb = self._arguments, self._arguments.kernel_memory_gb
        budget = None if memory_gb is None else MemoryBudget.from_gb(memory_gb)
        engine = make_engine(problem, arguments.kernel_engine, budget)
        tiles = TileRequest(arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size)
        try:
            return engine, engine.plan(tiles)
        except MemoryBudgetError as error:
            raise SettingError(f"`kernel_memory_gb`: {error}", setting="kernel_memory_gb") from error

    def logits(self, data: FeatureDataset) -> np.ndarray:
        """Return the logits of the model as it is, ``[X, C]``."""
        with torch.inference_mode(False):
            return untrained_logits(self.model, self._examples(data)).numpy()

    def _examples(self, data: FeatureDataset) -> FeatureExamples:
        return FeatureExamples(data, self._collator, self._device, self.model.equal_lengths)

    def _render(self, builder: PromptBuilder) -> FeatureDataset:
        data = FeatureDataset.build(builder)
        check_tokens({builder.mode: data}, builder.label_word_ids, self._config, self._tokenizer.name_or_path)
        return data

    def _make_builder(self, task: Task, words: Mapping[str, str], examples: Sequence[Example]) -> PromptBuilder:
        data_args = self._group(DataArguments, task_name=task.key, data_dir="", mapping=str(dict(words)))
        prompts = resolve_prompts(task, data_args, max_positions(self._config), "prompt")
        word_ids = label_word_ids(prompts.mapping, task.labels, self._tokenizer)
        causal = is_causal(self._config)
        if causal:
            check_causal_prompts(task, prompts)
        template = parse_template(prompts.templates[0], task, task.num_sentences, True, causal)
        warn_of_unknown_text([template], self._tokenizer)
        return PromptBuilder("train", task, examples, [template], self._tokenizer, prompts.limits, word_ids)

    def _group(self, group: Any, **values: Any) -> Any:
        """A group of run.py's settings, filled with the arguments of the same names."""
        names = {field.name for field in dataclasses.fields(group)} & vars(self._arguments).keys()
        return group(**{name: getattr(self._arguments, name) for name in names} | values)

    def _source(self) -> tuple[str, PretrainedConfig, PreTrainedTokenizerBase, LoadOptions]:
        """Find the model: its name, what prompts are made with, and how it is loaded."""
        arguments = self._arguments
        model, tokenizer = arguments.model, arguments.tokenizer
        dtype = getattr(torch, arguments.kernel_dtype)
        options = LoadOptions(seed=arguments.seed, dtype=dtype, cache_dir=arguments.cache_dir)
        if not isinstance(model, str | os.PathLike):
            needs_mask = family_of_model(model) == "masked"
            if tokenizer is None:
                raise SettingError(
                    "`tokenizer` is missing: a `model` that is loaded needs its own", setting="tokenizer"
                )
            if isinstance(tokenizer, PreTrainedTokenizerBase):
                check_tokenizer(tokenizer, tokenizer.name_or_path, needs_mask, vocabulary_size(model.config))
            else:
                tokenizer = load_tokenizer(os.fspath(tokenizer), arguments.cache_dir, needs_mask)
            return model.name_or_path or type(model).__name__, model.config, tokenizer, replace(options, given=model)
        path = Path(model)
        if path.suffix == ".gguf" and path.is_file():
            given = {"model_name_or_path": str(path.parent), "gguf_file": path.name}
        else:
            given = {"model_name_or_path": os.fspath(model)}
        if isinstance(tokenizer, str | os.PathLike):
            given["tokenizer_name"] = os.fspath(tokenizer)
        model_args = self._group(ModelArguments, **given)
        source, downloads = build.source_of(model_args), model_args.cache_dir
        if model_args.gguf_file is not None:
            cache = Path(downloads) if downloads else path.parent / GGUF_CACHE
            source = converted_source(source, model_args.gguf_file, cache, downloads)
        config, own = build.config_and_tokenizer(model_args, source)
        used = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else own
        return source.weights, config, used, replace(options, lora=source.lora)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Give the process its random numbers back: loading a model seeds its generators."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    # A GPU's generator that does not exist yet has no state to keep, and reading it would start the GPU.
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
