"""Inputs of the benchmark: models, prompts, and the kernel by plain autograd that engines are compared with."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, GPT2Config, LlamaConfig, PretrainedConfig, RobertaConfig

from lmntk.config.arguments import DataArguments
from lmntk.config.prompt_settings import resolve_prompts
from lmntk.data.examples import Example, read_examples, split_file
from lmntk.data.tasks import Task, find_task
from lmntk.kernels import FORMULAS, FunctionModel, KernelProblem, MemoryBudget, ModuleModel, Projection
from lmntk.kernels.formulas import SignPlacement
from lmntk.models.families import is_causal, max_positions
from lmntk.models.loading import LoadOptions, load_prompt_model
from lmntk.models.low_rank import LowRankSettings, draw_adapters
from lmntk.models.parameter_parts import parts_of
from lmntk.models.pretrained import load_config, load_tokenizer
from lmntk.models.prompt_model import PromptModel
from lmntk.prompts.features import Collator, Feature, FeatureDataset, FeatureExamples, PromptBuilder
from lmntk.prompts.label_words import label_word_ids
from lmntk.prompts.templates import Template


def _sizes(layers: int, width: int, heads: int) -> dict[str, int]:
    return {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}


def _bert(layers: int, width: int, heads: int, between: int) -> BertConfig:
    return BertConfig(**_sizes(layers, width, heads), intermediate_size=between)


def _llama(layers: int, width: int, heads: int, key_heads: int, between: int, vocabulary: int) -> LlamaConfig:
    sizes = _sizes(layers, width, heads)
    return LlamaConfig(**sizes, num_key_value_heads=key_heads, intermediate_size=between, vocab_size=vocabulary)


_TINY = {"vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15}

# The models that have names here are filled with random weights.
SHAPES: dict[str, PretrainedConfig] = {
    "quick": _bert(2, 128, 2, 512),
    "minilm": _bert(6, 384, 12, 1536),
    "bert-base": _bert(12, 768, 12, 3072),
    "smollm2-135m": _llama(30, 576, 9, 3, 1536, 49152),
    "roberta-base": RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5
    ),
    "llama-1b": _llama(16, 2048, 32, 8, 8192, 128256),
    # Large enough weights for gradients of every size.
    "tiny-bert": BertConfig(**_TINY, **_sizes(2, 16, 2), intermediate_size=24),
    "tiny-roberta": RobertaConfig(**_TINY, **_sizes(2, 16, 2), intermediate_size=24, max_position_embeddings=64),
    "tiny-gpt2": GPT2Config(**_TINY, n_layer=2, n_embd=16, n_head=2, n_inner=24),
    "tiny-llama": LlamaConfig(**_TINY, **_sizes(2, 16, 4), num_key_value_heads=2, intermediate_size=24),
}
FIRST_LABEL_WORD = 2000  # of a model without a tokenizer


@dataclass(frozen=True)
class Job:
    """One measurement; small enough to be sent to another process.

    Attributes:
        model: A checkpoint folder or a key of `SHAPES`.
        task_name: The task whose prompts are used.
        template: Its template; None for the task's own.
        data_dir: Its k-shot folder; None for random tokens of realistic lengths.
        original_dir: Its original files, whose training examples follow those of the k-shot folder's splits.
        train_examples: N; beyond what the files have, prompts are random tokens of the lengths that they have.
        x_examples: X.
        formula: A key of `FORMULAS`.
        binary: One logit difference in place of two logits.
        threads: How many threads torch may use.
        memory_gb: The engine's budget.
        sample_tiles: Time that many tiles and scale up; 0 for all.
        times_only: Measure no errors.
        device: Where the model is, and all that is computed.
        left_out: Ends of the names of parameters that do not count.
        part_keys: What parameters are told apart by, if the engine keeps parts; empty for none.
        lora_rank: The rank of the adapters whose kernels are kept too; None for none.
        train_kernel: Measure train × train too, as a run computes it.
        projection_width: The width of the `projected` engine's estimate; None for an exact engine.
    """

    model: str
    task_name: str
    template: str | None
    data_dir: str | None
    original_dir: str | None
    train_examples: int
    x_examples: int
    formula: str
    binary: bool
    threads: int
    memory_gb: float | None
    sample_tiles: int
    times_only: bool
    device: str = "cpu"
    left_out: tuple[str, ...] = ()
    part_keys: tuple[str, ...] = ()
    lora_rank: int | None = None
    train_kernel: bool = False
    projection_width: int | None = None

    @property
    def pairs(self) -> int:
        """The pairs of examples whose entries are computed; of train × train, one of two mirrored ones."""
        n = self.train_examples
        return n * self.x_examples + (n * (n + 1) // 2 if self.train_kernel else 0)

    @property
    def torch_device(self) -> torch.device:
        """`device` as torch has it."""
        return torch.device(self.device)

    @property
    def budget(self) -> MemoryBudget:
        """The memory that an engine may take beside the model."""
        return (
            MemoryBudget.default(self.torch_device) if self.memory_gb is None else MemoryBudget.from_gb(self.memory_gb)
        )


@dataclass(frozen=True)
class Inputs:
    """The prompts of both sides of a job, and the tokens whose logits count."""

    config: PretrainedConfig
    label_words: list[int]
    train: FeatureDataset
    x: FeatureDataset
    device: torch.device

    def first(self, size: int) -> "Inputs":
        """Return the first `size` examples of either side."""
        cut = [replace(side, features=side.features[:size]) for side in (self.train, self.x)]
        return replace(self, train=cut[0], x=cut[1])

    def examples(self, side: FeatureDataset) -> FeatureExamples:
        """Return one side's prompts as engines take them."""
        pad = self.config.pad_token_id
        return FeatureExamples(side, Collator(0 if pad is None else pad, self.config.model_type == "bert"), self.device)


def load_inputs(job: Job) -> Inputs:
    """Read or draw the prompts."""
    task = find_task(job.task_name)
    features: dict[str, list[Feature]] = {"train": [], "test": []}
    if job.model in SHAPES:
        config = SHAPES[job.model]
        first = min(FIRST_LABEL_WORD, config.vocab_size // 2)
        label_words = [first + label for label in range(len(task.labels))]
    else:
        config = load_config(job.model)
        causal = is_causal(config)
        tokenizer = load_tokenizer(job.model, needs_mask=not causal)
        flags = DataArguments(task.name, job.data_dir or "", template=job.template)
        prompts = resolve_prompts(task, flags, max_positions(config))
        label_words = label_word_ids(prompts.mapping, task.labels, tokenizer)
        parsed = [Template.parse(text, task.num_sentences, len(task.labels), task.name) for text in prompts.templates]
        templates = [template.for_causal() for template in parsed] if causal else parsed
        if job.data_dir is not None:
            for split, rows in zip(("train", "test"), _read_sides(job, task, job.data_dir), strict=True):
                renderer = PromptBuilder(split, task, rows, templates, tokenizer, prompts.limits, label_words)
                features[split] = FeatureDataset.build(renderer).features
    train = _filled_up(features["train"], job.train_examples, config, seed=0)
    x = _filled_up(features["test"], job.x_examples, config, seed=1)
    sides = FeatureDataset("train", task, train), FeatureDataset("test", task, x)
    return Inputs(config, label_words, *sides, job.torch_device)


def _read_sides(job: Job, task: Task, data_dir: str) -> tuple[list[Example], list[Example]]:
    """Read the examples of both sides: no two of the original file are the same, nor like one of the k-shot folder."""
    train, x = (read_examples(task, split_file(task, data_dir, split)) for split in ("train", "test"))
    train, x = train[: job.train_examples], x[: job.x_examples]
    if job.original_dir is not None:
        originals = read_examples(task, Path(job.original_dir) / task.original_name("train"))
        more = iter({example.texts: example for example in originals if example not in {*train, *x}}.values())
        train += islice(more, job.train_examples - len(train))
        x += islice(more, job.x_examples - len(x))
    return train, x


def _filled_up(features: list[Feature], count: int, config: PretrainedConfig, seed: int) -> list[Feature]:
    """Add prompts of random tokens until there are `count`, with the lengths of the given prompts."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary, after_mask = config.vocab_size, 1 if is_causal(config) else 3
    # SST-2's prompts have 8 to 60 tokens, 29 on average.
    drawn = torch.randn(count, generator=generator).mul(10).add(29).clamp(8, 60).int().tolist()
    lengths = [len(feature.input_ids) for feature in features] or drawn
    filled = list(features)
    for number in range(len(features), count):
        length = lengths[number % len(lengths)]
        ids = torch.randint(min(1000, vocabulary // 2), vocabulary, (length,), generator=generator).tolist()
        filled.append(Feature(ids, [0] * length, length - after_mask, 0))
    return filled


def load_model(job: Job, inputs: Inputs, dtype: torch.dtype) -> PromptModel:
    """Return the checkpoint's model, or one of the shape with the same random weights every time."""
    return (
        load_prompt_model(
            job.model,
            copy.deepcopy(inputs.config),
            inputs.label_words,
            LoadOptions(random_init=job.model in SHAPES, dtype=dtype),
            binary_classification=job.binary,
        )
        .to(job.torch_device)
        .requires_grad_(False)
    )


def make_problem(job: Job, model: PromptModel, inputs: Inputs, published: bool = False) -> KernelProblem:
    """Return the kernel to compute; the published one uses whole parameters and the whole vocabulary's logits."""
    train, x = inputs.examples(inputs.train), inputs.examples(inputs.x)
    num_logits = 1 if job.binary else len(inputs.label_words)
    sides: dict[str, Any] = {"train": train, "x": x, "formula": FORMULAS[job.formula], "num_logits": num_logits}
    names = [name for name, _ in model.named_parameters() if not name.endswith(job.left_out)]
    if published:
        params = {name: model.get_parameter(name).detach() for name in names}
        # The logits of all tokens, from which those of the label words are taken.
        decoder = model.lm.get_output_embeddings()
        decoder.label_word_ids = torch.arange(len(decoder.weight), device=decoder.weight.device)
        model.binary_classification = False
        if model.single_position is not None:
            model.single_position.layers = []  # the last layer computes all positions

        def all_logits_fn(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
            logits = torch.func.functional_call(model, params, kwargs=batch)[:, inputs.label_words]
            return logits[:, 1:] - logits[:, :1] if job.binary else logits

        return KernelProblem(**sides, model=FunctionModel(all_logits_fn), params=params)
    tokens = {token for feature in inputs.train.features for token in feature.input_ids}
    logits_fn, params = model.as_function(names, tokens)
    adapters = None
    if job.lora_rank is not None:
        adapters = draw_adapters(model, params, LowRankSettings(job.lora_rank, 2 * job.lora_rank))
    part_of = parts_of(params, model, job.part_keys) if job.part_keys else None
    projection = None if job.projection_width is None else Projection(job.projection_width)
    return KernelProblem(
        **sides,
        model=ModuleModel(logits_fn, model),
        params=params,
        part_of=part_of,
        low_rank=adapters,
        projection=projection,
    )


def true_kernel(job: Job, inputs: Inputs, models: dict[bool, PromptModel] | None = None) -> Tensor:
    """Return the kernel, from gradients taken one example and one logit at a time.

    They are float64, but where a side takes signs, those of float32 gradients count: close to zero the two differ, and
    an engine that works in float32 is right to count its own.

    Args:
        job: The formula, the device and the memory.
        inputs: The examples.
        models: The model in float64 and, where signs are taken, in float32; loaded if not given.

    Returns:
        float64 ``[D, n, C, x, C]`` on the CPU.
    """
    if models is None:
        dtypes = {False: torch.float64, True: torch.float32}
        models = {signed: load_model(job, inputs, dtype) for signed, dtype in dtypes.items()}
    for model in models.values():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith(job.left_out))
    found = [_true_direction(job, inputs, direction, models) for direction in FORMULAS[job.formula].directions]
    for model in models.values():
        model.requires_grad_(False)
    return torch.stack(found).cpu()


def _true_direction(job: Job, inputs: Inputs, direction: SignPlacement, models: dict[bool, PromptModel]) -> Tensor:
    train, x = inputs.examples(inputs.train), inputs.examples(inputs.x)
    c, numbers = models[False].num_logits, sum(parameter.numel() for parameter in _wanted(models[False]))
    kernel = torch.zeros(len(train), c, len(x), c, dtype=torch.float64, device=inputs.device)
    # Half of the budget is for the gradients of train examples.
    together = min(len(train), max(1, job.budget.bytes // (2 * 8 * c * numbers)))
    held = torch.empty(together, c, numbers, dtype=torch.float64, device=inputs.device)
    for start in range(0, len(train), together):
        part = range(start, min(start + together, len(train)))
        for row, index in enumerate(part):
            for a, gradient in enumerate(
                gradients_of_logits(models[direction.sign_train], train, index, direction.sign_train)
            ):
                held[row, a] = gradient
        for j in range(len(x)):
            for b, gradient in enumerate(gradients_of_logits(models[direction.sign_x], x, j, direction.sign_x)):
                kernel[part.start : part.stop, :, j, b] = held[: len(part)] @ gradient
    return kernel


def gradients_of_logits(model: PromptModel, examples: FeatureExamples, index: int, signed: bool) -> Iterator[Tensor]:
    """Yield the gradient of each logit of an example, or its sign, over all parameters: float64 ``[p]``."""
    parameters = _wanted(model)
    for logit in model(**examples.batch([index]))[0]:
        parts = torch.autograd.grad(logit, parameters, retain_graph=True, materialize_grads=True)
        gradient = torch.cat([part.flatten() for part in parts])
        yield (gradient.sign_() if signed else gradient).double()


def _wanted(model: PromptModel) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
