"""Fine-tuning: the stock `Trainer`, with LM-BFF's ways of choosing what is trained and which model is kept."""

import logging
import re
import shutil
from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, TrainOutput
from transformers.training_args import OptimizerNames

from lmntk import distributed
from lmntk.arguments import ModelArguments, TrainingArguments
from lmntk.build import Run
from lmntk.errors import UsageError
from lmntk.models.base import PositionModel
from lmntk.models.checkpoints import restore_checkpoint, save_checkpoint
from lmntk.parameters import ParameterFilter, count_parameters, select_parameters
from lmntk.stopping import Stopped
from lmntk.trainers.base import FewShotTrainer

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"


class FineTuneTrainer(FewShotTrainer):
    """A stock `Trainer` with AdamW, SGD or SignGD that can keep the best model on dev.

    Its checkpoints are folders that ``--model_name_or_path`` takes.

    Args:
        run: What was built from the flags.
        model_args: The model's flags.
        args: The flags of the run.
    """

    args: TrainingArguments

    def __init__(self, run: Run, model_args: ModelArguments, args: TrainingArguments) -> None:
        assert isinstance(run.model, PositionModel)
        trained = select_parameters(
            run.model,
            ParameterFilter(
                exclude_embeddings=args.fix_layers > 0,
                exclude_first_layers=args.fix_layers,
                only_adapters=model_args.apply_lora,
            ),
        )
        for name, parameter in run.model.named_parameters():
            parameter.requires_grad_(name in trained)
        if args.optimizer == "sgd":
            args.optim = OptimizerNames.SGD
        if args.evaluate_during_training:
            _keep_the_best(args, run.task.metric_prefix + run.task.main_metrics[0])
        super().__init__(
            run,
            run.model,
            args,
            model_args.l2_loss,
            train_dataset=run.redrawn or run.datasets["train"],
            eval_dataset=run.datasets.get("dev"),
        )
        self._run = run
        self._base_name = model_args.model_name_or_path
        self._trained = count_parameters(trained)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Fine-tune, from a checkpoint where ``--resume_from_checkpoint`` names one, and keep the model."""
        checkpoint = distributed.first_does(self._find_checkpoint)
        self._announce(checkpoint)
        try:
            output = super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except Stopped as stop:
            number = len(_checkpoints(Path(self.args.output_dir)))
            stop.kept = f"{number} checkpoint{' is' if number == 1 else 's are'} kept in {self.args.output_dir}"
            stop.way_on = "the same command with --resume_from_checkpoint true goes on from the last"
            raise
        if self.args.save_strategy != SaveStrategy.NO:
            self.save_model()
            logger.info("the model is in %s", self.args.output_dir)
        return output

    def finish(self) -> None:
        """Remove the checkpoints of the training that is over, unless the user said when to save some."""
        if self.args.save_strategy != SaveStrategy.NO and not self.args.keeps_checkpoints:
            distributed.first_does(lambda: _remove(_checkpoints(Path(self.args.output_dir))))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer; before its step SignGD takes the sign of the gradient, which has been clipped by then."""
        had_one = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.args.optimizer_variant == "signgd" and not had_one:
            optimizer.register_step_pre_hook(_take_signs)
        return optimizer

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint to go on from; checkpoints of an earlier run that is being overwritten are removed."""
        folder = Path(self.args.output_dir)
        asked = self.args.resume_from_checkpoint
        if asked is None or asked.lower() == "false":
            _remove(_checkpoints(folder))
            return None
        if asked.lower() == "true":
            whole = [path for path in _checkpoints(folder) if (path / STATE_FILE).is_file()]
            if not whole:
                logger.info("%s holds no checkpoint to go on from: training starts at the beginning", folder)
            return whole[-1] if whole else None
        path = Path(asked)
        if not (path / STATE_FILE).is_file():
            raise UsageError(
                f"--resume_from_checkpoint {path}: there is no {STATE_FILE} in it, so it is no whole checkpoint; name "
                "a checkpoint-N folder of an earlier run, or give `true` for the last one in --output_dir"
            )
        return path

    def _announce(self, checkpoint: Path | None) -> None:
        args, data, model = self.args, self.train_dataset, self.model
        assert isinstance(data, Sized) and model is not None
        total = sum(parameter.numel() for parameter in model.parameters())
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * distributed.world_size()
        length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
        how = {"adam": "AdamW", "sgd": "SignGD" if args.optimizer_variant else "SGD"}[args.optimizer]
        # Weights, gradients, and the two moments that AdamW keeps of each parameter that is trained.
        memory = 4 * (total + self._trained * (3 if args.optimizer == "adam" else 1)) / 2**30
        logger.info(
            "fine-tuning on %d prompts: %s of batches of %d with %s, learning rate %g; %s of %s parameters are "
            "trained; with the optimizer they take %.2f GB, activations come on top%s",
            *(len(data), length, batch, how, args.learning_rate, f"{self._trained:,}", f"{total:,}", memory),
            "" if checkpoint is None else f"; going on from {checkpoint}",
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of the model and its tokenizer; no pickled arguments, as the stock trainer has them."""
        folder = Path(output_dir or self.args.output_dir)
        save_checkpoint(self._position_model(), folder, self._base_name)
        if self._run.tokenizer is not None:
            self._run.tokenizer.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_checkpoint(self._position_model(), Path(resume_from_checkpoint), "--resume_from_checkpoint")

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        logger.info("keeping the model of %s, the best on dev (%.4g)", best, self.state.best_metric)
        restore_checkpoint(self._position_model(), Path(best), "--evaluate_during_training")

    def _position_model(self) -> PositionModel:
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, PositionModel)
        return model


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


def _take_signs(optimizer: torch.optim.Optimizer, *args: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.sign_()


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of the stock trainer, the earliest first."""
    found = [
        (match, path) for path in folder.glob("checkpoint-*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for match, path in sorted(found, key=lambda pair: int(pair[0][1]))]
