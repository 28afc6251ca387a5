"""The weights that a fine-tuning has saved, beside a kernel of the model that it started from."""

import contextlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmntk.config.arguments import ModelArguments, TrainingArguments
from lmntk.errors import FileError, ModelError, SettingError
from lmntk.experiment.experiment import Experiment
from lmntk.experiment.provenance import fixed_parameters, hashes_of_data, parameter_filter
from lmntk.kernels.problem import Parameters
from lmntk.models.checkpoints import restore_checkpoint
from lmntk.storage.kernel_metadata import HASHES_BY_SPLIT
from lmntk.storage.paths import RunPaths
from lmntk.storage.training_snapshots import find_snapshots, read_snapshot
from lmntk.trainers.snapshot_steps import remove_snapshot
from lmntk.trainers.training_checkpoints import CHECKPOINT_NAME, recorded_step

logger = logging.getLogger(__name__)

SETTING = "fine_tuned_model"


@dataclass(frozen=True)
class FineTuned:
    """What a fine-tuning has made of a model.

    Attributes:
        folder: The folder that holds it.
        step: T, the number of optimizer steps; 1 where the folder does not say.
        weights: θ_T of the parameters that have changed, by name.
        settings: The settings of the training, for the description of a snapshot.
    """

    folder: Path
    step: int
    weights: Parameters
    settings: Mapping[str, Any]


def check_output_folder(args: TrainingArguments, paths: RunPaths) -> None:
    """Check that the snapshots to come take the place of none that a training wrote.

    Raises:
        SettingError: The output folder is that of the training, or holds the snapshots of one.
    """
    folder, output = Path(str(args.fine_tuned_model)).resolve(), Path(args.output_dir).resolve()
    is_its_own = output == folder or (output == folder.parent and CHECKPOINT_NAME.fullmatch(folder.name))
    written = [] if is_its_own else [path for path in find_snapshots(paths) if not comes_from_kernel_run(path)]
    if is_its_own or written:
        which = f"is the folder of `{SETTING}`" if is_its_own else f"holds {written[0].name}, a snapshot of a training"
        raise SettingError(
            f"`output_dir={args.output_dir}` {which}, which this run would replace: choose another folder",
            setting="output_dir",
            value=args.output_dir,
        )


def comes_from_kernel_run(snapshot: Path) -> bool:
    """Return whether a snapshot was written by a kernel run, with `fine_tuned_model`; False where it is damaged."""
    with contextlib.suppress(FileError):
        return bool(read_snapshot(snapshot).description.get(SETTING))
    return False


def clear_own_snapshots(paths: RunPaths) -> None:
    """Remove the snapshots that an earlier kernel run left, those of a training never.

    Raises:
        FileError: A snapshot cannot be removed.
    """
    for path in find_snapshots(paths):
        if comes_from_kernel_run(path):
            remove_snapshot(path)


def read_fine_tuned(experiment: Experiment, model_args: ModelArguments, args: TrainingArguments) -> FineTuned:
    """Read the folder that `fine_tuned_model` names; the model stays at θ₀.

    Args:
        experiment: What was built from the arguments of the kernel.
        model_args: The arguments of the model.
        args: The arguments of the run.

    Raises:
        SettingError: The training had other prompts, another head, or started from another model.
        ModelError: The folder holds no weights, those of another architecture, or those of θ₀.
    """
    folder = Path(str(args.fine_tuned_model))
    record = _record(folder, experiment.task.key)
    if record is None:
        logger.warning(
            "`%s`: there is no run_%s.json in or above %s, so its prompts and its start cannot be compared with those "
            "of this run",
            SETTING,
            experiment.task.key,
            folder,
        )
    else:
        check_same_run(record, experiment, model_args, args)
        _warn_of_other_parameters(record, model_args, args)
    weights = _changed_weights(experiment, folder)
    step = _last_step(folder, record, experiment)
    if step is None:
        logger.warning(
            "`%s`: nothing in %s says how many steps it was trained: step 1 stands for them", SETTING, folder
        )
    kept = ("optimizer", "optimizer_variant", "learning_rate", "fix_layers")
    return FineTuned(folder, step or 1, weights, {name: (record or {}).get(name) for name in kept})


def _record(folder: Path, task_key: str) -> dict[str, Any] | None:
    """Return the record of the run that a folder is of: beside its weights, or above a checkpoint."""
    for place in (folder, folder.parent) if CHECKPOINT_NAME.fullmatch(folder.name) else (folder,):
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(RunPaths(place, task_key).record().read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return found
    return None


def check_same_run(
    record: Mapping[str, Any], experiment: Experiment, model_args: ModelArguments, args: TrainingArguments
) -> None:
    """Check that a fine-tuning had the prompts and the start of this run.

    Args:
        record: The record of the fine-tuning.
        experiment: What was built from the arguments of the kernel.
        model_args: The arguments of the model.
        args: The arguments of the run.

    Raises:
        SettingError: Names the first setting that differs.
    """
    folder = args.fine_tuned_model

    def refuse(setting: str, theirs: Any, ours: Any) -> None:
        remedy = "leave it out" if theirs is None else f"give `{setting}={theirs}`"
        raise SettingError(
            f"`{SETTING}={folder}` was made with `{setting}={theirs}`, but this run has `{setting}={ours}`: {remedy}, "
            "or name another folder",
            setting=setting,
            value=ours,
        )

    if record.get("trainer") != "standard" or not record.get("do_train"):
        raise SettingError(
            f"`{SETTING}={folder}` is not of a fine-tuning (its `trainer` is {record.get('trainer')}, `do_train` "
            f"{record.get('do_train')}): name a folder that `trainer=standard` with `do_train` has written",
            setting=SETTING,
            value=folder,
        )
    templates = experiment.prompts.templates
    ours = {
        "few_shot_type": model_args.few_shot_type,
        "binary_classification": args.binary_classification,
        "apply_lora": model_args.apply_lora,
        "template": templates[0] if len(templates) == 1 else list(templates),
        "mapping": str(dict(experiment.prompts.mapping)),
        "from_linearhead": args.from_linearhead,
        "random_model_init": args.random_model_init,
        "seed": args.seed,
    }
    if experiment.lora is not None:
        ours |= {"lora_r": experiment.lora.rank, "lora_alpha": experiment.lora.alpha}
    if model_args.few_shot_type == "finetune":
        del ours["template"], ours["mapping"]
    if experiment.model.lm.config.model_type == "bert":
        ours["segments"] = model_args.segments
    for setting, value in ours.items():
        if record.get(setting, value) != value:
            refuse(setting, record[setting], value)
    theirs = record.get("model_name_or_path")
    if theirs is not None and not _same_place(theirs, model_args.model_name_or_path):
        refuse("model_name_or_path", theirs, model_args.model_name_or_path)
    if not _has_same_data(record, experiment, str(folder)):
        for setting, value in _prompt_settings(experiment).items():
            if record.get(setting, value) != value:
                refuse(setting, record[setting], value)
        data = record.get("data_dir")
        if data is not None and Path(data).parts[-2:] != Path(experiment.data_dir).parts[-2:]:
            refuse("data_dir", data, experiment.data_dir)


def _has_same_data(record: Mapping[str, Any], experiment: Experiment, folder: str) -> bool:
    """Return whether a record proves that a training read the prompts and labels of this run.

    Raises:
        SettingError: It proves that they are others.
    """
    recorded, ours = {name: record.get(name) for name in HASHES_BY_SPLIT}, hashes_of_data(experiment)
    known = {name: value for name, value in recorded.items() if isinstance(value, Mapping)}
    for name, theirs in known.items():
        # Other labels of dev and test change no weight and no logit; other texts would be other examples.
        splits = ["train"] if name == "data_sha256" else [*ours[name]]
        differing = [split for split in splits if theirs.get(split, ours[name].get(split)) != ours[name].get(split)]
        if differing:
            settings = [
                f"`{key}={record[key]}`" for key in ("data_dir", *_prompt_settings(experiment)) if key in record
            ]
            raise SettingError(
                f"`{SETTING}={folder}` was trained with other texts or prompts than those of this run (of "
                f"{', '.join(differing)}): give the data and the prompt settings that it was trained with "
                f"({', '.join(settings)}), or name another folder",
                setting=SETTING,
                value=folder,
            )
    return "tokens_sha256" in known


def _prompt_settings(experiment: Experiment) -> dict[str, Any]:
    """Return the settings that cut prompts and draw their demonstrations, as a record spells them."""
    found: dict[str, Any] = dict(vars(experiment.prompts.limits))
    shown = experiment.prompts.demonstrations
    if shown is not None:
        found |= {
            "num_sample": experiment.prompts.num_demonstration_samples,
            "auto_demo": shown.auto,
            "gpt3_in_context_head": shown.in_context == "head",
            "gpt3_in_context_tail": shown.in_context == "tail",
            "demo_filter": shown.filter_model is not None,
        }
        found |= {"gpt3_in_context_num": shown.in_context_num} if shown.in_context else {"num_demo": shown.num_demo}
        if shown.filter_model is not None:
            found |= {"demo_filter_model": shown.filter_model, "demo_filter_rate": shown.filter_rate}
    return found


def _warn_of_other_parameters(record: Mapping[str, Any], model_args: ModelArguments, args: TrainingArguments) -> None:
    """Warn if the kernel counts other parameters than those that the training changed."""
    ours, theirs = parameter_filter(model_args, args), fixed_parameters(record.get("fix_layers") or 0, model_args)
    differing = [name for name, value in vars(theirs).items() if vars(ours)[name] != value]
    if differing:
        pairs = ", ".join(f"`{name}={vars(ours)[name]}`" for name in differing)
        wanted = ", ".join(f"`{name}={vars(theirs)[name]}`" for name in differing)
        logger.warning(
            "`%s`: this kernel counts other parameters (%s) than those that the training changed (`fix_layers=%s`), so "
            "it is not the training's own: give %s for that one",
            SETTING,
            pairs,
            record.get("fix_layers") or 0,
            wanted,
        )


def _same_place(one: str, other: str) -> bool:
    return one == other or Path(one).resolve() == Path(other).resolve()


def _changed_weights(experiment: Experiment, folder: Path) -> Parameters:
    """Return θ_T of the parameters that differ from θ₀."""
    model = experiment.model
    start = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        restore_checkpoint(model, folder, SETTING)
        found = {name: p.data for name, p in model.named_parameters() if not torch.equal(p.data, start[name])}
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = start[name]
    if not found:
        raise ModelError(
            f"`{SETTING}={folder}` holds the weights of `model_name_or_path` itself, so training has changed nothing: "
            "name the folder of another training",
            path=folder,
        )
    return found


def _last_step(folder: Path, record: Mapping[str, Any] | None, experiment: Experiment) -> int | None:
    """Return the number of steps after which the weights in a folder were saved, if anything there says it."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return recorded_step(folder)
    if record is not None and isinstance(record.get("last_step"), int):
        return int(record["last_step"])
    snapshots = find_snapshots(RunPaths(folder, experiment.task.key))
    if snapshots:
        return int(read_snapshot(snapshots[-1]).description.get("last_step", 1))
    if record is None or record.get("evaluate_during_training"):  # the best model may be that of any step
        return None
    if record.get("max_steps", 0) > 0:
        return int(record["max_steps"])
    with contextlib.suppress(KeyError):
        batch = record["per_device_train_batch_size"] * record["gradient_accumulation_steps"]
        return math.ceil(math.ceil(len(experiment.datasets["train"]) / batch) * record["num_train_epochs"])
    return None
