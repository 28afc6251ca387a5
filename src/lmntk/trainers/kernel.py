"""The kernel trainer: "training" computes the kernel of the train examples, "evaluation" solves with it."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.trainer_utils import TrainOutput

from lmntk import descriptions, distributed, solvers
from lmntk.arguments import ModelArguments, TrainingArguments
from lmntk.build import Run
from lmntk.errors import UsageError
from lmntk.features import Collator, FeatureDataset
from lmntk.kernel_files import Kernel, KernelFiles, samples_of
from lmntk.kernels import FORMULAS, Engine, KernelProblem, MemoryBudgetError, Plan, assemble, make_engine
from lmntk.kernels.engines.base import Block
from lmntk.kernels.machine import DEFAULT_FRACTION, free_bytes, peak_bytes
from lmntk.parameters import count_parameters, select_parameters
from lmntk.solver_problem import SolverSettings, class_ids
from lmntk.trainers.prompt import PromptTrainer, score

logger = logging.getLogger(__name__)


class FeatureExamples:
    """The prompts of a split as the kernel engines take them: batches of prompts of one length."""

    def __init__(self, dataset: FeatureDataset, collator: Collator, device: torch.device) -> None:
        self.padded = True
        self.shapes = [len(feature.input_ids) for feature in dataset.features]
        self._features = dataset.features
        self._collator = collator
        self._device = device

    def __len__(self) -> int:
        return len(self._features)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the prompts at `indices` as the model takes them, without their labels."""
        batch = self._collator([self._features[index] for index in indices])
        return {name: tensor.to(self._device) for name, tensor in batch.items() if name != "labels"}


class KernelTrainer(PromptTrainer):
    """A `Trainer` that predicts with the empirical neural tangent kernel in place of training.

    Kernels, and the logits of the untrained model, are written to the output folder as soon as they are there. A
    kernel found there is used again only if its description fits the present command. With ``--load_kernels`` they
    come from that folder instead, and the model may be missing.

    Args:
        run: What was built from the flags.
        model_args: The model's flags, for the description.
        args: The flags of the run.
    """

    args: TrainingArguments

    def __init__(self, run: Run, model_args: ModelArguments, args: TrainingArguments) -> None:
        super().__init__(model=run.model or nn.Module(), args=args, data_collator=run.collator)
        self._run = run
        self._model_args = model_args
        self._files = KernelFiles(
            output_dir=Path(args.output_dir),
            load_dir=None if args.load_kernels is None else Path(args.load_kernels),
            task_key=run.task.key,
            overwrite=args.overwrite_kernels,
        )
        self._formula = FORMULAS[args.kernel_formula]
        self._num_logits = 1 if args.binary_classification else len(run.task.labels)
        self._grad_dim: int | None = None
        self._train_kernel: Kernel | None = None
        self._logits: dict[str, tuple[Tensor, Tensor]] = {}
        if run.model is not None:
            run.model.requires_grad_(False)
            selected = select_parameters(run.model, descriptions.parameter_filter(args))
            tokens = {token for feature in run.datasets["train"].features for token in feature.input_ids}
            self._logits_fn, self._params = run.model.as_function(selected, tokens)
            self._grad_dim = count_parameters(selected)
            self._weights = descriptions.hash_of_weights(run.model)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Compute, or find, the kernel of the train examples with themselves."""
        self._train_kernel = self.kernel("train")
        return TrainOutput(0, 0.0, {})

    def evaluate(  # type: ignore[override]
        self, eval_dataset: FeatureDataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Solve with the train kernel and predict a split through its kernel with the train examples.

        Returns:
            The task's metrics, the solver's loss and own metrics, and `grad_dim` where the model is there to count.
        """
        if self._train_kernel is None:
            self.train()
        assert self._train_kernel is not None
        split = eval_dataset.mode
        train_kernel, train_labels = self._train_kernel
        x_kernel, x_labels = self.kernel(split)
        train_f0, x_f0 = (
            self.untrained_logits(name)[0].numpy() if self.args.adjust_for_init else None for name in ("train", split)
        )
        prediction = solvers.predict(
            self.args.kernel_solver,
            train_kernel.numpy(),
            train_labels.numpy(),
            x_kernel.numpy(),
            x_labels.numpy(),
            SolverSettings(
                regularization=self.args.kernel_regularization,
                gamma=self.args.kernel_gamma,
                lambda_=self.args.kernel_lambda,
                f0_scaling=self.args.f0_scaling,
            ),
            train_f0=train_f0,
            x_f0=x_f0,
            x_split=split,
        )
        samples = samples_of(x_labels, len(self._run.prompts.templates), f"the kernel of {split}")
        labels = class_ids(x_labels.numpy(), self._num_logits)[: len(x_labels) // samples]
        scores = score(self._run.task, prediction.logits, labels)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        metrics |= {f"{metric_key_prefix}_loss": prediction.loss, **prediction.metrics}
        if self._grad_dim is not None:
            metrics["grad_dim"] = self._grad_dim
        self.log(dict(metrics))
        return metrics

    def kernel(self, split: str) -> Kernel:
        """Return the kernel between the train examples and a split: from a file if there is one, else computed.

        Raises:
            UsageError: A file is there, but made by a command that differs; or it cannot be read.
        """
        path = self._files.to_use(split, self._definition(split))
        if path is not None:
            logger.info("taking the train × %s kernel from %s", split, path)
            if self.args.load_kernels is None:
                self.untrained_logits(split)
            return self._files.load(path, self._formula.two_directions, self._num_logits)
        kernel, record = self._compute(split)
        _, labels = self.untrained_logits(split)
        if distributed.is_first():
            path = self._files.save(split, (kernel, labels), self._definition(split) | record)
            logger.info("wrote the train × %s kernel to %s", split, path)
        return kernel, labels

    def untrained_logits(self, split: str) -> tuple[Tensor, Tensor]:
        """Return the logits of the untrained model on a split, ``[X, C]``, and the split's labels.

        The model is asked, and the file written, once; without a model they come from ``--load_kernels``.
        """
        if self._run.model is None:
            return self._files.load_logits(split)
        if split not in self._logits:
            labels = torch.tensor(self._run.datasets[split].labels)
            labels = (labels * 2 - 1).float() if self._num_logits == 1 else labels
            self._logits[split] = self.logits(self._run.datasets[split]), labels
            if distributed.is_first():
                self._files.save_logits(split, *self._logits[split])
        return self._logits[split]

    def dry_run(self) -> None:
        """Say what the kernels of this command take, without computing them."""
        for split in self._run.datasets:
            path = self._files.to_use(split, self._definition(split))
            if path is None:
                self._announce(*self._engine_and_plan(split), split, "would compute")
            else:
                kernel, _ = self._files.load(path, self._formula.two_directions, self._num_logits)
                shape = " × ".join(map(str, kernel.shape))
                logger.info("would take the train × %s kernel (%s) from %s", split, shape, path)

    def _engine_and_plan(self, split: str) -> tuple[Engine, Plan]:
        model = self._run.model
        assert model is not None

        def examples(name: str) -> FeatureExamples:
            return FeatureExamples(self._run.datasets[name], self._run.collator, self.args.device)

        problem = KernelProblem(
            logits_fn=self._logits_fn,
            params=self._params,
            train=examples("train"),
            x=None if split == "train" else examples(split),
            formula=self._formula,
            num_logits=self._num_logits,
            module=model,
            call=lambda batch: model(**batch),
        )
        engine = make_engine(problem, self.args.kernel_engine, self._memory_gb())
        try:
            plan = engine.plan(self.args.train_tile, self.args.x_tile, distributed.world_size())
        except MemoryBudgetError as error:
            raise UsageError(
                f"--kernel_memory_gb: the tiles take {error.needed / 2**30:.2f} GB beside the model, but only "
                f"{error.given / 2**30:.2f} GB are allowed; give at least {error.needed / 2**30 + 0.005:.2f}, smaller "
                "--per_device_train_batch_size and --per_device_eval_batch_size, or take --kernel_engine jvp"
            ) from error
        # Memory that is free differs from process to process; tiles of different plans would not make one kernel.
        return engine, distributed.first_decides(plan)

    def _memory_gb(self) -> float:
        if self.args.kernel_memory_gb is not None:
            return self.args.kernel_memory_gb
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if self.args.device.type == "cpu" else 1
        return DEFAULT_FRACTION * free_bytes(self.args.device) / 2**30 / neighbours

    def _compute(self, split: str) -> tuple[Tensor, dict[str, Any]]:
        engine, plan = self._engine_and_plan(split)
        self._announce(engine, plan, split, "computing")
        start = time.perf_counter()
        own = plan.share(distributed.rank(), distributed.world_size())
        share = assemble(self._with_progress(engine, own, split), own, engine.problem)
        kernel = distributed.sum_over_processes(share, self.args.device)
        record = {
            "engine": engine.name,
            "train_tile": plan.train_tile,
            "x_tile": plan.x_tile,
            "processes": distributed.world_size(),
            "seconds": round(time.perf_counter() - start, 3),
            "peak_memory_gb": round(peak_bytes(self.args.device) / 2**30, 3),
            **descriptions.circumstances(self._run, self._model_args, split),
        }
        return (kernel if engine.problem.formula.two_directions else kernel[0]), record

    def _with_progress(self, engine: Engine, plan: Plan, split: str) -> Iterator[Block]:
        total = plan.pairs * engine.passes(plan)
        shown = distributed.is_first() and not self.args.disable_tqdm
        with tqdm(total=total, desc=f"train × {split}", unit="pair", disable=not shown, mininterval=0.5) as bar:
            for tile, values in engine.blocks(plan):
                bar.update(tile.pairs)
                yield tile, values

    def _announce(self, engine: Engine, plan: Plan, split: str, verb: str) -> None:
        if not distributed.is_first():
            return
        problem = engine.problem
        tokens = [sum(examples.shapes) for examples in (problem.train, problem.x_examples)]
        size = len(problem.formula.directions) * plan.train_size * plan.x_size * problem.num_logits**2 * 8
        logger.info(
            "%s the train × %s kernel (%s): %d × %d examples of %d × %d tokens in all, %d %s, %s parameters; %s, tiles "
            "of %d × %d; about %.1f GB beside the model, %s, and a file of %.1f MB",
            *(verb, split, problem.formula.name, plan.train_size, plan.x_size, *tokens),
            *(problem.num_logits, "logit" if problem.num_logits == 1 else "logits", f"{self._grad_dim:,}"),
            *(engine.summary(plan), plan.train_tile, plan.x_tile, engine.expected_bytes(plan) / 2**30),
            _duration(engine.expected_seconds(plan) / distributed.world_size()),
            size / 2**20,
        )

    def _definition(self, split: str) -> dict[str, Any]:
        definition = descriptions.of_flags(self._run, self._model_args, self.args)
        if self._run.model is not None:
            definition |= descriptions.of_model_and_data(self._run, self._weights, self._grad_dim or 0, split)
        return definition


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(seconds, 1):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
