"""A language model that answers a prompt: the logits of its label words at one position of the sequence."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lmntk.kernels.layers import LinearLayer, register
from lmntk.models.last_layer import Position, narrow_last_layer

LogitsFunction = Callable[[dict[str, Tensor], dict[str, Any]], Tensor]


class LabelWordDecoder(nn.Module):
    """The decoder of a language model of which only the label words' rows are ever multiplied.

    Args:
        weight: The decoder's rows, one per token of the vocabulary, ``[V, d]``.
        bias: One number per token of the vocabulary, ``[V]``, where the decoder has them.
        label_word_ids: The token of each class's label word, in logit order.
    """

    label_word_ids: Tensor

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, label_word_ids: Sequence[int]) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.register_buffer("label_word_ids", torch.tensor(label_word_ids), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the label words' logits, ``[..., C]``, of hidden states ``[..., d]``."""
        bias = None if self.bias is None else self.bias[self.label_word_ids]
        return F.linear(hidden, self.weight[self.label_word_ids], bias)


# Its gradient is that of a linear layer of some rows; Conv1D is one with its weight transposed.
register(LabelWordDecoder, LinearLayer)
register(Conv1D, LinearLayer)


class PromptModel(nn.Module):
    """`logits(features) -> [B, C]`: the interface behind which every family of language models stands.

    The language model's own head is used as it is, with two changes that hold for whatever architecture:
    the encoder hands it the hidden state of one position only, and its decoder multiplies the label words' rows only.

    Args:
        lm: A language model whose decoder is untied from its word embeddings (see `models.loading`).
        label_word_ids: The token of each class's label word, in logit order.
        binary_classification: Make the logits the single difference f₁ − f₀, ``[B, 1]``.
    """

    def __init__(self, lm: PreTrainedModel, label_word_ids: Sequence[int], binary_classification: bool = False) -> None:
        super().__init__()
        decoder = lm.get_output_embeddings()
        label_words = LabelWordDecoder(decoder.weight, decoder.bias, label_word_ids)
        lm.set_output_embeddings(label_words)
        _drop_second_name(lm, label_words)
        self._position = Position()
        narrow_last_layer(lm, self._position)
        lm.base_model.register_forward_hook(self._keep_one_position)
        self.lm = lm
        self.binary_classification = binary_classification

    @property
    def num_logits(self) -> int:
        """C, the number of logits an example has."""
        return 1 if self.binary_classification else len(self._decoder.label_word_ids)

    @property
    def _decoder(self) -> LabelWordDecoder:
        return cast(LabelWordDecoder, self.lm.get_output_embeddings())

    @property
    def label_word_ids(self) -> list[int]:
        """The token of each class's label word, in logit order."""
        return self._decoder.label_word_ids.tolist()

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
        """Return the label words' logits.

        Args:
            input_ids: Tokens, int64 ``[B, L]``.
            mask_pos: The position that predicts, int64 ``[B]``.
            attention_mask: 1 for tokens, 0 for padding, ``[B, L]``; None where nothing is padded.
            token_type_ids: Segments, int64 ``[B, L]``, for architectures that have them.

        Returns:
            Logits ``[B, C]``, or ``[B, 1]`` under `binary_classification`.
        """
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        self._position.indices = mask_pos
        try:
            logits = self.lm(input_ids=input_ids, attention_mask=attention_mask, **segments).logits[:, 0]
        finally:
            self._position.indices = None
        return logits[:, 1:] - logits[:, :1] if self.binary_classification else logits

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
        decoder, embedding = self._decoder, self.lm.get_input_embeddings()
        in_decoder = {id(parameter) for parameter in decoder.parameters()}
        decoder_name = next(name for name, module in self.named_modules() if module is decoder)
        rows = _EmbeddingRows(embedding, tokens) if type(embedding) is nn.Embedding else None
        wanted = set(names)
        params: dict[str, Tensor] = {}
        label_words = decoder.label_word_ids
        fixed = {f"{decoder_name}.label_word_ids": torch.arange(len(label_words), device=label_words.device)}
        words_name = None
        for name, parameter in self.named_parameters():
            tensor = parameter.detach()
            if id(parameter) in in_decoder:
                (params if name in wanted else fixed)[name] = tensor[label_words]
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


def _drop_second_name(lm: nn.Module, decoder: LabelWordDecoder) -> None:
    """Leave the decoder's bias, which some heads hold under a name of their own too, to the decoder that uses it."""
    for module in lm.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter is decoder.bias and module is not decoder:
                delattr(module, name)
