"""Fine-tuning: the stock `Trainer`, choosing the trained parameters and the kept model as LM-BFF does."""

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import SaveStrategy, TrainOutput
from transformers.training_args import OptimizerNames

from lmntk import distributed
from lmntk.config.arguments import ModelArguments, TrainingArguments
from lmntk.errors import FileError, SettingError, UsageError
from lmntk.experiment.experiment import Experiment
from lmntk.experiment.provenance import fixed_parameters, hash_of_tokens, hashes_of_data
from lmntk.interrupts import Stopped
from lmntk.kernels.memory import retain_freed_memory
from lmntk.models.checkpoints import restore_checkpoint, save_checkpoint, save_tokenizer
from lmntk.models.classifier import PromptClassifier
from lmntk.models.parameters import count_parameters, dropout_probabilities, select_parameters
from lmntk.prompts.features import ResampledDemonstrations
from lmntk.storage.atomic import cause_in_file_system, write_atomically
from lmntk.storage.paths import RunPaths
from lmntk.storage.wording import quantity
from lmntk.trainers.base import FewShotTrainer
from lmntk.trainers.best_model import check_metric, choosing_the_best
from lmntk.trainers.snapshot_steps import SnapshotSteps, clear_snapshots
from lmntk.trainers.snapshots import SnapshotWriter
from lmntk.trainers.training_checkpoints import (
    CHECKPOINT_NAME,
    OPTIMIZER_FILE,
    SCHEDULER_FILE,
    find_checkpoints,
    missing_files,
    optimizer_shape,
    recorded_step,
    refusing_damaged_files,
    step_of,
)

logger = logging.getLogger(__name__)

SETTINGS_FILE = "training_settings.json"
SAME_WHEN_RESUMED = (
    "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "seed", "per_device_train_batch_size",
    "gradient_accumulation_steps", "optimizer_variant", "fix_layers", "clip_frozen", "decay_head_norm",
)  # fmt: skip
SPARED_BY_NAME = ("bias", "LayerNorm.weight")


class FineTuneTrainer(FewShotTrainer):
    """A stock `Trainer` with AdamW, SGD or SignGD that can keep the best model on dev.

    Its checkpoints are folders that `model_name_or_path` takes.

    Args:
        experiment: What was built from the arguments.
        model_args: The arguments of the model.
        args: The arguments of the run.
    """

    what = "fine-tuning"
    """What is done, for the log."""

    is_linear = False
    """Whether it is the linearised model that is trained."""

    def __init__(self, experiment: Experiment, model_args: ModelArguments, args: TrainingArguments) -> None:
        model = experiment.model
        left_out = fixed_parameters(args.fix_layers, model_args)
        trained = select_parameters(model, left_out, "fix_layers")
        for name, parameter in model.named_parameters():
            # Frozen layers get gradients if these count in the clipped norm; the optimizer leaves the layers alone.
            parameter.requires_grad_(name in trained or (args.clip_frozen and not model_args.apply_lora))
        check_metric(args, experiment.task)
        self._saves_model = args.save_strategy != SaveStrategy.NO
        if args.optimizer == "sgd":
            args = args.with_changes(optim=OptimizerNames.SGD)
        if args.evaluate_during_training:
            args = args.with_changes(**choosing_the_best(args, experiment.task))
        self._experiment = experiment
        self._trained_names = frozenset(trained)
        super().__init__(
            experiment.task,
            self._trained_model(model, trained),
            args,
            experiment.collator,
            model_args.l2_loss,
            train_dataset=experiment.resampled or experiment.datasets["train"],
            eval_dataset=experiment.datasets.get("dev"),
            callbacks=[] if experiment.resampled is None else [_SetEpoch(experiment.resampled)],
        )
        # Making room for checkpoints must not remove the checkpoints that the model was loaded from.
        self._sources = [Path(name) for name in (model_args.model_name_or_path, experiment.base_name)]
        self._num_trained = count_parameters(trained)
        self._snapshots = None
        steps = self.args.snapshot_steps
        if steps is not None:
            counted = {name: value for name, value in vars(left_out).items() if value} or "all"
            facts, start = {"parameters": counted}, self._start(trained)
            self._snapshots = SnapshotWriter(
                experiment, model_args, self.args, self._trained_names, start, facts, self.is_linear
            )
            self.add_callback(SnapshotSteps(self._snapshots, steps, trained))
        if args.dataloader_drop_last and not len(self.get_train_dataloader()):
            raise SettingError(
                f"`dataloader_drop_last` drops all {len(experiment.datasets['train'])} train prompts, fewer than a "
                f"batch of {args.per_device_train_batch_size}: leave it out, or lower `per_device_train_batch_size`",
                setting="dataloader_drop_last",
                value=True,
            )

    def _trained_model(self, model: PromptClassifier, names: Iterable[str]) -> nn.Module:
        """Return what the stock trainer trains: the model itself."""
        return model

    def _start(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of the trained parameters as they are now, θ₀."""
        return {name: parameter.detach().clone() for name, parameter in trained.items()}

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Fine-tune, from a checkpoint if `resume_from_checkpoint` names one, and save the model."""
        checkpoint = distributed.on_rank_zero(self._find_checkpoint)
        distributed.on_rank_zero(
            clear_snapshots,
            RunPaths(self.args.output_dir, self._experiment.task.key),
            0 if checkpoint is None else recorded_step(checkpoint),
            None if self._snapshots is None else self._snapshots.facts,
        )
        self._announce(checkpoint)
        try:
            with retain_freed_memory():  # every step frees all gradients and makes them anew
                output = super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except Stopped as stop:
            number = sum(not missing_files(path) for path in find_checkpoints(Path(self.args.output_dir)))
            verb = "is" if number == 1 else "are"
            stop.kept_summary = f"{quantity(number, 'checkpoint')} {verb} kept in {self.args.output_dir}"
            stop.resume_hint = "the same command with `resume_from_checkpoint=true` goes on from the last"
            if number == 0:
                stop.kept_summary, stop.resume_hint = "no checkpoint was saved yet", "the same command starts anew"
            raise
        if self._saves_model:
            self.save_model()
            logger.info("the model is in %s", self.args.output_dir)
        elif self.is_linear:
            logger.info("the linearised model is not saved: its weights alone would predict something else")
        return output

    def finish(self) -> None:
        """Remove the checkpoints of the finished training, unless the user said when to save some."""
        if not self.args.keeps_checkpoints:
            found = find_checkpoints(Path(self.args.output_dir))
            distributed.on_rank_zero(self._remove, [path for path in found if not self._starts_from(path)])

    def facts(self) -> dict[str, Any]:
        """Return T, the step of the kept model, processes, dropout, and the hashes of prompts and data."""
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        step = self.state.global_step if best is None else step_of(Path(best))
        drawn = {} if self.is_linear else dropout_probabilities(self._experiment.model)
        facts = {"last_step": step, "processes": distributed.world_size(), "dropout": drawn}
        return {**facts, **hashes_of_data(self._experiment)}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer; SignGD takes the sign of the gradient after it is clipped and before the step."""
        had_one = self.optimizer is not None
        with self._others_frozen():
            optimizer = super().create_optimizer(model)
        if self.args.optimizer_variant == "signgd" and not had_one:
            optimizer.register_step_pre_hook(_take_signs)
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        # The stock trainer looks for lengths in data sets of dictionaries. Resampled prompts are about as long.
        lengths = [len(feature.input_ids) for feature in self._experiment.datasets["train"].features]
        return LengthGroupedSampler(self.args.train_batch_size * self.args.gradient_accumulation_steps, lengths=lengths)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the parameters with weight decay: no biases and norms; LM-BFF recognised those by their names."""
        if not self.args.decay_head_norm:
            return super().get_decay_parameter_names(model)
        return [name for name, _ in model.named_parameters() if not any(word in name for word in SPARED_BY_NAME)]

    @contextlib.contextmanager
    def _others_frozen(self) -> Iterator[None]:
        """Switch the gradients of parameters that are not trained off in this block."""
        named = self._position_model().named_parameters()
        extra = [parameter for name, parameter in named if parameter.requires_grad and name not in self._trained_names]
        for parameter in extra:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in extra:
                parameter.requires_grad_(True)

    def _find_checkpoint(self) -> Path | None:
        """Return the checkpoint to continue from; remove those of an earlier training that is overwritten."""
        folder, asked = Path(self.args.output_dir), self.args.resume_from_checkpoint
        found = find_checkpoints(folder)
        if asked is None:
            self._remove(found)
            return None
        if asked.lower() == "true":
            whole = [path for path in found if not missing_files(path)]
            if not whole:
                logger.info("%s holds no checkpoint to continue from: training starts at the beginning", folder)
                return None
            path = whole[-1]
        else:
            path = Path(asked)
            if missing_files(path):
                raise FileError(
                    f"`resume_from_checkpoint={path}`: there is no {missing_files(path)[0]} in it, so it is not a "
                    "complete checkpoint; name a checkpoint-N folder of an earlier run, or give true for the last one "
                    "in `output_dir`",
                    path=path,
                )
            # The next run that resumes would take the checkpoints of another training for this one's.
            others = [one for one in found if path.resolve() not in (one.resolve() for one in found)]
            if others and not self.args.overwrite_output_dir:
                raise SettingError(
                    f"`output_dir={folder}` holds checkpoints of another training than that of "
                    f"`resume_from_checkpoint={path}`: choose another folder, or pass `overwrite_output_dir=True` to "
                    "remove them",
                    setting="output_dir",
                    value=str(folder),
                )
            self._remove(others)
        step = recorded_step(path)
        if 0 < self.args.max_steps < step:
            raise SettingError(
                f"`resume_from_checkpoint`: {path} is of step {step}, after `max_steps={self.args.max_steps}`: raise "
                "that, or name an earlier checkpoint",
                setting="max_steps",
                value=self.args.max_steps,
            )
        self._remove([one for one in found if one.parent == path.parent and step_of(one) > step_of(path)])
        return path

    def _remove(self, folders: list[Path]) -> None:
        """Remove checkpoints, unless this training started from one."""
        for folder in folders:
            if self._starts_from(folder):
                raise SettingError(
                    f"`output_dir={self.args.output_dir}`: its checkpoints make room for new ones, but this training "
                    f"starts from {folder}: choose another folder",
                    setting="output_dir",
                    value=self.args.output_dir,
                )
        for folder in folders:
            shutil.rmtree(folder)

    def _starts_from(self, folder: Path) -> bool:
        sources = [path.resolve() for path in self._sources if path.exists()]
        return any(path.is_relative_to(folder.resolve()) for path in sources)

    def _announce(self, checkpoint: Path | None) -> None:
        args, data, model = self.args, self.train_dataset, self.model
        assert isinstance(data, Sized) and model is not None
        total = sum(parameter.numel() for parameter in model.parameters())
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * distributed.world_size()
        length = quantity(args.max_steps, "step") if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
        optimizer = {"adam": "AdamW", "sgd": "SignGD" if args.optimizer_variant else "SGD"}[args.optimizer]
        if args.optimizer == "adam" and "adamw" not in args.optim:
            optimizer = str(args.optim)
        # Weights, gradients, and the two moments that AdamW keeps of each trained parameter.
        size = next(model.parameters()).element_size()
        copies = (3 if args.optimizer == "adam" else 1) + (2 if self._snapshots else int(self.is_linear))
        memory = size * (total + self._num_trained * copies) / 2**30
        also = "the optimizer"
        if self._snapshots is not None:
            also += f", and the weights at the start and before a step for the snapshots (steps {args.kernel_steps}),"
        resumed = "" if checkpoint is None else f"; continuing from {checkpoint}"
        logger.info(
            f"{self.what} on {quantity(len(data), 'prompt')}: {length} of batches of {batch} with {optimizer}, "
            f"learning rate {args.learning_rate:g}; {self._num_trained:,} of {total:,} parameters are trained; with "
            f"{also} they take {memory:.2f} GB, and activations come on top{resumed}"
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of the model and its tokenizer, without the pickled arguments of the stock trainer."""
        if not self.args.should_save:  # the stock trainer calls this on every process
            return
        folder = Path(output_dir or self.args.output_dir)
        save_checkpoint(self._position_model(), folder, self._experiment.base_name)
        if self._experiment.tokenizer is not None:
            save_tokenizer(self._experiment.tokenizer, folder)
        if CHECKPOINT_NAME.fullmatch(folder.name):
            write_atomically(folder / SETTINGS_FILE, lambda file: file.write(json.dumps(self._settings()).encode()))

    def _settings(self) -> dict[str, Any]:
        """Return what a resumed training should have in common with the training that wrote the checkpoint."""
        settings = {name: getattr(self.args, name) for name in SAME_WHEN_RESUMED}
        start = {} if self._snapshots is None else {"start_sha256": self._snapshots.start_hash}
        return settings | {"train_prompts": hash_of_tokens(self._experiment.datasets["train"])} | start

    def _compare_settings(self, checkpoint: Path) -> None:
        """Refuse other train prompts; warn of other settings, some of which the checkpoint overrides."""
        try:
            stored = json.loads((checkpoint / SETTINGS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        differing = [name for name, value in self._settings().items() if stored.get(name, value) != value]
        if "train_prompts" in differing:
            raise SettingError(
                f"`resume_from_checkpoint`: {checkpoint} was trained on other prompts: give its task, data, template "
                "and `few_shot_type`, or take it as `model_name_or_path` to train it further",
                setting="resume_from_checkpoint",
                value=str(checkpoint),
            )
        if "start_sha256" in differing:
            raise SettingError(
                f"`kernel_steps`: the training of {checkpoint} started from other weights than those of "
                "`model_name_or_path`, at which logits would be linearised: give the `model_name_or_path` and `seed` "
                "that it started from, or leave `kernel_steps` out",
                setting="kernel_steps",
                value=self.args.kernel_steps,
            )
        for name in differing:
            logger.warning(
                f"`{name}` is {getattr(self.args, name)}, but was {stored.get(name)} when {checkpoint} was written; "
                "the state of the optimizer and its schedule, such as the learning rate, stays that of the checkpoint"
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the stock trainer write a checkpoint; remove one that could not be finished."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, UsageError) as error:
            cause = cause_in_file_system(error)
            if cause is None and not isinstance(error, UsageError):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            if cause is None:
                raise
            raise FileError(f"cannot write {folder} ({cause.strerror}): make room there", path=folder) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_checkpoint(self._position_model(), Path(resume_from_checkpoint), "resume_from_checkpoint")
        self._compare_settings(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with refusing_damaged_files(checkpoint, f"{OPTIMIZER_FILE} and {SCHEDULER_FILE}"):
            if checkpoint is not None:
                stored = torch.load(Path(checkpoint) / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
                assert self.optimizer is not None
                if optimizer_shape(stored) != optimizer_shape(self.optimizer.state_dict()):
                    raise ValueError("it has another optimizer, or other trained parameters")
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with refusing_damaged_files(checkpoint, "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Let any number beat NaN, such as the correlation with predictions that are all equal."""
        numbers = {name: -math.inf if math.isnan(value) else value for name, value in metrics.items()}
        return super()._determine_best_metric(numbers, trial)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        logger.info("taking the model of %s, the best on dev (%.4g)", best, self.state.best_metric)
        restore_checkpoint(self._position_model(), Path(best), "evaluate_during_training")

    def _position_model(self) -> PromptClassifier:
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, PromptClassifier)
        return model


class _SetEpoch(TrainerCallback):
    """Sets the epoch of a data set that draws its demonstrations by it."""

    def __init__(self, dataset: ResampledDemonstrations) -> None:
        self._dataset = dataset

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Set the epoch that begins."""
        self._dataset.epoch = int(state.epoch or 0)


def _take_signs(optimizer: torch.optim.Optimizer, *args: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.sign_()
