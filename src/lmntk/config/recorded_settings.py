"""The settings of a run that another run of the same model, data and prompt has to share, read from its record."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

PROMPT_FILES = (
    "template_path", "template_id", "top_n_template", "mapping_path", "mapping_id", "prompt_path", "prompt_id",
)  # fmt: skip
"""The settings that name where a prompt was read; the record has the prompt itself."""


def recorded_settings(
    record: Mapping[str, Any], groups: Iterable[type], left_out: Collection[str] = ()
) -> dict[str, str]:
    """Return the settings of a record that differ from their defaults, as words of a command line.

    Args:
        record: The record of a run, ``run_TASK.json``.
        groups: The dataclasses of arguments whose fields count.
        left_out: The names of the fields that do not.

    Examples:
        >>> from lmntk.config.kernel_arguments import KernelArguments
        >>> recorded_settings({"only_biases": True, "kernel_solver": "lstsq", "seed": 13}, [KernelArguments])
        {'only_biases': 'True'}
    """
    # Without adapters on the model the scale belongs to `kernel_lora_rank`.
    left_out = {*left_out} if record.get("apply_lora") else {*left_out, "lora_alpha"}
    fields = [field for group in groups for field in dataclasses.fields(group) if field.name not in left_out]
    return {
        field.name: str(record[field.name])
        for field in fields
        if record.get(field.name) is not None
        and record[field.name] != field.default
        and not isinstance(record[field.name], list | dict)
    }
