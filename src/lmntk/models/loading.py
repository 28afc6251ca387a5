"""From a checkpoint to a prompt model: loading, untying the decoder, naming what the checkpoint lacks."""

import contextlib
import copy
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BigBirdModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from lmntk.errors import UsageError
from lmntk.models.attention import use_plain_attention
from lmntk.models.checkpoints import quiet_transformers, restore_extras
from lmntk.models.classifier import PromptClassifier
from lmntk.models.families import AUTO_CLASSES, choose_family, family_of, is_causal
from lmntk.models.gguf import files_in
from lmntk.models.given_model import float32_copy
from lmntk.models.heads import OneTokenClassifier, SequenceClassifier
from lmntk.models.lora import add_adapters, names_in
from lmntk.models.lora_files import CONFIG_FILE, LoraSettings
from lmntk.models.prompt_model import PromptModel
from lmntk.models.rms_norm import use_plain_rms_norms
from lmntk.models.self_check import choose_how_to_ask, find_out_about_padding, own_answer, refusals
from lmntk.models.sound_weights import check_finite, check_number_types
from lmntk.models.untying import untie
from lmntk.models.vocabulary import check_vocabulary

Model = TypeVar("Model", bound=PromptClassifier)

logger = logging.getLogger(__name__)

SEED = 42

# LM-BFF gives BERT room for ten segments, whatever the checkpoint was trained with.
NUM_SEGMENTS = 10


def load_tokenizer(
    name_or_path: str,
    cache_dir: str | None = None,
    needs_mask: bool = True,
    model_size: int = 0,
    *,
    local_only: bool = False,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint.

    Args:
        name_or_path: A name on the hub or a local folder.
        cache_dir: Where downloads are kept.
        needs_mask: Whether prompts with a mask are to be made.
        model_size: How many tokens the model knows.
        local_only: Fetch nothing.

    Raises:
        UsageError: There is no tokenizer there, it has no mask token and needs one, or two of its tokens have one id.
    """
    with _as_usage_error(name_or_path, "--tokenizer_name", "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, cache_dir=cache_dir, local_files_only=local_only)
    check_tokenizer(tokenizer, name_or_path, needs_mask, model_size)
    return tokenizer


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, name_or_path: str, needs_mask: bool = True, model_size: int = 0
) -> None:
    """See that prompts can be made with a tokenizer; the arguments are those of `load_tokenizer`.

    Raises:
        UsageError: It has no vocabulary, no mask token though it needs one, or two of its tokens have one id.
    """
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UsageError(
            f"'{name_or_path}' holds no vocabulary of a tokenizer; copy the tokenizer's files there, or name another "
            "folder with --tokenizer_name"
        )
    if needs_mask and tokenizer.mask_token_id is None:
        raise UsageError(
            f"the tokenizer of '{name_or_path}' has no mask token, which the prompts of a masked language model need: "
            "name another with --tokenizer_name, or another model with --model_name_or_path"
        )
    check_vocabulary(tokenizer, name_or_path, model_size)


def load_config(
    name_or_path: str, cache_dir: str | None = None, family: str | None = None, *, local_only: bool = False
) -> PretrainedConfig:
    """Load the configuration of a checkpoint, which says from then on of which family the model is.

    Args:
        name_or_path: A name on the hub or a local folder.
        cache_dir: Where downloads are kept.
        family: ``"masked"`` or ``"causal"``; None leaves the choice to the configuration.
        local_only: Fetch nothing.

    Raises:
        UsageError: There is no configuration there, or transformers has no such language model of its architecture.
    """
    with _as_usage_error(name_or_path, "--model_name_or_path", "a model"):
        config = AutoConfig.from_pretrained(name_or_path, cache_dir=cache_dir, local_files_only=local_only)
    choose_family(config, family)
    return config


class LoadOptions(TypedDict, total=False):
    """How a checkpoint is loaded, whatever becomes of it; every part may be left out.

    Attributes:
        random_segment: Draw the segment embeddings that BERT's checkpoint lacks, instead of repeating its last row.
        random_init: Draw all weights from the configuration's initialiser, with `seed`.
        seed: What random weights are drawn with, 42 where none is given.
        dtype: The dtype of all weights, float32 where none is given.
        cache_dir: Where downloads are kept.
        lora: LoRA adapters to add: new ones, or those in a folder.
        longest: The number of tokens of the longest prompt that will be asked, up to which padding is tried.
        given: A language model that the caller has loaded: a copy of it is asked, and nothing is read from files.
    """

    random_segment: bool
    random_init: bool
    seed: int
    dtype: torch.dtype
    cache_dir: str | None
    lora: LoraSettings | None
    longest: int | None
    given: PreTrainedModel | None


def load_prompt_model(
    name_or_path: str,
    config: PretrainedConfig,
    label_word_ids: Sequence[int],
    *,
    binary_classification: bool = False,
    **options: Unpack[LoadOptions],
) -> PromptModel:
    """Load a language model, in eval mode, as a prompt model.

    Args:
        name_or_path: A name on the hub or a local folder.
        config: The checkpoint's configuration.
        label_word_ids: The token of each class's label word, in logit order.
        binary_classification: Make the logits the single difference f₁ − f₀.
        **options: See `LoadOptions`.

    Raises:
        UsageError: The checkpoint cannot be read, or its model is none that can be asked for some tokens' logits at one
            position.
    """
    lm, absent = _language_model(name_or_path, config, options)
    _warn_of_random_weights(name_or_path, absent)
    with refusals(name_or_path, config):
        every = own_answer(
            lambda prompt: lm(input_ids=prompt["input_ids"]).logits[0, prompt["mask_pos"][0]], config, name_or_path
        )
        model = PromptModel(lm, label_word_ids, binary_classification)
        wanted, scale = every[list(label_word_ids)], float(every.max() - every.min())
        choose_how_to_ask(model, lambda prompt: model.all_logits(**prompt)[0], wanted, scale, name_or_path)
        return _finished(model, name_or_path, options)


def load_classifier(
    name_or_path: str,
    config: PretrainedConfig,
    num_classes: int,
    *,
    first_token: bool = False,
    binary_classification: bool = False,
    **options: Unpack[LoadOptions],
) -> SequenceClassifier | OneTokenClassifier:
    """Load an encoder with a classification head, in eval mode.

    Args:
        name_or_path: A name on the hub or a local folder.
        config: The checkpoint's configuration.
        num_classes: The number of classes, or 1 for a score.
        first_token: Take one linear layer on the first token (the last of a causal model) as the head, zero until it
            is fitted, and not the head that transformers has for the architecture. A head of this kind beside the
            weights is taken from there.
        binary_classification: Make the logits the single difference f₁ − f₀.
        **options: See `LoadOptions`.

    Raises:
        UsageError: The checkpoint cannot be read, or transformers has no head for its architecture.
    """
    if first_token:
        lm, absent = _language_model(name_or_path, config, options)
        _warn_of_random_weights(name_or_path, {name for name in absent if name.startswith(_prefix(lm))})
        with refusals(name_or_path, config):
            encoder = cast(PreTrainedModel, lm.base_model)
            return _finished_classifier(
                lambda: OneTokenClassifier(encoder, num_classes, binary_classification), encoder, name_or_path, options
            )
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise UsageError(
            f"--few_shot_type finetune: transformers has no classification head for {config.model_type}; add "
            f"--from_linearhead, which puts one linear layer on the {'last' if is_causal(config) else 'first'} token, "
            "or take --few_shot_type prompt"
        )
    seed = options.get("seed", SEED)
    set_seed(seed)
    config = copy.deepcopy(config)
    config.num_labels = num_classes
    if options.get("random_init"):
        auto = AutoModelForSequenceClassification
        lm, absent = auto.from_config(config, dtype=torch.float32, attn_implementation="eager"), set()
    else:
        lm, absent = _load(AutoModelForSequenceClassification, name_or_path, config, options.get("cache_dir"))
        lora = options.get("lora")
        absent -= set() if lora is None or lora.folder is None else names_in(lora.folder, lm)
        new = {name for name in absent if not name.startswith(_prefix(lm)) or ".pooler." in name}
        _warn_of_random_weights(name_or_path, absent - new)
        if new:
            logger.warning(
                "the classification head is new, drawn at random with --seed %d: %s", seed, ", ".join(sorted(new))
            )
    with refusals(name_or_path, config):
        _prepare(lm, options)
        return _finished_classifier(
            lambda: SequenceClassifier(lm, binary_classification), lm.base_model, name_or_path, options
        )


def _language_model(
    name_or_path: str, config: PretrainedConfig, options: LoadOptions
) -> tuple[PreTrainedModel, set[str]]:
    """A language model with its decoder untied, and the names of the weights that the checkpoint lacks."""
    set_seed(options.get("seed", SEED))
    config = copy.deepcopy(config)  # tying and segments are changed below
    absent: set[str] = set()
    auto = AUTO_CLASSES[family_of(config)]
    given = options.get("given")
    if given is not None:
        lm = float32_copy(given)
    elif options.get("random_init"):
        config.tie_word_embeddings = True
        lm = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
        untie(lm, stored_names=set())
    else:
        # Tied, transformers would overwrite a decoder that the checkpoint stores with the word embeddings.
        config.tie_word_embeddings = False
        lm, missing = _load(auto, name_or_path, config, options.get("cache_dir"))
        stored = {name for name, _ in lm.named_parameters(remove_duplicate=False)} - missing
        absent = missing - untie(lm, stored)
    with refusals(name_or_path, config):
        _prepare(lm, options)
    return lm, absent


def _prepare(lm: PreTrainedModel, options: LoadOptions) -> None:
    """Bring a model into the form in which it is asked: segments, attention, adapters."""
    if lm.config.model_type == "bert":
        _grow_segments(lm, options.get("random_segment", False))
    use_plain_attention(lm)
    use_plain_rms_norms(lm)
    # Products of all experts in one take no float64.
    lm.set_experts_implementation("eager")
    if lm.config.model_type == "big_bird":
        # It would choose by the length of the first prompts it meets, and stay with that.
        cast(BigBirdModel, lm.base_model).set_attention_type("original_full")
    lora = options.get("lora")
    if lora is not None:
        if lora.folder is not None:
            set_seed(options.get("seed", SEED))  # some initialisations are random, as they are with this seed in peft
        add_adapters(lm, lora)
    lm.eval()


def _finished_classifier(make: Callable[[], Model], encoder: Any, name_or_path: str, options: LoadOptions) -> Model:
    """Make a classifier, and see that what its head is given is what its encoder says."""
    if not is_causal(encoder.config):
        return _finished(make(), name_or_path, options)
    wanted = own_answer(
        lambda prompt: encoder(input_ids=prompt["input_ids"]).last_hidden_state[0, prompt["mask_pos"][0]],
        encoder.config,
        name_or_path,
    )
    model = make()
    scale = float(wanted.max() - wanted.min())
    choose_how_to_ask(model, lambda prompt: model.last_layer_inputs(prompt)[0], wanted, scale, name_or_path)
    return _finished(model, name_or_path, options)


def _finished(model: Model, name_or_path: str, options: LoadOptions) -> Model:
    """Give a model what lies beside its checkpoint's weights, the dtype asked for, and memory of its own; try it."""
    if not options.get("random_init") and options.get("given") is None:
        restore_extras(model, Path(name_or_path))
    lora = options.get("lora")
    if lora is not None and lora.folder is not None:
        restore_extras(model, lora.folder)
    model.to(options.get("dtype", torch.float32))
    for parameter in model.parameters():
        # A file's weights lie in memory as they lay in the file, and small products round by where numbers lie: in
        # memory of torch's own the same run gives the same bits, started alone or by torchrun.
        parameter.data = parameter.data.clone()
    find_out_about_padding(model.eval(), name_or_path, options.get("longest"))
    return model


def _load(
    auto: Any, name_or_path: str, config: PretrainedConfig, cache_dir: str | None
) -> tuple[PreTrainedModel, set[str]]:
    """Load weights into the model that `auto` chooses; return it and the names of those that the checkpoint lacks."""
    with (
        _as_usage_error(name_or_path, "--model_name_or_path", "weights"),
        quiet_transformers(),
        _without_adapters(name_or_path) as place,
    ):
        lm, report = auto.from_pretrained(
            place,
            config=config,
            cache_dir=cache_dir,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    check_number_types(name_or_path, cache_dir)
    missing = set(report["missing_keys"])
    mismatched = {str(key[0]) for key in report["mismatched_keys"]}
    if auto is AutoModelForSequenceClassification:
        # A head for other classes is a head that is not there.
        of_head = {name for name in mismatched if not name.startswith(_prefix(lm))}
        missing, mismatched = missing | of_head, mismatched - of_head
    if mismatched:
        # Allowed above only so that they can be named here.
        raise UsageError(
            f"the weights in '{name_or_path}' do not have the shapes its config.json says: "
            f"{', '.join(sorted(mismatched))}"
        )
    if {name for name, _ in lm.named_parameters(remove_duplicate=False)} <= missing:
        raise UsageError(
            f"'{name_or_path}' holds no weight of a {config.model_type} {family_of(config)} language model"
        )
    check_finite(dict(lm.named_parameters()), f"--model_name_or_path: the checkpoint '{name_or_path}'")
    return lm, missing


@contextlib.contextmanager
def _without_adapters(name_or_path: str) -> Iterator[str]:
    """A folder's weights without the adapters beside them, which transformers would put on the model on its own."""
    folder = Path(name_or_path)
    if not (folder / CONFIG_FILE).is_file():
        yield name_or_path
        return
    with tempfile.TemporaryDirectory() as place:
        for path in folder.iterdir():
            if path.name != CONFIG_FILE:
                (Path(place) / path.name).symlink_to(path.resolve())
        yield place


def _warn_of_random_weights(name_or_path: str, absent: set[str]) -> None:
    if absent:
        bar = "!" * 100
        logger.warning(
            "\n%s\nThe checkpoint '%s' lacks weights that the prediction needs. They are RANDOM now, and so are the "
            "results:\n  %s\n%s",
            *(bar, name_or_path, "\n  ".join(sorted(absent)), bar),
        )


def _prefix(lm: PreTrainedModel) -> str:
    """What the names of the encoder's parameters begin with."""
    return f"{lm.base_model_prefix}."


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
def _as_usage_error(name_or_path: str, flag: str, what: str) -> Iterator[None]:
    """Turn what transformers raises over a checkpoint it cannot use into one sentence."""
    try:
        yield
    except Exception as error:  # transformers, tokenizers and their readers raise whatever they like over a bad file
        reason = " ".join(str(error).split()).split(". ")[0]
        path = Path(name_or_path)
        if path.is_dir():
            there = f"the folder '{name_or_path}' holds no {what.removeprefix('a ')} that can be loaded ({reason})"
            if adapters := sorted(place.parent.name for place in path.glob(f"*/{CONFIG_FILE}")):
                there += f"; it holds folders of adapters, of which one can be named: {', '.join(adapters)}"
            if found := files_in(path):
                there += f"; it holds GGUF files, of which --gguf_file names one: {', '.join(found)}"
        elif path.is_file():
            there = f"'{name_or_path}' is a file: name the folder it is in"
            there += f", and --gguf_file {path.name}" if path.suffix == ".gguf" else ""
        else:
            there = f"'{name_or_path}' is no local folder, and the hub did not give {what} of that name ({reason})"
        raise UsageError(f"{flag}: {there}") from error
