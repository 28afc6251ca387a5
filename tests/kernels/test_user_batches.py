"""What `empirical_ntk` takes for a batch: what tokenizers, data loaders and transformers' models give and take."""

import re
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

import oracle
from lmntk.kernels import ENGINES
from lmntk.kernels.empirical import empirical_ntk
from tiny_models import add_noise
from tiny_tokenizers import make_bert_tokenizer

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 0, 1, 1])
SCALE = torch.rand(5, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Scaled(nn.Module):
    """Takes a scale beside its vector, or has it be one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        hidden = self.inner(x)
        return self.out(torch.tanh(hidden if scale is None else hidden * scale))


class Needy(Scaled):
    """Cannot do without the scale."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x, scale)


class Alone(Scaled):
    """Takes its vector alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Answering(Scaled):
    """Answers as transformers' models do."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=super().forward(x, scale))


def model_of(kind: type[Scaled]) -> Scaled:
    torch.manual_seed(2)
    return kind().double()


def truth(scaled: bool) -> Tensor:
    model = model_of(Scaled)
    rows = list(zip(X.split(1), SCALE.split(1), strict=True))
    found = oracle.gradients(lambda row: model(*row[: 1 + scaled]), list(model.parameters()), rows)
    return oracle.kernel(found, found, "sgd")


def loader(*tensors: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), batch_size=2)


def generated() -> Iterator[Tensor]:
    yield from X.split(2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("kind", "batches", "scaled"),
    [
        (Scaled, lambda: [UserDict(x=X)], False),
        (Scaled, lambda: [BatchEncoding({"x": X, "scale": SCALE})], True),
        (Scaled, lambda: [{"x": X, "scale": None}], False),
        (Scaled, generated, False),
        (Scaled, lambda: loader(X), False),
        (Scaled, lambda: [(X, SCALE)], True),
        (Scaled, lambda: [({"x": X}, Y)], False),
        (Scaled, lambda: [[{"x": X, "scale": SCALE}, Y]], True),
        (Scaled, lambda: [[(X, SCALE), Y]], True),
        (Scaled, lambda: [(X, SCALE, Y)], True),
        (Scaled, lambda: loader(X, SCALE, Y), True),
        (Needy, lambda: loader(X, SCALE), True),
        (Needy, lambda: loader(X, SCALE, Y), True),
        (Alone, lambda: loader(X, Y), False),
        (Alone, lambda: [(X, Y)], False),
        (Answering, lambda: [BatchEncoding({"x": X})], False),
    ],
)
def test_batches_of_every_kind_are_taken(
    kind: type[Scaled], batches: Callable[[], Any], scaled: bool, engine: str
) -> None:
    found = empirical_ntk(model_of(kind), batches(), engine=engine)
    assert oracle.relative_error(found, truth(scaled)) < 1e-12


def test_a_function_is_given_all_of_a_batch_and_may_answer_with_logits() -> None:
    model = model_of(Scaled)
    params = {name: value.detach() for name, value in model.named_parameters()}

    def call(params: dict[str, Tensor], batch: list[Tensor]) -> SequenceClassifierOutput:
        x, _, scale = batch
        return SequenceClassifierOutput(logits=torch.func.functional_call(model, params, (x, scale)))

    found = empirical_ntk(call, loader(X, Y, SCALE), params=params)
    assert oracle.relative_error(found, truth(True)) < 1e-12


@dataclass
class Both:
    """No pytree of torch's."""

    x: Tensor
    y: Tensor


@pytest.mark.parametrize(
    ("kind", "batches", "sentence"),
    [
        (Scaled, None, "`train_batches` is a NoneType, but a list of batches is expected"),
        (Scaled, "text", "`train_batches` is a str, but a list of batches"),
        (Scaled, UserDict(x=X), "`train_batches` is one batch, but a list of batches is expected: `[batch]`"),
        (Scaled, TensorDataset(X, Y), "`train_batches` is a data set of single examples: put a `DataLoader` around it"),
        (Scaled, [X, None], "batch 1 of `train_batches` holds a NoneType, but a batch is a tensor, a mapping"),
        (Scaled, [Both(X, Y)], "batch 0 of `train_batches` holds a Both, but a batch is"),
        (Scaled, [np.ones((2, 3))], "batch 0 of `train_batches` holds a ndarray, but a batch is"),
        (Scaled, [generated()], "batch 0 of `train_batches` holds a generator, but a batch is"),
        (Scaled, [(X, None)], "batch 0 of `train_batches` holds a NoneType"),
        (
            Scaled,
            [{"x": [[1, 2], [3]]}],
            "batch 0 of `train_batches`: 'x' holds lists of numbers or words, not tensors",
        ),
        (Scaled, [{}], "batch 0 of `train_batches` is an empty dict"),
        (Scaled, [{"x": X, "scale": torch.tensor(2.0)}], "'scale' holds a tensor without axes"),
        (Scaled, [()], "batch 0 of `train_batches` holds a tuple"),
        (Scaled, [X, X[:2].to("meta")], "batch 1 of `train_batches` is on meta, but the parameters are on cpu"),
        (
            Scaled,
            [[X, SCALE]],
            "batch 0 of `train_batches` is a list of 2 tensors, of which the last may be labels or an ",
        ),
        (Alone, [(X, Y[:2])], "must agree on the number of examples"),
        (Alone, [(X, SCALE, Y)], "the model cannot be called with the examples: TypeError: Alone.forward() takes 2 "),
        (Scaled, [{"x": X, "labels": Y}], "the model cannot be called with the examples: TypeError: "),
        (Scaled, [X.float()], "the model cannot be called with the examples: RuntimeError: "),
    ],
)
def test_what_is_no_batch_is_said_in_a_sentence(kind: type[Scaled], batches: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        empirical_ntk(model_of(kind), batches)
    if batches is not None:
        with pytest.raises(ValueError, match=re.escape(sentence.replace("train_batches", "x_batches"))):
            empirical_ntk(model_of(kind), [X] if kind is Scaled else [(X, Y)], batches)


class Drawing(Scaled):
    """Draws its outputs, and no module shows it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5))


class Seeing(Scaled):
    """Lets examples see each other, and no module shows it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(dim=0))


@pytest.mark.parametrize("kind", [Drawing, Seeing])
def test_outputs_that_depend_on_more_than_the_example_are_refused(kind: type[Scaled]) -> None:
    with pytest.raises(ValueError, match="differ from call to call, or with the other examples of its batch"):
        empirical_ntk(model_of(kind), [X])


@pytest.mark.parametrize("formula", ["sgd", "signgd"])
@pytest.mark.parametrize("engine", ["auto", "jacobian"])
def test_a_tokenizers_batch_and_a_classifier_of_transformers(engine: str, formula: str, tmp_path: Any) -> None:
    tokenizer = make_bert_tokenizer(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(3)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).eval()
    add_noise(model)
    model = model.double()
    texts = ["a great film", "terrible", "it was a great great film , it was", "bad"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    rows = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(4)]
    gradients = oracle.gradients(lambda row: model(**row).logits, list(model.parameters()), rows)
    found = empirical_ntk(model, [batch], formula=formula, engine=engine)
    if formula == "signgd":  # keys' biases have rounding for a gradient
        assert torch.equal(found, found.round())
    else:
        assert oracle.relative_error(found, oracle.kernel(gradients, gradients, formula)) < 1e-12
