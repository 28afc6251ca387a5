"""The arguments of an earlier run, from its record, for questions to the same model with the same prompts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lmntk.config.arguments import DataArguments, ModelArguments, TrainingArguments
from lmntk.kernels.engines import ESTIMATES

OF_THE_KERNEL = (
    *("kernel_formula", "binary_classification", "kernel_dtype", "kernel_memory_gb"),
    *("exclude_embeddings", "exclude_head", "only_biases", "exclude_first_layers"),
    *("random_model_init", "from_linearhead", "linear_head_halved", "linear_head_order", "plain_lbfgs"),
    *("seed", "use_cpu"),
)
"""The settings of a run that define its kernel, besides those of the model and of the data."""

OF_AN_ESTIMATE = ("kernel_engine", "projection_width", "projection_seed")
"""Those that define it if it is an estimate."""

Arguments = tuple[ModelArguments, DataArguments, TrainingArguments]


def arguments_of_record(record: Mapping[str, Any], **changes: Any) -> Arguments:
    """Return the arguments with which a run computed its kernel; nothing is trained, evaluated or written with them.

    Args:
        record: What the run recorded.
        **changes: Settings in place of the recorded ones, such as a `data_dir` that has moved; None counts as absent.
    """
    known = {**record, **{name: value for name, value in changes.items() if value is not None}}
    if not isinstance(known.get("template"), str | None):
        del known["template"]  # several, which the recorded file of templates names
    model, data = (
        {field.name: known[field.name] for field in dataclasses.fields(group) if field.name in known}
        for group in (ModelArguments, DataArguments)
    )
    estimated = OF_AN_ESTIMATE if known.get("kernel_engine") in ESTIMATES else ()
    of_kernel = {name: known[name] for name in (*OF_THE_KERNEL, *estimated) if name in known}
    training = TrainingArguments(
        output_dir=str(known.get("output_dir", ".")), trainer="kernel", do_train=True, report_to="none", **of_kernel
    )
    return ModelArguments(**model), DataArguments(**data), training
