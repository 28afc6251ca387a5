"""The base class of all models: a transformers model, asked at one position of the sequence."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from lmntk.kernels.contraction import summation_dtype
from lmntk.kernels.problem import PartialRows
from lmntk.models.factored_layers import register_layers
from lmntk.models.families import causal_inputs, is_causal
from lmntk.models.padding import in_equal_lengths, without_padding_warnings
from lmntk.models.single_position import SinglePosition

LogitsFunction = Callable[[dict[str, Tensor], dict[str, Any]], Tensor]


class PromptClassifier(nn.Module, ABC):
    """A model of transformers as a function from features to logits ``[B, C]``, at one position of each prompt.

    A subclass names the layer that gives the logits, and computes them from what the encoder returns.

    Args:
        lm: The model of transformers; it becomes a part of this one.
        binary_classification: Make the logits the single difference f₁ − f₀, ``[B, 1]``.
        single_position: Whether the head reads one position only, so that the encoder need not return the others.

    Attributes:
        trained: The names of the parameters of `lm` that training changes: all, or with LoRA those that peft trains.
        equal_lengths: Whether padding changes the logits, so that only prompts of one length may share a batch.
        makes_masks: Whether a causal model is given positions, and masks that are ready to be added to its scores.
        single_position: What narrows the encoder to the position that predicts; None where all are needed.
    """

    def __init__(self, lm: PreTrainedModel, binary_classification: bool = False, single_position: bool = True) -> None:
        super().__init__()
        register_layers()
        self.lm = lm
        self.trained = frozenset(f"lm.{name}" for name, parameter in lm.named_parameters() if parameter.requires_grad)
        self.binary_classification = binary_classification
        self.equal_lengths = False
        self.makes_masks = True
        self.single_position = SinglePosition(lm) if single_position else None

    @property
    @abstractmethod
    def last_layer(self) -> nn.Module:
        """The linear layer that gives the logits."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """The number of logits that the last layer gives."""

    @abstractmethod
    def head_logits(self, **inputs: Any) -> Tensor:
        """Return all classes' logits, ``[B, C]``, given the inputs of transformers' models."""

    @property
    def num_logits(self) -> int:
        """C, the number of logits of an example."""
        return 1 if self.binary_classification else self.num_classes

    @property
    def label_word_ids(self) -> list[int]:
        """The token of each class's label word, in logit order; empty for a model with a classification head."""
        return []

    @property
    def base_prefix(self) -> str:
        """The beginning of the names of the encoder's parameters; all others belong to the head."""
        return f"lm.{self.lm.base_model_prefix}."

    def forward(
        self,
        input_ids: Tensor,
        mask_pos: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the logits.

        Args:
            input_ids: Tokens, int64 ``[B, L]``; padding may stand on either side.
            mask_pos: The position that predicts, int64 ``[B]``: the mask, or the last token for a causal model.
            attention_mask: 1 for tokens, 0 for padding, ``[B, L]``; None for a batch without padding.
            token_type_ids: Segments, int64 ``[B, L]``; None for an architecture without segments.

        Returns:
            Logits ``[B, C]``, or ``[B, 1]`` under `binary_classification`.
        """
        if self.equal_lengths and attention_mask is not None:
            return in_equal_lengths(self, input_ids, mask_pos, attention_mask, token_type_ids)
        logits = self.all_logits(input_ids, mask_pos, attention_mask, token_type_ids)
        return logits[:, 1:] - logits[:, :1] if self.binary_classification else logits

    def all_logits(
        self,
        input_ids: Tensor,
        mask_pos: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of all classes, ``[B, C]``; the arguments are those of `forward`."""
        inputs: dict[str, Any] = {"attention_mask": attention_mask}
        if is_causal(self.lm.config):
            inputs = causal_inputs(self.lm, input_ids, attention_mask, self.makes_masks)
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        narrowed = contextlib.nullcontext() if self.single_position is None else self.single_position.at(mask_pos)
        with narrowed, without_padding_warnings():
            return self.head_logits(input_ids=input_ids, **inputs)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Compute activations again in the backward pass, to save memory; transformers' `Trainer` calls this."""
        self.lm.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The same, under the name in older versions of transformers 5."""
        self.lm.gradient_checkpointing_enable(**options)

    def last_layer_inputs(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the inputs of the last layer, ``[B, d]``, to which a linear head is fitted.

        Args:
            batch: The arguments of `forward`, by name.
        """
        if self.equal_lengths and "attention_mask" in batch:
            return in_equal_lengths(lambda **part: self.last_layer_inputs(part), **batch)
        found: list[Tensor] = []
        handle = self.last_layer.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].detach()))
        try:
            with torch.no_grad():
                self(**batch)
        finally:
            handle.remove()
        return found[0].reshape(len(found[0]), -1)

    def set_last_layer(self, weights: Tensor, biases: Tensor) -> None:
        """Replace the rows of the classes in the last layer.

        Args:
            weights: ``[classes, d]``.
            biases: ``[classes]``; ignored by a layer without a bias.
        """
        layer: Any = self.last_layer
        rows = self._class_rows()
        with torch.no_grad():
            layer.weight[rows] = weights.to(layer.weight)
            if layer.bias is not None:
                layer.bias[rows] = biases.to(layer.bias)

    def convert(self, dtype: torch.dtype) -> None:
        """Convert all weights to a dtype, except that the logits of a bfloat16 model are float32.

        Their differences decide, and bfloat16 has two to three digits. So the last layer multiplies float32 numbers.

        Args:
            dtype: The dtype.
        """
        self.to(dtype)
        layer, wide = self.last_layer, summation_dtype(dtype)
        if wide != dtype:
            layer.to(wide)
            layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(wide), *inputs[1:]))

    def _class_rows(self) -> slice | Tensor:
        """The rows of the last layer that give the classes' logits."""
        return slice(None)

    def _sparse_parameters(self) -> tuple[set[int], Tensor | None, dict[str, Tensor]]:
        """Return the ids of the parameters of which some rows only are used, these rows, and the buffers to change."""
        return set(), None, {}

    def as_function(self, names: Iterable[str], tokens: Iterable[int]) -> tuple[LogitsFunction, dict[str, Tensor]]:
        """Return the model as a function of some of its parameters, for `torch.func`.

        Two parameters have a row for each token of the vocabulary. Of the decoder, the function takes the rows of the
        label words; of the word embeddings, those of `tokens`. On one side of the kernel at least, the gradients of all
        other rows are zero, so they add nothing to the kernel, and Jacobians over the whole vocabulary would be large.

        Args:
            names: The parameters to differentiate, by their names in this module.
            tokens: The tokens that occur on one side of the kernel.

        Returns:
            `f(params, batch) -> [B, C]`, and the present values of `params`.
        """
        embedding = self.lm.get_input_embeddings()
        rows = _EmbeddingRows(embedding, tokens) if type(embedding) is nn.Embedding else None
        of_decoder, label_rows, fixed = self._sparse_parameters()
        wanted = set(names)
        params: dict[str, Tensor] = {}
        words_name = None
        for name, parameter in self.named_parameters():
            tensor = parameter.detach()
            if id(parameter) in of_decoder:
                # Fixed where it is not in `names`, since the buffers are changed for these rows.
                fixed[name] = tensor[label_rows]
                if name in wanted:
                    params[name] = fixed[name]
            elif name in wanted and rows is not None and parameter is embedding.weight:
                params[name], words_name = tensor[rows.tokens], name
            elif name in wanted:
                params[name] = tensor

        def logits_fn(params: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
            tensors = {**fixed, **params}
            if rows is None or words_name not in tensors:
                return functional_call(self, tensors, kwargs=batch)
            with rows.taken_from(tensors.pop(words_name)):
                return functional_call(self, tensors, kwargs=batch)

        return logits_fn, params

    def partial_rows(self, names: Iterable[str]) -> PartialRows:
        """Return which parameters `as_function` takes some rows of, and the function of all rows that a batch needs.

        Args:
            names: The parameters to differentiate, by their names in this module.
        """
        embedding, chosen = self.lm.get_input_embeddings(), list(names)
        weight = embedding.weight if type(embedding) is nn.Embedding else None
        partial = frozenset(name for name, own in self.named_parameters() if own is weight and name in chosen)
        return PartialRows(partial, lambda batch: self.as_function(chosen, batch["input_ids"].flatten().tolist()))


class _EmbeddingRows:
    """Some rows of the word embeddings as a separate parameter.

    Args:
        embedding: The word embeddings.
        tokens: The rows; the padding token's is left out, since torch gives it no gradient.
    """

    def __init__(self, embedding: nn.Module, tokens: Iterable[int]) -> None:
        assert isinstance(embedding, nn.Embedding)
        device = embedding.weight.device
        self.embedding = embedding
        self.tokens = torch.tensor(sorted(set(tokens) - {embedding.padding_idx}), dtype=torch.long, device=device)
        self._row_of = torch.zeros(embedding.num_embeddings, dtype=torch.long, device=device)
        self._row_of[self.tokens] = torch.arange(len(self.tokens), device=device)
        self._is_row = torch.zeros(embedding.num_embeddings, dtype=torch.bool, device=device)
        self._is_row[self.tokens] = True

    @contextlib.contextmanager
    def taken_from(self, rows: Tensor) -> Iterator[None]:
        """Look the tokens' embeddings up in `rows`, ``[tokens, d]``, while this is entered."""

        def look_up(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            ids = arguments[0]
            return torch.where(self._is_row[ids][..., None], F.embedding(self._row_of[ids], rows), output)

        handle = self.embedding.register_forward_hook(look_up)
        try:
            yield
        finally:
            handle.remove()
