"""Fine-tuning: the stock `Trainer`, with LM-BFF's ways of choosing what is trained and which model is kept."""

import contextlib
import json
import logging
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, TrainOutput
from transformers.training_args import OptimizerNames

from lmntk import distributed
from lmntk.config.arguments import ModelArguments, TrainingArguments
from lmntk.data.metrics import compute_metrics
from lmntk.data.tasks import Task
from lmntk.errors import UsageError
from lmntk.experiment.build import Experiment
from lmntk.experiment.provenance import hash_of_tokens
from lmntk.interrupts import Stopped
from lmntk.models.checkpoints import ADAPTERS_FILE, WEIGHTS_FILE, restore_checkpoint, save_checkpoint, save_tokenizer
from lmntk.models.classifier import PromptClassifier
from lmntk.models.parameters import ParameterFilter, count_parameters, select_parameters
from lmntk.prompts.features import ResampledDemonstrations
from lmntk.storage.atomic import file_error_behind, write_atomically
from lmntk.trainers.base import FewShotTrainer

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.pt"
SCHEDULER_FILE = "scheduler.pt"
SETTINGS_FILE = "training_settings.json"
SAME_WHEN_RESUMED = (
    "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "seed", "per_device_train_batch_size",
    "gradient_accumulation_steps", "optimizer_variant", "fix_layers", "clip_frozen", "decay_head_norm",
)  # fmt: skip
SPARED_BY_NAME = ("bias", "LayerNorm.weight")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class FineTuneTrainer(FewShotTrainer):
    """A stock `Trainer` with AdamW, SGD or SignGD that can keep the best model on dev.

    Its checkpoints are folders that ``--model_name_or_path`` takes.

    Args:
        run: What was built from the flags.
        model_args: The model's flags.
        args: The flags of the run.
    """

    args: TrainingArguments

    def __init__(self, run: Experiment, model_args: ModelArguments, args: TrainingArguments) -> None:
        assert isinstance(run.model, PromptClassifier)
        trained = select_parameters(
            run.model,
            ParameterFilter(
                exclude_embeddings=args.fix_layers > 0,
                exclude_first_layers=args.fix_layers,
                only_adapters=model_args.apply_lora,
            ),
            "--fix_layers",
        )
        self._run = run
        self._trained_names = frozenset(trained)
        for name, parameter in run.model.named_parameters():
            # Where frozen layers count in the clipped norm they have gradients, but the optimizer leaves them alone.
            parameter.requires_grad_(name in trained or (args.clip_frozen and not model_args.apply_lora))
        if args.optimizer == "sgd":
            args.optim = OptimizerNames.SGD
        self._keeps_model = args.save_strategy != SaveStrategy.NO
        _check_metric(args, run.task)
        if args.evaluate_during_training:
            _keep_the_best(args, run.task.metric_prefix + run.task.main_metrics[0])
        super().__init__(
            run,
            run.model,
            args,
            model_args.l2_loss,
            train_dataset=run.redrawn or run.datasets["train"],
            eval_dataset=run.datasets.get("dev"),
            callbacks=[_CountEpochs(run.redrawn)],
        )
        # What the model was made of: not to be removed while making room for its checkpoints.
        self._sources = [Path(name) for name in (model_args.model_name_or_path, run.base_name)]
        self._trained = count_parameters(trained)
        if args.dataloader_drop_last and not len(self.get_train_dataloader()):
            raise UsageError(
                f"--dataloader_drop_last drops all {len(run.datasets['train'])} train prompts, fewer than a batch of "
                f"{args.per_device_train_batch_size}: leave the flag out, or lower --per_device_train_batch_size"
            )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Fine-tune, from a checkpoint where ``--resume_from_checkpoint`` names one, and keep the model."""
        checkpoint = distributed.on_rank_zero(self._find_checkpoint)
        self._announce(checkpoint)
        try:
            output = super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except Stopped as stop:
            number = sum(not _missing(path) for path in _checkpoints(Path(self.args.output_dir)))
            stop.kept_summary = f"{number} checkpoint{' is' if number == 1 else 's are'} kept in {self.args.output_dir}"
            stop.resume_hint = "the same command with `resume_from_checkpoint=true` goes on from the last"
            if number == 0:
                stop.kept_summary, stop.resume_hint = "no checkpoint was saved yet", "the same command starts anew"
            raise
        if self._keeps_model:
            self.save_model()
            logger.info("the model is in %s", self.args.output_dir)
        return output

    def finish(self) -> None:
        """Remove the checkpoints of the training that is over, unless the user said when to save some."""
        if not self.args.keeps_checkpoints:
            there = _checkpoints(Path(self.args.output_dir))
            distributed.on_rank_zero(lambda: self._remove([path for path in there if not self._starts_from(path)]))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer; before its step SignGD takes the sign of the gradient, which has been clipped by then."""
        had_one = self.optimizer is not None
        with self._others_frozen():
            optimizer = super().create_optimizer(model)
        if self.args.optimizer_variant == "signgd" and not had_one:
            optimizer.register_step_pre_hook(_take_signs)
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        # The stock trainer looks for lengths in data sets of dictionaries. Redrawn prompts are about as long.
        lengths = [len(feature.input_ids) for feature in self._run.datasets["train"].features]
        return LengthGroupedSampler(self.args.train_batch_size * self.args.gradient_accumulation_steps, lengths=lengths)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return which parameters weight decay is for: no bias and no norm, or by their names as LM-BFF chose them."""
        if not self.args.decay_head_norm:
            return super().get_decay_parameter_names(model)
        return [name for name, _ in model.named_parameters() if not any(word in name for word in SPARED_BY_NAME)]

    @contextlib.contextmanager
    def _others_frozen(self) -> Iterator[None]:
        """Show the stock trainer, while this holds, no gradient of what is not trained."""
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
        """The checkpoint to go on from; those of an earlier training that is overwritten are removed."""
        folder, asked = Path(self.args.output_dir), self.args.resume_from_checkpoint
        there = _checkpoints(folder)
        if asked is None:
            self._remove(there)
            return None
        if asked.lower() == "true":
            whole = [path for path in there if not _missing(path)]
            if not whole:
                logger.info("%s holds no checkpoint to go on from: training starts at the beginning", folder)
                return None
            path = whole[-1]
        else:
            path = Path(asked)
            if _missing(path):
                raise UsageError(
                    f"--resume_from_checkpoint {path}: there is no {_missing(path)[0]} in it, so it is no whole "
                    "checkpoint; name a checkpoint-N folder of an earlier run, or give `true` for the last one in "
                    "--output_dir"
                )
            # What another training left would be taken for this one's when it is resumed the next time.
            others = [one for one in there if path.resolve() not in (one.resolve() for one in there)]
            if others and not self.args.overwrite_output_dir:
                raise UsageError(
                    f"--output_dir {folder} holds checkpoints of another training than that of "
                    f"--resume_from_checkpoint {path}: choose another folder, or pass --overwrite_output_dir to remove "
                    "them"
                )
            self._remove(others)
        step = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["global_step"]
        if 0 < self.args.max_steps < step:
            raise UsageError(
                f"--resume_from_checkpoint: {path} is of step {step}, behind --max_steps "
                f"{self.args.max_steps}: raise that, or name an earlier checkpoint"
            )
        self._remove([one for one in there if one.parent == path.parent and _step(one) > _step(path)])
        return path

    def _remove(self, folders: list[Path]) -> None:
        """Remove checkpoints, unless this training started from one."""
        for folder in folders:
            if self._starts_from(folder):
                raise UsageError(
                    f"--output_dir {self.args.output_dir}: its checkpoints make room for new ones, but this training "
                    f"starts from {folder}: choose another folder"
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
        length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
        how = {"adam": "AdamW", "sgd": "SignGD" if args.optimizer_variant else "SGD"}[args.optimizer]
        if args.optimizer == "adam" and "adamw" not in args.optim:
            how = str(args.optim)
        # Weights, gradients, and the two moments that AdamW keeps of each parameter that is trained.
        size = next(model.parameters()).element_size()
        memory = size * (total + self._trained * (3 if args.optimizer == "adam" else 1)) / 2**30
        logger.info(
            "fine-tuning on %d prompts: %s of batches of %d with %s, learning rate %g; %s of %s parameters are "
            "trained; with the optimizer they take %.2f GB, activations come on top%s",
            *(len(data), length, batch, how, args.learning_rate, f"{self._trained:,}", f"{total:,}", memory),
            "" if checkpoint is None else f"; going on from {checkpoint}",
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of the model and its tokenizer; no pickled arguments, as the stock trainer has them."""
        if not self.args.should_save:  # the stock trainer asks every process
            return
        folder = Path(output_dir or self.args.output_dir)
        save_checkpoint(self._position_model(), folder, self._run.base_name)
        if self._run.tokenizer is not None:
            save_tokenizer(self._run.tokenizer, folder)
        if _CHECKPOINT.fullmatch(folder.name):
            write_atomically(folder / SETTINGS_FILE, lambda file: file.write(json.dumps(self._settings()).encode()))

    def _settings(self) -> dict[str, Any]:
        """What a training that goes on from a checkpoint should have in common with the one that wrote it."""
        settings = {name: getattr(self.args, name) for name in SAME_WHEN_RESUMED}
        return settings | {"train_prompts": hash_of_tokens(self._run.datasets["train"])}

    def _compare_settings(self, checkpoint: Path) -> None:
        """Refuse to go on with other train prompts; name the flags that differ, and that the checkpoint's count."""
        try:
            stored = json.loads((checkpoint / SETTINGS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        differing = [name for name, value in self._settings().items() if stored.get(name, value) != value]
        if "train_prompts" in differing:
            raise UsageError(
                f"--resume_from_checkpoint: {checkpoint} was trained on other prompts: give its task, data, template "
                "and --few_shot_type, or take it as --model_name_or_path to train it further"
            )
        for name in differing:
            logger.warning(
                "--%s is %s, but was %s when %s was written; what the optimizer and its schedule keep, such as the "
                "learning rate, goes on as it was",
                *(name, getattr(self.args, name), stored.get(name), checkpoint),
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the stock trainer write a checkpoint; of one that could not be finished nothing stays."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, UsageError) as error:
            cause = file_error_behind(error)
            if cause is None and not isinstance(error, UsageError):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            if cause is None:
                raise
            raise UsageError(f"cannot write {folder} ({cause.strerror}): make room there") from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_checkpoint(self._position_model(), Path(resume_from_checkpoint), "--resume_from_checkpoint")
        self._compare_settings(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _sentences_over(checkpoint, f"{OPTIMIZER_FILE} and {SCHEDULER_FILE}"):
            if checkpoint is not None:
                stored = torch.load(Path(checkpoint) / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
                assert self.optimizer is not None
                if _shape(stored) != _shape(self.optimizer.state_dict()):
                    raise ValueError("its optimizer is another, or had other parameters to train")
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _sentences_over(checkpoint, "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Let any number beat one that is none, such as a correlation with predictions that are all alike."""
        numbers = {name: -math.inf if math.isnan(value) else value for name, value in metrics.items()}
        return super()._determine_best_metric(numbers, trial)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        logger.info("keeping the model of %s, the best on dev (%.4g)", best, self.state.best_metric)
        restore_checkpoint(self._position_model(), Path(best), "--evaluate_during_training")

    def _position_model(self) -> PromptClassifier:
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, PromptClassifier)
        return model


class _CountEpochs(TrainerCallback):
    """Tells the data set that draws demonstrations which epoch it is."""

    def __init__(self, dataset: ResampledDemonstrations | None) -> None:
        self._dataset = dataset

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count."""
        if self._dataset is not None:
            self._dataset.epoch = int(state.epoch or 0)


def _check_metric(args: TrainingArguments, task: Task) -> None:
    """See that the stock trainer will find the metric it is to choose by."""
    names = [*compute_metrics(task, [0, 1], [0, 1]), "loss"]
    asked = args.metric_for_best_model
    if asked is not None and asked.removeprefix("eval_") not in names:
        raise UsageError(f"--metric_for_best_model {asked} is no metric of {task.name}: {', '.join(names)}")


def _keep_the_best(args: TrainingArguments, metric: str) -> None:
    """Let the stock trainer evaluate while it trains, and end with the model that is best by `metric`."""
    strategy = "epoch" if args.eval_steps is None else "steps"
    args.eval_strategy = IntervalStrategy(strategy)
    if args.eval_steps is not None:
        args.save_steps = args.eval_steps
    if args.save_at_last:
        return
    args.save_strategy = SaveStrategy(strategy)
    args.load_best_model_at_end = True
    args.metric_for_best_model = metric
    args.greater_is_better = True
    if args.save_total_limit is None:
        args.save_total_limit = 1


@contextlib.contextmanager
def _sentences_over(checkpoint: str | None, files: str) -> Iterator[None]:
    """Turn what torch raises over files of a checkpoint that it cannot use into one sentence."""
    try:
        yield
    except Exception as error:  # damaged files make torch raise anything
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise UsageError(
            f"--resume_from_checkpoint: training cannot go on from {checkpoint}, its {files} do not fit or are damaged "
            f"({reason}): give the flags of the run that wrote it (--optimizer, --fix_layers, --apply_lora), or name "
            "another checkpoint"
        ) from error


def _shape(state: Mapping[str, Any]) -> list[tuple[int, frozenset[str]]]:
    """What an optimizer's state says of its parameter groups: how many parameters, and which settings they have."""
    return [(len(group["params"]), frozenset(group) - {"params", "initial_lr"}) for group in state["param_groups"]]


def _missing(checkpoint: Path) -> list[str]:
    """The files that a checkpoint lacks, or that are damaged, of those without which training cannot go on from it."""
    missing = [name for name in (STATE_FILE, OPTIMIZER_FILE, SCHEDULER_FILE) if not (checkpoint / name).is_file()]
    if not any((checkpoint / name).is_file() for name in (WEIGHTS_FILE, ADAPTERS_FILE)):
        missing.append(WEIGHTS_FILE)
    if STATE_FILE not in missing:
        try:
            json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            missing.append(f"readable {STATE_FILE}")
    return missing


def _take_signs(optimizer: torch.optim.Optimizer, *args: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.sign_()


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of the stock trainer, the earliest first."""
    return sorted((path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)), key=_step)


def _step(checkpoint: Path) -> int:
    """The step of a checkpoint folder, by its name; 0 of any other."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    return 0 if match is None else int(match[1])
