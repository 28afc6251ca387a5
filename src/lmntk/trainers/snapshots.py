"""Snapshots of a model between two weights: its logits, those of its linearisation at the start, and its kernel.

θ₀ are the weights at the start, θ those of the step. The prompts are the fixed ones of each split: also of train, whose
demonstrations training draws anew in every epoch.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from lmntk import distributed
from lmntk.config.arguments import ModelArguments, TrainingArguments
from lmntk.data.metrics import mean_over_samples
from lmntk.errors import SettingError
from lmntk.experiment.experiment import Experiment
from lmntk.experiment.provenance import hash_of_weights, hashes_of_data
from lmntk.experiment.untrained_logits import of_batches, untrained_logits
from lmntk.kernels import FORMULAS, KernelProblem, MemoryBudget, MemoryBudgetError, ModuleModel, assemble, make_engine
from lmntk.kernels.functional import with_values
from lmntk.kernels.linearised import Linearisation
from lmntk.kernels.problem import Parameters
from lmntk.kernels.tiling import CostModel, TileRequest
from lmntk.prompts.features import FeatureDataset, FeatureExamples
from lmntk.storage.paths import RunPaths
from lmntk.storage.training_snapshots import SplitSnapshot, TrainingSnapshot, write_snapshot
from lmntk.storage.wording import duration
from lmntk.trainers.base import class_loss

logger = logging.getLogger(__name__)


class SnapshotWriter:
    """Computes and writes the snapshots of one experiment.

    Args:
        experiment: What was built from the arguments; its model is at θ₀.
        model_args: The arguments of the model.
        args: The arguments of the run.
        counted: The names of the parameters over which the kernel is taken.
        start: θ₀ of all parameters that can move.
        facts: What further defines the numbers.
        linear: Whether the model that is trained is the linearised one, whose kernel is always that at θ₀.

    Attributes:
        paths: The files of the run.
        start: θ₀.
        start_hash: The SHA-256 of all weights at θ₀.
        facts: What the description of every snapshot holds.
    """

    def __init__(
        self,
        experiment: Experiment,
        model_args: ModelArguments,
        args: TrainingArguments,
        counted: frozenset[str],
        start: Parameters,
        facts: Mapping[str, Any],
        linear: bool = False,
    ) -> None:
        self.paths = RunPaths(args.output_dir, experiment.task.key)
        self.start = start
        self.start_hash = hash_of_weights(experiment.model)
        self._experiment = experiment
        self._model = experiment.model
        self._args = args
        self._l2_loss = model_args.l2_loss
        self._counted = counted
        self._linear = linear
        self._kernel_at_start: Tensor | None = None
        sizes = {name: parameter.numel() for name, parameter in self._model.named_parameters()}
        self.facts = {
            **_settings(experiment, model_args, args),
            **hashes_of_data(experiment),
            "grad_dim": sum(sizes[name] for name in counted),
            "weights_sha256": self.start_hash,
            **facts,
        }

        def logits_fn(params: Parameters, batch: Any) -> Tensor:
            found: Tensor = functional_call(self._model, params, kwargs=batch)
            return found

        self._tangent = Linearisation(logits_fn, start)

    def write(self, step: int, numbers: Mapping[str, Any], kernel: Tensor | None = None) -> None:
        """Write the snapshot of the model as it is now, at θ; all processes call this.

        Args:
            step: The number of optimizer steps taken.
            numbers: Further facts of this step.
            kernel: The kernel of train × train at θ, where it is known already.
        """
        began = time.perf_counter()
        with self._undisturbed():
            splits = self._splits(step)
            if kernel is None:
                kernel = self._linear_kernel() if self._linear else self._kernel(step)
        train, labels = splits["train"][1], torch.tensor(self._experiment.datasets["train"].labels)
        loss = class_loss(train, labels, self._l2_loss).item()
        description = {"step": step, **self.facts, "train_loss": loss, **numbers}
        snapshots = {split: found for split, (found, _) in splits.items()}
        path = distributed.on_rank_zero(self._save, TrainingSnapshot(step, snapshots, kernel.numpy(), description))
        seconds = duration(max(time.perf_counter() - began, 0.1))
        logger.info("snapshot of step %d, loss of train %.4g: %s (%s)", step, loss, path, seconds)

    def write_start(self, numbers: Mapping[str, Any]) -> None:
        """Write the snapshot of step 0, whatever the model's weights are now."""
        with with_values(self._model, self.start):
            self.write(0, numbers)

    def _save(self, snapshot: TrainingSnapshot) -> Path:
        return write_snapshot(self.paths, snapshot)

    def _splits(self, step: int) -> dict[str, tuple[SplitSnapshot, Tensor]]:
        """Return the snapshot of each split, and the logits of its prompts, float64 ``[X, C]``."""
        here = dict(self._model.named_parameters())
        tangent = self._tangent.towards({name: here[name] for name in self.start}) if step else None
        found = {}
        for split, data in self._experiment.datasets.items():
            examples, number = self._examples(data), data.num_examples
            linearised = None if tangent is None else of_batches(tangent, examples)
            logits = linearised if self._linear else None
            logits = untrained_logits(self._model, examples).double() if logits is None else logits
            linearised = logits if linearised is None else linearised
            averaged = [mean_over_samples(each.numpy(), number) for each in (logits, linearised)]
            labels = torch.tensor(data.labels[:number]).numpy()
            found[split] = SplitSnapshot(labels, *averaged), logits
        return found

    def _linear_kernel(self) -> Tensor:
        """Return the kernel of the linearised model, computed once."""
        if self._kernel_at_start is None:
            with with_values(self._model, self.start):
                self._kernel_at_start = self._kernel(0)
        return self._kernel_at_start

    def _kernel(self, step: int) -> Tensor:
        """Return the kernel of the train prompts with themselves, float64 ``[N, C, N, C]`` or ``[2, N, C, N, C]``."""
        train = self._experiment.datasets["train"]
        tokens = {token for feature in train.features for token in feature.input_ids}
        logits_fn, params = self._model.as_function(self._counted, tokens)
        problem = KernelProblem(
            model=ModuleModel(logits_fn, self._model),
            params=params,
            train=self._examples(train),
            x=None,
            formula=FORMULAS[self._args.kernel_formula],
            num_logits=self._model.num_logits,
        )
        given = self._args.kernel_memory_gb
        engine = make_engine(problem, "auto", None if given is None else MemoryBudget.from_gb(given))
        try:
            plan = distributed.on_rank_zero(engine.plan, TileRequest(), distributed.world_size())
        except MemoryBudgetError as error:
            needed = error.needed / 2**30
            raise SettingError(
                f"`kernel_memory_gb`: the tiles of a snapshot's kernel take {needed:.2f} GB beside the model, but only "
                f"{error.given / 2**30:.2f} GB are allowed; give at least {needed + 0.005:.2f}",
                setting="kernel_memory_gb",
                value=given,
            ) from error
        shares = plan.partition(CostModel(lambda train: 0.0, lambda tile: tile.pairs), distributed.world_size())
        own = shares[distributed.rank()]
        show = distributed.is_first() and not self._args.disable_tqdm
        if distributed.is_first():
            size = len(train)
            logger.info("computing the kernel of train × train at step %d: %d × %d prompts", step, size, size)
        with tqdm(total=own.pairs, desc=f"kernel of step {step}", unit="pair", disable=not show, leave=False) as bar:

            def counted() -> Iterator[Any]:
                for tile, values in engine.blocks(own):
                    yield tile, values
                    bar.update(tile.pairs)

            found = assemble(counted(), own, problem)
        whole = torch.stack(distributed.gather(found)).sum(dim=0) if distributed.world_size() > 1 else found
        return whole if problem.formula.is_asymmetric else whole[0]

    def _examples(self, data: FeatureDataset) -> FeatureExamples:
        return FeatureExamples(data, self._experiment.collator, self._args.device, self._model.equal_lengths)

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Compute in evaluation mode and without gradients; afterwards mode, gradients and random numbers go on."""
        model, device = self._model, self._args.device
        trains, wanted = model.training, [p for p in model.parameters() if p.requires_grad]
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            model.eval().requires_grad_(False)
            try:
                yield
            finally:
                model.train(trains)
                for parameter in wanted:
                    parameter.requires_grad_(True)


def _settings(experiment: Experiment, model_args: ModelArguments, args: TrainingArguments) -> dict[str, Any]:
    """Return the settings that define a snapshot."""
    templates = experiment.prompts.templates
    return {
        "trainer": args.trainer,
        "task_name": experiment.task.key,
        "few_shot_type": model_args.few_shot_type,
        "seed": args.seed,
        "model_name_or_path": model_args.model_name_or_path,
        "template": templates[0] if len(templates) == 1 else list(templates),
        "mapping": dict(experiment.prompts.mapping),
        "binary_classification": args.binary_classification,
        "apply_lora": model_args.apply_lora,
        "lora_r": None if experiment.lora is None else experiment.lora.rank,
        "optimizer": args.optimizer,
        "optimizer_variant": args.optimizer_variant,
        "learning_rate": args.learning_rate,
        "kernel_formula": args.kernel_formula,
        "kernel_dtype": args.kernel_dtype,
    }
