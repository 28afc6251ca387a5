"""What a kernel file says of itself: everything that defines its numbers, and how they were computed."""

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
from lmntk.config.arguments import ModelArguments, TrainingArguments
from lmntk.data.tasks import Task
from lmntk.experiment.build import Experiment
from lmntk.models.parameters import ParameterFilter
from lmntk.prompts.features import FeatureDataset
from lmntk.storage.kernel_metadata import OFF_BY_DEFAULT, file_hash
from lmntk.storage.paths import Split


def parameter_filter(model_args: ModelArguments, training_args: TrainingArguments) -> ParameterFilter:
    """Collect the flags that leave parameters out of a kernel."""
    return ParameterFilter(
        only_adapters=model_args.apply_lora,
        exclude_embeddings=training_args.exclude_embeddings,
        exclude_head=training_args.exclude_head,
        only_biases=training_args.only_biases,
        exclude_first_layers=training_args.exclude_first_layers,
    )


def spec_from_arguments(
    run: Experiment, model_args: ModelArguments, training_args: TrainingArguments, split: str
) -> dict[str, Any]:
    """Return what of a kernel's definition the command says, without model or data.

    Two runs that agree in all of this, in `of_model` and in `of_data` get the same kernel, up to rounding; one that
    differs anywhere may not use the other's file. The engine counts only where the user asked for one.
    """
    left_out = parameter_filter(model_args, training_args)
    engine = {} if training_args.kernel_engine == "auto" else {"engine": training_args.kernel_engine}
    shown = run.prompts.demonstrations
    task = run.datasets[split].task
    own_data = {"custom_columns": list(task.columns), "labels": list(task.labels)} if task.columns else {}
    return {
        "formula": training_args.kernel_formula,
        "binary_classification": training_args.binary_classification,
        "parameters": {name: value for name, value in vars(left_out).items() if value} or "all",
        "task": task.name,
        **own_data,
        "few_shot_type": model_args.few_shot_type,
        "template": list(run.prompts.templates),
        "mapping": dict(run.prompts.mapping),
        "dtype": training_args.kernel_dtype,
        **engine,
        **{name: None for name in OFF_BY_DEFAULT if name != "segments" or run.segments is not None},
        **({"from_linearhead": True, **_linear_head(task, training_args)} if training_args.from_linearhead else {}),
        **({} if run.segments is not False else {"segments": "left out"}),
        **({"random_model_init": True} if training_args.random_model_init else {}),
        **({} if run.lora is None else {"lora": run.lora.description}),
        **({} if shown is None else {"demonstrations": vars(shown) | {"draws": run.prompts.num_demonstration_samples}}),
    }


def _linear_head(task: Task, training_args: TrainingArguments) -> dict[str, Any]:
    """How the linear head is fitted, where that is not as usual."""
    halved = training_args.linear_head_halved and len(task.labels) == 2
    sampled = training_args.linear_head_order == "sampler"
    return {
        **({"linear_head_halved": True} if halved else {}),
        **({"linear_head_order": f"sampler, seed {training_args.seed}"} if sampled else {}),
        **({"plain_lbfgs": True} if training_args.plain_lbfgs and not halved else {}),
    }


def of_model(run: Experiment, weights: str, grad_dim: int) -> dict[str, Any]:
    """Return what of a kernel's definition the model says.

    Args:
        run: What was built.
        weights: `hash_of_weights` of the model.
        grad_dim: The number of parameters that count.
    """
    assert run.model is not None
    config = hash_of_config(run.model.lm.config)
    return {"grad_dim": grad_dim, "weights_sha256": weights, "config_sha256": config}


def of_data(run: Experiment, split: str) -> dict[str, Any]:
    """Return what of a kernel's definition the examples say, as far as they and a tokenizer are there.

    Args:
        run: What was built.
        split: A key of the run's data sets.
    """
    there = {mode: name for mode, name in _train_and(run, split).items() if name in run.data_files}
    said: dict[str, Any] = {"data_sha256": {mode: file_hash(run.data_files[name]) for mode, name in there.items()}}
    said["limits"] = {name: value for name, value in vars(run.prompts.limits).items() if value is not None}
    if not run.length_is_known:
        del said["limits"]["max_seq_length"]
    if run.tokenizer is not None:
        said["label_word_ids"] = list(run.label_words)
        said["tokens_sha256"] = {mode: hash_of_tokens(run.datasets[name]) for mode, name in there.items()}
    return said


def circumstances(run: Experiment, model_args: ModelArguments, split: str) -> dict[str, Any]:
    """Return what else is worth knowing of a kernel: names, versions, threads."""
    return {
        "model": model_args.model_name_or_path,
        **({} if model_args.gguf_file is None else {"gguf_file": model_args.gguf_file}),
        "data_files": {mode: str(run.data_files[name]) for mode, name in _train_and(run, split).items()},
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }


def _train_and(run: Experiment, split: str) -> dict[str, str]:
    """Train and another split by their modes: a second test set is the test split of its own task."""
    return {Split.parse(name).mode: name for name in ("train", split)}


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
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
    """Return the SHA-256 of what a configuration says of the model: heads, activation, norms, attention."""
    says_nothing = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
    settings = {name: value for name, value in config.to_dict().items() if name not in says_nothing}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def hash_of_tokens(dataset: FeatureDataset) -> str:
    """Return the SHA-256 of the token and segment ids of a split: what tokenizer, prompts and limits made of it."""
    digest = hashlib.sha256()
    for feature in dataset.features:
        digest.update(repr((feature.input_ids, feature.token_type_ids, feature.mask_position)).encode())
    return digest.hexdigest()
