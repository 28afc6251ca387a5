"""From a checkpoint to a prompt model: loading, untying the decoder, naming what the checkpoint lacks."""

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from lmntk.errors import UsageError
from lmntk.models.attention import use_plain_attention
from lmntk.models.prompt_model import PromptModel

logger = logging.getLogger(__name__)

# LM-BFF gives BERT room for ten segments, whatever the checkpoint was trained with.
NUM_SEGMENTS = 10


def load_tokenizer(name_or_path: str, cache_dir: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint.

    Raises:
        UsageError: There is no tokenizer there, or it has no mask token.
    """
    with _sentences_instead_of_tracebacks(name_or_path, "--tokenizer_name", "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, cache_dir=cache_dir)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UsageError(
            f"'{name_or_path}' holds no vocabulary of a tokenizer; copy the tokenizer's files there, or name another "
            "folder with --tokenizer_name"
        )
    if tokenizer.mask_token_id is None:
        raise UsageError(
            f"the tokenizer of '{name_or_path}' has no mask token, so this is no masked language model; "
            "--model_name_or_path needs one, such as roberta-base"
        )
    return tokenizer


def load_config(name_or_path: str, cache_dir: str | None = None) -> PretrainedConfig:
    """Load the configuration of a checkpoint.

    Raises:
        UsageError: There is no configuration there, or of an architecture without a masked-language-model form.
    """
    with _sentences_instead_of_tracebacks(name_or_path, "--model_name_or_path", "a model"):
        config = AutoConfig.from_pretrained(name_or_path, cache_dir=cache_dir)
    if type(config) not in AutoModelForMaskedLM._model_mapping:
        raise UsageError(
            f"'{name_or_path}' is of type {config.model_type}, which has no masked language model; "
            "--model_name_or_path takes BERT, RoBERTa, DistilBERT, ModernBERT and their like"
        )
    return config


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the longest sequence the model can read, in tokens; None where nothing limits it."""
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa and its heirs number positions from padding_idx + 1 on, so that many rows are never a position.
    counts_from_padding = config.model_type in {"roberta", "xlm-roberta", "camembert", "roberta-prelayernorm"}
    return positions - config.pad_token_id - 1 if positions and counts_from_padding else positions


def load_prompt_model(
    name_or_path: str,
    config: PretrainedConfig,
    label_word_ids: Sequence[int],
    *,
    binary_classification: bool = False,
    random_segment: bool = False,
    random_init: bool = False,
    seed: int = 42,
    dtype: torch.dtype = torch.float32,
    cache_dir: str | None = None,
) -> PromptModel:
    """Load a masked language model, in eval mode, as a prompt model.

    Args:
        name_or_path: A name on the hub or a local folder.
        config: The checkpoint's configuration.
        label_word_ids: The token of each class's label word, in logit order.
        binary_classification: Make the logits the single difference f₁ − f₀.
        random_segment: Draw the segment embeddings that BERT's checkpoint lacks, instead of repeating its last row.
        random_init: Draw all weights from the configuration's initialiser, with `seed`.
        seed: What random weights are drawn with.
        dtype: The dtype of all weights.
        cache_dir: Where downloads are kept.

    Raises:
        UsageError: The checkpoint cannot be read.
    """
    set_seed(seed)
    config = copy.deepcopy(config)  # tying and segments are changed below
    lm = _initialise(config) if random_init else _load(name_or_path, config, cache_dir)
    if config.model_type == "bert":
        _grow_segments(lm, random_segment)
    use_plain_attention(lm)
    model = PromptModel(lm.eval(), label_word_ids, binary_classification).to(dtype)
    for parameter in model.parameters():
        # A file's weights lie in memory as they lay in the file, and small products round by where numbers lie: in
        # memory of torch's own the same run gives the same bits, started alone or by torchrun.
        parameter.data = parameter.data.clone()
    return model


def _initialise(config: PretrainedConfig) -> PreTrainedModel:
    config.tie_word_embeddings = True
    lm = AutoModelForMaskedLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    _untie(lm, stored_names=set())
    return lm


def _load(name_or_path: str, config: PretrainedConfig, cache_dir: str | None) -> PreTrainedModel:
    # Tied, transformers would overwrite a decoder that the checkpoint stores with the word embeddings.
    config.tie_word_embeddings = False
    with _sentences_instead_of_tracebacks(name_or_path, "--model_name_or_path", "weights"), _quiet_transformers():
        lm, report = AutoModelForMaskedLM.from_pretrained(
            name_or_path,
            config=config,
            cache_dir=cache_dir,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    missing = set(report["missing_keys"])
    if report["mismatched_keys"]:
        names = ", ".join(sorted(str(key[0]) for key in report["mismatched_keys"]))
        # Allowed above only so that they can be named here.
        raise UsageError(f"the weights in '{name_or_path}' do not have the shapes its config.json says: {names}")
    stored = {name for name, _ in lm.named_parameters(remove_duplicate=False)} - missing
    if not stored:
        raise UsageError(f"'{name_or_path}' holds no weight of a {config.model_type} masked language model")
    absent = missing - _untie(lm, stored)
    if absent:
        bar = "!" * 100
        logger.warning(
            "\n%s\nThe checkpoint '%s' lacks weights that the prediction needs. They are RANDOM now, and so are the "
            "results:\n  %s\n%s",
            *(bar, name_or_path, "\n  ".join(sorted(absent)), bar),
        )
    return lm


def _untie(lm: PreTrainedModel, stored_names: set[str]) -> set[str]:
    """Give the decoder weights of its own, and its bias one identity under all its names.

    Args:
        lm: A model loaded with its tying switched off, or freshly initialised.
        stored_names: The parameters that the checkpoint holds.

    Returns:
        The names of the parameters that found their values elsewhere in the checkpoint.
    """
    found: set[str] = set()
    for target, source in (getattr(lm, "_tied_weights_keys", None) or {}).items():
        if target in stored_names and source in stored_names and not target.endswith("bias"):
            continue
        have, lack = (target, source) if target in stored_names and source not in stored_names else (source, target)
        if target.endswith("bias"):
            # One bias under two names is one parameter, and must be counted as one.
            _assign(lm, lack, lm.get_parameter(have))
        else:
            _assign(lm, lack, nn.Parameter(lm.get_parameter(have).detach().clone()))
        if have in stored_names:
            found.add(lack)
    return found


def _assign(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, parameter)


def _grow_segments(lm: PreTrainedModel, random_segment: bool) -> None:
    """Give BERT's segment embeddings `NUM_SEGMENTS` rows: the checkpoint's, then random or repeated ones."""
    name = f"{lm.base_model_prefix}.embeddings.token_type_embeddings"
    old = lm.get_parameter(f"{name}.weight").detach()
    if len(old) >= NUM_SEGMENTS:
        return
    grown = nn.Embedding(NUM_SEGMENTS, old.shape[1], dtype=old.dtype)
    with torch.no_grad():
        if random_segment:
            grown.weight.normal_(std=lm.config.initializer_range)
        else:
            grown.weight[:] = old[-1]
        grown.weight[: len(old)] = old
    lm.set_submodule(name, grown)
    lm.config.type_vocab_size = NUM_SEGMENTS


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep back transformers' own report on missing weights: it calls a tied decoder missing."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _sentences_instead_of_tracebacks(name_or_path: str, flag: str, what: str) -> Iterator[None]:
    """Turn what transformers raises over a checkpoint it cannot use into one sentence."""
    try:
        yield
    except Exception as error:  # transformers, tokenizers and their readers raise whatever they like over a bad file
        reason = " ".join(str(error).split()).split(". ")[0]
        if Path(name_or_path).is_dir():
            there = f"the folder '{name_or_path}' holds no {what.removeprefix('a ')} that can be loaded ({reason})"
        else:
            there = f"'{name_or_path}' is no local folder, and the hub did not give {what} of that name ({reason})"
        raise UsageError(f"{flag}: {there}") from error
