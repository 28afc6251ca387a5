"""The description of a kernel file: everything that defines its numbers, and how they were computed."""

import dataclasses
import hashlib
import json
import platform
from typing import Any

import numpy
import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

import lmntk
from lmntk.config.arguments import GENERAL_LORA_ALPHA, ModelArguments, TrainingArguments
from lmntk.data.tasks import Task
from lmntk.experiment.experiment import RunInputs
from lmntk.models.classifier import PromptClassifier
from lmntk.models.low_rank import LowRankSettings
from lmntk.models.parameters import ParameterFilter
from lmntk.prompts.features import FeatureDataset
from lmntk.storage.kernel_metadata import OFF_BY_DEFAULT, file_hash
from lmntk.storage.kernel_slices import WantedSlices
from lmntk.storage.paths import Split

IRRELEVANT_CONFIG_KEYS = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
"""The keys of a model's configuration that change no number of a kernel."""


def parameter_filter(model_args: ModelArguments, training_args: TrainingArguments) -> ParameterFilter:
    """Collect the arguments that leave parameters out of a kernel."""
    return ParameterFilter(
        only_adapters=model_args.apply_lora,
        exclude_embeddings=training_args.exclude_embeddings,
        exclude_head=training_args.exclude_head,
        only_biases=training_args.only_biases,
        exclude_first_layers=training_args.exclude_first_layers,
    )


def adapters_of_kernel(model_args: ModelArguments, training_args: TrainingArguments) -> LowRankSettings | None:
    """Return the adapters whose kernels are kept beside a kernel; None if there are none."""
    if training_args.kernel_lora_rank is None:
        return None
    targets = tuple(word.strip() for word in (training_args.kernel_lora_targets or "").split(",") if word.strip())
    alpha = model_args.lora_alpha or GENERAL_LORA_ALPHA
    return LowRankSettings(training_args.kernel_lora_rank, alpha, targets, training_args.seed)


def wanted_slices(model_args: ModelArguments, training_args: TrainingArguments) -> WantedSlices:
    """Return what a run keeps beside each kernel."""
    lora = adapters_of_kernel(model_args, training_args)
    return WantedSlices(training_args.part_keys, None if lora is None else lora.description)


def fixed_parameters(fix_layers: int, model_args: ModelArguments) -> ParameterFilter:
    """Return which parameters a training leaves as they are, as a kernel would leave them out."""
    return ParameterFilter(
        only_adapters=model_args.apply_lora, exclude_embeddings=fix_layers > 0, exclude_first_layers=fix_layers
    )


def spec_from_arguments(
    inputs: RunInputs, model_args: ModelArguments, training_args: TrainingArguments, split: str
) -> dict[str, Any]:
    """Return the part of a kernel's definition that the arguments give.

    Two runs that agree in this, in `spec_from_model` and in `spec_from_data` get the same kernel, up to rounding; a run
    that differs in any key may not use the other's file. The engine is a key only if the user chose one.
    """
    left_out = parameter_filter(model_args, training_args)
    engine = {} if training_args.kernel_engine == "auto" else {"engine": training_args.kernel_engine}
    shown = inputs.prompts.demonstrations
    task = inputs.datasets[split].task
    own_data = {"custom_columns": list(task.columns), "labels": list(task.labels)} if task.columns else {}
    return {
        "formula": training_args.kernel_formula,
        "binary_classification": training_args.binary_classification,
        "parameters": {name: value for name, value in vars(left_out).items() if value} or "all",
        "task": task.name,
        **own_data,
        "few_shot_type": model_args.few_shot_type,
        "template": list(inputs.prompts.templates),
        "mapping": dict(inputs.prompts.mapping),
        "dtype": training_args.kernel_dtype,
        **engine,
        **{name: None for name in OFF_BY_DEFAULT if name != "segments" or inputs.segments is not None},
        **({"from_linearhead": True, **_linear_head(task, training_args)} if training_args.from_linearhead else {}),
        **({} if inputs.segments is not False else {"segments": "left out"}),
        **({"random_model_init": True} if training_args.random_model_init else {}),
        **({} if training_args.projection is None else {"projection": dataclasses.asdict(training_args.projection)}),
        **({} if inputs.lora is None else {"lora": inputs.lora.description}),
        **(
            {}
            if shown is None
            else {"demonstrations": vars(shown) | {"draws": inputs.prompts.num_demonstration_samples}}
        ),
    }


def _linear_head(task: Task, training_args: TrainingArguments) -> dict[str, Any]:
    """Return how the linear head is fitted, as far as that differs from the default."""
    halved = training_args.linear_head_halved and len(task.labels) == 2
    sampled = training_args.linear_head_order == "sampler"
    return {
        **({"linear_head_halved": True} if halved else {}),
        **({"linear_head_order": f"sampler, seed {training_args.seed}"} if sampled else {}),
        **({"plain_lbfgs": True} if training_args.plain_lbfgs and not halved else {}),
    }


def spec_from_model(model: PromptClassifier, weights_hash: str, grad_dim: int) -> dict[str, Any]:
    """Return the part of a kernel's definition that the model gives.

    Args:
        model: The model.
        weights_hash: `hash_of_weights` of the model.
        grad_dim: The number of parameters that count.
    """
    return {"grad_dim": grad_dim, "weights_sha256": weights_hash, "config_sha256": hash_of_config(model.lm.config)}


def spec_from_data(inputs: RunInputs, split: str) -> dict[str, Any]:
    """Return the part of a kernel's definition that the examples give, as far as they and a tokenizer are at hand.

    Args:
        inputs: What was built from the arguments.
        split: A key of its data sets.
    """
    read = {mode: name for mode, name in _train_and(inputs, split).items() if name in inputs.data_files}
    spec: dict[str, Any] = {"data_sha256": {mode: file_hash(inputs.data_files[name]) for mode, name in read.items()}}
    spec["limits"] = inputs.known_limits()
    if inputs.tokenizer is not None:
        spec["label_word_ids"] = list(inputs.label_words)
        spec["tokens_sha256"] = {mode: hash_of_tokens(inputs.datasets[name]) for mode, name in read.items()}
    return spec


def provenance(inputs: RunInputs, model_args: ModelArguments, split: str) -> dict[str, Any]:
    """Return where a kernel comes from, which does not define its numbers: names, versions, threads."""
    return {
        "model": model_args.model_name_or_path,
        **({} if model_args.gguf_file is None else {"gguf_file": model_args.gguf_file}),
        "data_files": {mode: str(inputs.data_files[name]) for mode, name in _train_and(inputs, split).items()},
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }


def _train_and(inputs: RunInputs, split: str) -> dict[str, str]:
    """Return train and another split by their modes: a second test set is the test split of its own task."""
    return {Split.parse(name).mode: name for name in ("train", split)}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute."""
    return {
        "lmntk": lmntk.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }


def hash_of_weights(model: nn.Module) -> str:
    """Return the SHA-256 of a model's parameters, names and float32 numbers, in order of name."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().contiguous().view(-1).numpy().data)
    return digest.hexdigest()


def hash_of_config(config: PretrainedConfig) -> str:
    """Return the SHA-256 of the settings in a configuration that define the model: heads, activation, norms."""
    settings = {name: value for name, value in config.to_dict().items() if name not in IRRELEVANT_CONFIG_KEYS}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def hashes_of_data(inputs: RunInputs) -> dict[str, Any]:
    """Return what identifies the prompts and labels of a training, in the form that kernels' descriptions have."""
    return {
        "data_sha256": {split: file_hash(path) for split, path in inputs.data_files.items()},
        "tokens_sha256": {split: hash_of_tokens(data) for split, data in inputs.datasets.items()},
    }


def hash_of_tokens(dataset: FeatureDataset) -> str:
    """Return the SHA-256 of the token ids, segment ids and mask positions of a split."""
    digest = hashlib.sha256()
    for feature in dataset.features:
        digest.update(repr((feature.input_ids, feature.token_type_ids, feature.mask_position)).encode())
    return digest.hexdigest()
