"""Checks of a loaded model: that its answers are those of transformers, and whether padding changes them.

Nobody has looked at all architectures of transformers. A few short prompts of random tokens show what matters here.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lmntk.errors import ModelError, UsageError, first_sentence
from lmntk.models.classifier import PromptClassifier
from lmntk.models.families import is_causal, max_positions, vocabulary_size
from lmntk.models.padding import without_padding_warnings

logger = logging.getLogger(__name__)

LENGTHS = (5, 8, 11)
"""The lengths of the prompts, in tokens: a model that reads tokens in blocks of 2 or 4 pads some of them."""

LONGEST = 64
"""The length up to which they are padded, unless the longest prompt is known."""

# Rounding may move a vector by this power of the dtype's eps, relative to its norm: 7e-5 in float32, 4e-10 in float64.
ROUNDING_POWER = 0.6

# The largest error of an answer: another order of operations stays far below it, a wrong answer far above.
MOST_WRONG = 1e-3

# These do not show in the logits; tools/try_architectures.py found them with transformers 5.23.0.
WRONG_GRADIENTS = {
    "cpmant": "torch.vmap gives other gradients of it",
    "rwkv": "it changes in place what its gradient needs",
}
WRONG_WITH_ALIBI = {"falcon": "with alibi its gradients are not those of transformers' own model"}

Prompt = dict[str, Tensor]


@contextlib.contextmanager
def refusals(name_or_path: str, config: PretrainedConfig) -> Iterator[None]:
    """Turn any error that a model raises into one sentence that names its architecture.

    Args:
        name_or_path: The model's name, for messages.
        config: The model's configuration.

    Raises:
        ModelError: The model raises, or its gradients are known to be wrong.
    """
    known = WRONG_GRADIENTS | (WRONG_WITH_ALIBI if getattr(config, "alibi", False) else {})
    if config.model_type in known:
        raise _refusal(name_or_path, config, known[config.model_type])
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # architectures raise any type
        raise _refusal(name_or_path, config, _named(error)) from error


def probes(config: PretrainedConfig, lengths: Iterable[int], causal: bool) -> list[Prompt]:
    """Draw prompts of random tokens, without special tokens, the same in every call.

    Args:
        config: The model's configuration.
        lengths: The number of tokens of each prompt.
        causal: Whether the last position predicts; else the one before it does.

    Returns:
        Batches of one prompt each: `input_ids` ``[1, L]`` and `mask_pos` ``[1]``.
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
    """Return the answer of transformers' model to a short prompt.

    Args:
        ask: The function from a prompt to the model's answer, a vector.
        config: The model's configuration.
        name_or_path: The model's name, for messages.

    Returns:
        The answer: the logits of all tokens, or a hidden state.

    Raises:
        ModelError: The answer is random.
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
    """Set `makes_masks` of a causal model so that its answer is that of transformers; check that of a masked model.

    Args:
        model: The model to check.
        ask: The function from a prompt to the model's answer.
        wanted: The right answer to the prompt of `own_answer`.
        scale: The spread of the numbers in an answer.
        name_or_path: The model's name, for messages.

    Raises:
        ModelError: No choice gives the right answer.
    """
    config = model.lm.config
    (prompt,) = probes(config, LENGTHS[1:2], is_causal(config))
    for model.makes_masks in (True, False) if is_causal(config) else (True,):
        try:
            with torch.no_grad():
                found = ask(prompt)
        except Exception as error:  # as above
            reason = f"asked at one position it raises {_named(error)}"
            continue
        if not bool((found - wanted).abs().max() > MOST_WRONG * scale):
            return
        reason = "asked at one position it gives other logits than as a whole"
    raise _refusal(name_or_path, config, reason)


def find_out_about_padding(model: PromptClassifier, name_or_path: str, longest: int | None) -> None:
    """Ask a model about single prompts and about padded batches; set `equal_lengths` and warn if padding matters.

    Args:
        model: The model, in eval mode.
        name_or_path: The model's name, for messages.
        longest: The number of tokens of the longest prompt; None for `LONGEST`.

    Raises:
        ModelError: Its answers depend on the other examples of a batch, or have no gradient.
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
            name_or_path,
            config.model_type,
        )
    other = {**prompts[-1], "input_ids": prompts[-1]["input_ids"].flip(1)}
    if _differ(_state(model, [prompts[-1], other])[:1], alone[-1]):
        raise _refusal(name_or_path, config, "its answers depend on the other examples of a batch")
    if not all(_has_gradients(model, prompt) for prompt in prompts[: len(LENGTHS)]):
        raise _refusal(name_or_path, config, "its gradients are not finite, on short prompts at least")


def _padded_as_alone(model: PromptClassifier, prompts: Sequence[Prompt], alone: Sequence[Tensor]) -> bool:
    try:
        found = _state(model, prompts)
    except Exception:  # some architectures do not accept padded prompts
        return False
    return not any(_differ(row[None], own) for row, own in zip(found, alone, strict=False))


def _has_gradients(model: PromptClassifier, prompt: Prompt) -> bool:
    """Whether the gradients of finite logits are finite, judged by those of the embedded tokens."""
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
    """Return the inputs of the last layer, ``[B, d]``, which show more differences than the logits."""
    device = next(model.parameters()).device
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence([prompt["input_ids"][0] for prompt in prompts], batch_first=True)
    batch = {"input_ids": ids, "mask_pos": torch.cat([prompt["mask_pos"] for prompt in prompts])}
    if len(set(lengths)) > 1:
        batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return model.last_layer_inputs({name: tensor.to(device) for name, tensor in batch.items()})


def _differ(found: Tensor, wanted: Tensor) -> bool:
    """Whether two vectors differ by more than rounding; vectors with NaN count as equal."""
    return bool((found - wanted).norm() > torch.finfo(wanted.dtype).eps ** ROUNDING_POWER * wanted.norm())


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_sentence(error)}"


def _refusal(name_or_path: str, config: PretrainedConfig, reason: str) -> ModelError:
    return ModelError(
        f"`model_name_or_path`: '{name_or_path}' is of type {config.model_type}, which cannot be asked here "
        f"({reason}): take an architecture that docs/reference/architectures.md lists as right",
        model=config.model_type,
        reason=reason,
    )
