"""What all models here are: a transformers model that is asked at one position of the sequence."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from lmntk.models import factored_layers  # noqa: F401  (teaches the factored engine)
from lmntk.models.families import causal_inputs, decoder_of, is_causal
from lmntk.models.padding import in_equal_lengths, without_padding_warnings
from lmntk.models.single_position import Position, compute_single_position

LogitsFunction = Callable[[dict[str, Tensor], dict[str, Any]], Tensor]


class PromptClassifier(nn.Module):
    """`logits(features) -> [B, C]`: the interface behind which every family of models and heads stands.

    A subclass says what is done with the encoder's states (`head_logits`) and which layer comes last (`last_layer`).

    Args:
        lm: The model of transformers.
        binary_classification: Make the logits the single difference f₁ − f₀, ``[B, 1]``.
        narrows: Whether the head looks at one position only, so that its encoder need hand on no other.

    Attributes:
        trained: The names of the parameters of `lm` that training changes: all, or with LoRA those that peft trains.
        equal_lengths: Whether the model sees its padding, so that prompts of one length only may share a batch.
        makes_masks: Whether a causal model is given masks ready to be added to its scores, and positions.
    """

    def __init__(self, lm: PreTrainedModel, binary_classification: bool = False, narrows: bool = True) -> None:
        super().__init__()
        self._position = Position()
        self._narrows = narrows
        if narrows:
            compute_single_position(lm, self._position)
            decoder_of(lm).register_forward_hook(self._keep_one_position)
        self.lm = lm
        self.trained = frozenset(f"lm.{name}" for name, parameter in lm.named_parameters() if parameter.requires_grad)
        self.binary_classification = binary_classification
        self.equal_lengths = False
        self.makes_masks = True

    @property
    def last_layer(self) -> nn.Module:
        """The linear layer that gives the logits."""
        raise NotImplementedError

    def head_logits(self, **inputs: Any) -> Tensor:
        """Return all classes' logits, ``[B, C]``, of what transformers models take."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """How many logits the last layer gives."""
        raise NotImplementedError

    @property
    def num_logits(self) -> int:
        """C, the number of logits an example has."""
        return 1 if self.binary_classification else self.num_classes

    @property
    def label_word_ids(self) -> list[int]:
        """The token of each class's label word, in logit order; none where a head of its own stands for classes."""
        return []

    @property
    def base_prefix(self) -> str:
        """What the names of the encoder's parameters begin with; all others belong to the head."""
        return f"lm.{self.lm.base_model_prefix}."

    def _keep_one_position(self, module: nn.Module, args: object, output: object) -> object:
        """Forward hook of the encoder: narrow its last hidden state ``[B, L, d]`` to ``[B, 1, d]``."""
        output["last_hidden_state"] = self._position.of(output[0])  # type: ignore[index]
        return output

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
            attention_mask: 1 for tokens, 0 for padding, ``[B, L]``; None where nothing is padded.
            token_type_ids: Segments, int64 ``[B, L]``, for architectures that have them.

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
        """Return all classes' logits, ``[B, C]``, of what `forward` takes, padded or not."""
        inputs: dict[str, Any] = {"attention_mask": attention_mask}
        if is_causal(self.lm.config):
            inputs = causal_inputs(self.lm, input_ids, attention_mask, self.makes_masks)
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        self._position.indices = mask_pos if self._narrows else None
        try:
            with without_padding_warnings():
                return self.head_logits(input_ids=input_ids, **inputs)
        finally:
            self._position.indices = None

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Compute activations anew on the way back, to save memory, as the stock trainer asks a model to."""
        self.lm.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The same, under the name that older versions of transformers 5 ask for."""
        self.lm.gradient_checkpointing_enable(**options)

    def last_layer_inputs(self, batch: dict[str, Tensor]) -> Tensor:
        """Return what goes into the last layer, ``[B, d]``: the features that a linear head is fitted to."""
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
            biases: ``[classes]``; of no effect where the layer has none.
        """
        layer: Any = self.last_layer
        rows = self._class_rows()
        with torch.no_grad():
            layer.weight[rows] = weights.to(layer.weight)
            if layer.bias is not None:
                layer.bias[rows] = biases.to(layer.bias)

    def _class_rows(self) -> slice | Tensor:
        """The rows of the last layer that are the classes'."""
        return slice(None)

    def _rows_that_matter(self) -> tuple[set[int], Tensor | None, dict[str, Tensor]]:
        """Ids of parameters of which some rows only are ever used, these rows, and the buffers that then change."""
        return set(), None, {}

    def as_function(self, names: Iterable[str], tokens: Iterable[int]) -> tuple[LogitsFunction, dict[str, Tensor]]:
        """Give the model as a function of some of its parameters, for `torch.func`.

        Parameters over the vocabulary come with the rows that can matter only: the decoder's of the label words, and
        the word embeddings' of `tokens`. All other rows' gradients are zero, on one side of the kernel at least, so
        they add nothing to it; Jacobians over a whole vocabulary would be little but zeros.

        Args:
            names: The parameters to differentiate, by their names in this module.
            tokens: The tokens that occur on one side of the kernel.

        Returns:
            `f(params, batch) -> [B, C]` and the `params` at which the model stands.
        """
        embedding = self.lm.get_input_embeddings()
        rows = _EmbeddingRows(embedding, tokens) if type(embedding) is nn.Embedding else None
        of_decoder, label_rows, fixed = self._rows_that_matter()
        wanted = set(names)
        params: dict[str, Tensor] = {}
        words_name = None
        for name, parameter in self.named_parameters():
            tensor = parameter.detach()
            if id(parameter) in of_decoder:
                # Fixed too where it is not asked for after all: the buffers are those of these rows.
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


class _EmbeddingRows:
    """Some rows of the word embeddings as a parameter of their own, the others staying what they are.

    Args:
        embedding: The word embeddings.
        tokens: Which rows. The padding token's never has a gradient, as torch has it.
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
        """Look the tokens' embeddings up in `rows`, ``[tokens, d]``, while this holds."""

        def look_up(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            ids = arguments[0]
            return torch.where(self._is_row[ids][..., None], F.embedding(self._row_of[ids], rows), output)

        handle = self.embedding.register_forward_hook(look_up)
        try:
            yield
        finally:
            handle.remove()
