"""Training of the linearised model: what fine-tuning would do if no feature moved."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.trainer_utils import SaveStrategy

from lmntk.config.arguments import ModelArguments, TrainingArguments
from lmntk.experiment.experiment import Experiment
from lmntk.kernels.linearised import Linearisation
from lmntk.models.classifier import PromptClassifier
from lmntk.trainers.finetune import FineTuneTrainer


class LinearisedModel(nn.Module):
    """A model as its tangent at the weights θ₀ that it has now; its own parameters are θ, which training changes.

    The model stays in evaluation mode: the tangent of a model that draws dropout is not defined.

    Args:
        model: The model.
        names: The parameters that are trained.

    Attributes:
        model: The model at θ.
        start: θ₀ of the parameters that are trained.
    """

    def __init__(self, model: PromptClassifier, names: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        here = dict(model.named_parameters())
        self.start = {name: here[name].detach().clone() for name in names}
        self._tangent = self._at_start()

    def forward(self, **batch: Tensor) -> Tensor:
        """Return f(x; θ₀) + ⟨∂f(x; θ₀)/∂θ, θ − θ₀⟩, ``[B, C]``; the arguments are those of the model."""
        here = dict(self.model.named_parameters())
        return self._tangent({name: here[name] for name in self.start}, batch)

    def train(self, mode: bool = True) -> "LinearisedModel":
        """Set the mode of this module; the model itself stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def _at_start(self) -> Linearisation:
        def logits_fn(params: Mapping[str, Tensor], batch: Any) -> Tensor:
            found: Tensor = functional_call(self.model, dict(params), kwargs=batch)
            return found

        return Linearisation(logits_fn, self.start)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LinearisedModel":
        """Move θ₀ with the parameters to another device or dtype."""
        super()._apply(fn, recurse)
        with torch.no_grad():
            self.start = {name: fn(tensor) for name, tensor in self.start.items()}
        self._tangent = self._at_start()
        return self


class LinearisedTrainer(FineTuneTrainer):
    """A stock `Trainer` that trains a model linearised at its pre-trained weights, with fine-tuning's optimizers.

    Its kernel never changes, so that for the squared error plain gradient descent ends at the kernel's solution with
    f₀. No model is saved: the weights alone, in the model as it is, would predict something else.

    Args:
        experiment: What was built from the arguments.
        model_args: The arguments of the model.
        args: The arguments of the run.
    """

    what = "training the linearised model, without dropout,"
    is_linear = True

    def __init__(self, experiment: Experiment, model_args: ModelArguments, args: TrainingArguments) -> None:
        super().__init__(experiment, model_args, args.with_changes(save_strategy=SaveStrategy.NO))

    def _trained_model(self, model: PromptClassifier, names: Iterable[str]) -> nn.Module:
        return LinearisedModel(model, names)

    def _position_model(self) -> PromptClassifier:
        return self._wrapper().model

    def _start(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._wrapper().start

    def _wrapper(self) -> LinearisedModel:
        found = self.accelerator.unwrap_model(self.model)
        assert isinstance(found, LinearisedModel)
        return found
