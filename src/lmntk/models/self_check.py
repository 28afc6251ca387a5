"""What a model is tried on once it is loaded: that it answers as transformers has it, and whether it sees its padding.

There are more architectures than anybody has looked at. A few short prompts of random tokens show what matters here.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lmntk.errors import UsageError
from lmntk.models.classifier import PromptClassifier
from lmntk.models.families import is_causal, max_positions, vocabulary_size
from lmntk.models.padding import without_padding_warnings

logger = logging.getLogger(__name__)

LENGTHS = (5, 8, 11)
"""Tokens of the prompts that a model is tried on: models that take tokens in blocks of 2 or 4 pad some of them."""

LONGEST = 64
"""Up to where they are padded, unless the prompts that will be asked are known."""

# How far rounding may move a vector, in units of its length, by the dtype: 7e-5 in float32, 4e-10 in float64.
ROUNDING_POWER = 0.6

# How far an answer may be from the model's own: another order of operations stays far below, another answer far above.
MOST_WRONG = 1e-3

# What no question about logits shows, found by tools/try_architectures.py with transformers 5.23.0.
WRONG_GRADIENTS = {
    "cpmant": "torch.vmap gives other gradients of it",
    "rwkv": "it changes in place what its gradient needs",
}
WRONG_WITH_ALIBI = {"falcon": "with alibi its gradients are not those of transformers' own model"}

Prompt = dict[str, Tensor]


@contextlib.contextmanager
def refusals(name_or_path: str, config: PretrainedConfig) -> Iterator[None]:
    """Turn whatever a model raises that cannot be asked here into one sentence that names its architecture.

    Raises:
        UsageError: The model raises, or its gradients are known to be wrong.
    """
    known = WRONG_GRADIENTS | (WRONG_WITH_ALIBI if getattr(config, "alibi", False) else {})
    if config.model_type in known:
        raise _refusal(name_or_path, config, known[config.model_type])
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # architectures raise whatever they like
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise _refusal(name_or_path, config, f"{type(error).__name__}: {reason}") from error


def probes(config: PretrainedConfig, lengths: Iterable[int], causal: bool) -> list[Prompt]:
    """Draw prompts of random tokens, the same at every call, without the tokens that mean something to the model.

    Args:
        config: The model's.
        lengths: How many tokens each has.
        causal: Whether the last position predicts; else the one before it does.

    Returns:
        Batches of one prompt each.
    """
    special = {
        token
        for settings in (config, config.get_text_config())
        for name, token in settings.to_dict().items()
        if name.endswith("_token_id") and isinstance(token, int)
    }
    size = vocabulary_size(config)
    plain = [token for token in range(min(size, 1000)) if token not in special] or list(range(size))
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in lengths:
        drawn = torch.randint(len(plain), (length,), generator=generator).tolist()
        position = length - 1 if causal else max(length - 2, 0)
        found.append({"input_ids": torch.tensor([[plain[i] for i in drawn]]), "mask_pos": torch.tensor([position])})
    return found


def own_answer(ask: Callable[[Prompt], Tensor], config: PretrainedConfig, name_or_path: str) -> Tensor:
    """Ask a model, as transformers has it, about a short prompt.

    Args:
        ask: Asks the model.
        config: The model's.
        name_or_path: Its name.

    Returns:
        A vector: the logits of all tokens, or a hidden state.

    Raises:
        UsageError: It draws its answer.
    """
    (prompt,) = probes(config, LENGTHS[1:2], is_causal(config))
    with torch.no_grad(), without_padding_warnings():
        first, second = ask(prompt), ask(prompt)
    if _differ(first, second):
        raise _refusal(name_or_path, config, "its answers differ from one call to the next")
    return first


def choose_how_to_ask(
    model: PromptClassifier, ask: Callable[[Prompt], Tensor], wanted: Tensor, scale: float, name_or_path: str
) -> None:
    """Find the way to tell a causal model what its tokens see in which it answers as transformers has it.

    Args:
        model: Its `makes_masks` is set; a masked model has one way only.
        ask: Asks it about a prompt.
        wanted: What it is to answer to the prompt of `own_answer`.
        scale: How large differences between the numbers of an answer are.
        name_or_path: Its name.

    Raises:
        UsageError: There is none.
    """
    config = model.lm.config
    (prompt,) = probes(config, LENGTHS[1:2], is_causal(config))
    for model.makes_masks in (True, False) if is_causal(config) else (True,):
        try:
            with torch.no_grad():
                found = ask(prompt)
        except Exception as error:  # as above
            reason = f"asked at one position it raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if not bool((found - wanted).abs().max() > MOST_WRONG * scale):
            return
        reason = "asked at one position it gives other logits than as a whole"
    raise _refusal(name_or_path, config, reason)


def find_out_about_padding(model: PromptClassifier, name_or_path: str, longest: int | None) -> None:
    """Ask a model about prompts alone, beside others, and padded; note and say if it sees the padding.

    Args:
        model: In eval mode; `equal_lengths` is set.
        name_or_path: Its name, for messages.
        longest: The number of tokens of the longest prompt that will be asked; where it is not known, `LONGEST`.

    Raises:
        UsageError: What it answers depends on the other examples of a batch, or has no gradient.
    """
    config = model.lm.config
    most = min(filter(None, (longest or LONGEST, max_positions(config))))
    lengths = sorted({min(length, most) for length in (*LENGTHS, most)})
    prompts = probes(config, lengths, is_causal(config))
    alone = [_state(model, [prompt]) for prompt in prompts]
    model.equal_lengths = not all(_padded_as_alone(model, prompts[:size], alone) for size in (2, len(prompts)))
    if model.equal_lengths:
        logger.warning(
            "'%s' is of type %s, whose logits change with padding: prompts share a batch only where they are equally "
            "long, which takes more time",
            *(name_or_path, config.model_type),
        )
    other = {**prompts[-1], "input_ids": prompts[-1]["input_ids"].flip(1)}
    if _differ(_state(model, [prompts[-1], other])[:1], alone[-1]):
        raise _refusal(name_or_path, config, "its answers depend on the other examples of a batch")
    if not all(_has_gradients(model, prompt) for prompt in prompts[: len(LENGTHS)]):
        raise _refusal(name_or_path, config, "its gradients are no numbers, on short prompts at least")


def _padded_as_alone(model: PromptClassifier, prompts: Sequence[Prompt], alone: Sequence[Tensor]) -> bool:
    try:
        found = _state(model, prompts)
    except Exception:  # some architectures cannot be asked about padded prompts at all
        return False
    return not any(_differ(row[None], own) for row, own in zip(found, alone, strict=False))


def _has_gradients(model: PromptClassifier, prompt: Prompt) -> bool:
    """Whether logits that are numbers have gradients that are, by those of the embedded tokens."""
    embedded: list[Tensor] = []

    def keep(module: object, args: object, output: Tensor) -> None:
        embedded.append(output if output.requires_grad else output.requires_grad_())

    handle = model.lm.get_input_embeddings().register_forward_hook(keep)
    device = next(model.parameters()).device
    try:
        with torch.enable_grad():
            logits = model.all_logits(**{name: tensor.to(device) for name, tensor in prompt.items()})
            found = torch.autograd.grad(logits.sum(), embedded, allow_unused=True)
    finally:
        handle.remove()
    return not bool(logits.isfinite().all()) or all(part is None or bool(part.isfinite().all()) for part in found)


def _state(model: PromptClassifier, prompts: Sequence[Prompt]) -> Tensor:
    """What goes into the last layer, ``[B, d]``: of all that a model says the most."""
    device = next(model.parameters()).device
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence([prompt["input_ids"][0] for prompt in prompts], batch_first=True)
    batch = {"input_ids": ids, "mask_pos": torch.cat([prompt["mask_pos"] for prompt in prompts])}
    if len(set(lengths)) > 1:
        batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return model.last_layer_inputs({name: tensor.to(device) for name, tensor in batch.items()})


def _differ(found: Tensor, wanted: Tensor) -> bool:
    """Whether two vectors differ by more than rounding; what is no number is not looked at here."""
    return bool((found - wanted).norm() > torch.finfo(wanted.dtype).eps ** ROUNDING_POWER * wanted.norm())


def _refusal(name_or_path: str, config: PretrainedConfig, reason: str) -> UsageError:
    return UsageError(
        f"--model_name_or_path: '{name_or_path}' is of type {config.model_type}, which cannot be asked here "
        f"({reason}): take an architecture that docs/reference/architectures.md lists as right"
    )
