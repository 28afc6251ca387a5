"""Loading checkpoints as prompt models and classifiers, with a warning for each weight that the checkpoint lacks."""

import contextlib
import copy
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    set_seed,
)

from lmntk.errors import ModelError
from lmntk.kernels.contraction import summation_dtype
from lmntk.models.attention import use_plain_attention
from lmntk.models.checkpoints import quiet_transformers, restore_extras
from lmntk.models.classifier import PromptClassifier
from lmntk.models.families import AUTO_CLASSES, family_of, is_causal
from lmntk.models.given_model import float32_copy
from lmntk.models.heads import OneTokenClassifier, SequenceClassifier
from lmntk.models.lora import add_adapters, names_in
from lmntk.models.lora_files import CONFIG_FILE, LoraSettings
from lmntk.models.low_rank import keep_generator_state
from lmntk.models.pretrained import reading
from lmntk.models.prompt_model import PromptModel
from lmntk.models.rms_norm import use_plain_rms_norms
from lmntk.models.self_check import choose_how_to_ask, find_out_about_padding, own_answer, refusals
from lmntk.models.sound_weights import check_finite, check_number_types
from lmntk.models.untying import untie

Model = TypeVar("Model", bound=PromptClassifier)

logger = logging.getLogger(__name__)

# As in LM-BFF, whatever the checkpoint was trained with.
NUM_SEGMENTS = 10


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded, whichever head it has.

    Attributes:
        random_segment: Draw the segment embeddings that BERT's checkpoint lacks, instead of repeating its last row.
        random_init: Draw all weights by the configuration's initialiser.
        seed: The seed of all random weights.
        dtype: The dtype of all weights.
        cache_dir: The folder for downloads; None leaves the choice to transformers.
        lora: The LoRA adapters to add, new or stored in a folder; None for a model without adapters.
        longest: The number of tokens of the longest prompt, up to which padding is tried; None if it is not known.
        given: A language model in memory: a copy of it is used, and no file is read.
    """

    random_segment: bool = False
    random_init: bool = False
    seed: int = 42
    dtype: torch.dtype = torch.float32
    cache_dir: str | None = None
    lora: LoraSettings | None = None
    longest: int | None = None
    given: PreTrainedModel | None = None


DEFAULT_OPTIONS = LoadOptions()


def load_prompt_model(
    name_or_path: str,
    config: PretrainedConfig,
    label_word_ids: Sequence[int],
    options: LoadOptions = DEFAULT_OPTIONS,
    *,
    binary_classification: bool = False,
) -> PromptModel:
    """Load a language model, in eval mode, as a prompt model.

    Args:
        name_or_path: A name on the hub or a local folder.
        config: The checkpoint's configuration.
        label_word_ids: The token of each class's label word, in logit order.
        options: How the model is loaded.
        binary_classification: Make the logits the single difference f₁ − f₀.

    Raises:
        UsageError: The checkpoint cannot be read, or its model cannot give some tokens' logits at one position.
    """
    lm, missing_keys = _language_model(name_or_path, config, options)
    _warn_of_random_weights(name_or_path, missing_keys)
    with refusals(name_or_path, config):
        every = own_answer(
            lambda prompt: lm(input_ids=prompt["input_ids"]).logits[0, prompt["mask_pos"][0]], config, name_or_path
        )
        model = PromptModel(lm, label_word_ids, binary_classification)
        wanted, scale = every[list(label_word_ids)], float(every.max() - every.min())
        choose_how_to_ask(model, lambda prompt: model.all_logits(**prompt)[0], wanted, scale, name_or_path)
        return _finalise(model, name_or_path, options)


def load_classifier(
    name_or_path: str,
    config: PretrainedConfig,
    num_classes: int,
    options: LoadOptions = DEFAULT_OPTIONS,
    *,
    first_token: bool = False,
    binary_classification: bool = False,
) -> SequenceClassifier | OneTokenClassifier:
    """Load an encoder with a classification head, in eval mode.

    Args:
        name_or_path: A name on the hub or a local folder.
        config: The checkpoint's configuration.
        num_classes: The number of classes, or 1 for a score.
        options: How the model is loaded.
        first_token: Use one linear layer on the first token (the last of a causal model) as the head, instead of the
            head that transformers has for the architecture. It is loaded from the checkpoint's folder if it is there,
            and is zero otherwise.
        binary_classification: Make the logits the single difference f₁ − f₀.

    Raises:
        UsageError: The checkpoint cannot be read, or transformers has no head for its architecture.
    """
    if first_token:
        lm, missing_keys = _language_model(name_or_path, config, options)
        _warn_of_random_weights(name_or_path, {name for name in missing_keys if name.startswith(_prefix(lm))})
        with refusals(name_or_path, config):
            encoder = cast(PreTrainedModel, lm.base_model)
            return _finalise_classifier(
                lambda: OneTokenClassifier(encoder, num_classes, binary_classification), encoder, name_or_path, options
            )
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ModelError(
            f"`few_shot_type=finetune`: transformers has no classification head for {config.model_type}; add "
            f"`from_linearhead=True`, which puts one linear layer on the {'last' if is_causal(config) else 'first'} "
            "token, or take `few_shot_type=prompt`",
            model=config.model_type,
        )
    set_seed(options.seed)
    config = copy.deepcopy(config)
    config.num_labels = num_classes
    if options.random_init:
        auto = AutoModelForSequenceClassification
        lm = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
    else:
        lm, missing_keys = _load(AutoModelForSequenceClassification, name_or_path, config, options.cache_dir)
        if options.lora is not None and options.lora.folder is not None:
            missing_keys -= names_in(options.lora.folder, lm)
        new = {name for name in missing_keys if not name.startswith(_prefix(lm)) or ".pooler." in name}
        _warn_of_random_weights(name_or_path, missing_keys - new)
        if new:
            names = ", ".join(sorted(new))
            logger.warning("the classification head is new, drawn at random with `seed=%d`: %s", options.seed, names)
    with refusals(name_or_path, config):
        _adapt(lm, options)
        return _finalise_classifier(
            lambda: SequenceClassifier(lm, binary_classification), lm.base_model, name_or_path, options
        )


def _language_model(
    name_or_path: str, config: PretrainedConfig, options: LoadOptions
) -> tuple[PreTrainedModel, set[str]]:
    """Return a language model, its decoder untied, and the names of the weights that the checkpoint lacks."""
    set_seed(options.seed)
    config = copy.deepcopy(config)  # changed below: tying and segments
    missing_keys: set[str] = set()
    auto = AUTO_CLASSES[family_of(config)]
    if options.given is not None:
        lm = float32_copy(options.given)
    elif options.random_init:
        config.tie_word_embeddings = True
        lm = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
        untie(lm, stored_names=set())
    else:
        # Tied, transformers would overwrite a decoder that the checkpoint stores with the word embeddings.
        config.tie_word_embeddings = False
        lm, missing = _load(auto, name_or_path, config, options.cache_dir)
        stored = {name for name, _ in lm.named_parameters(remove_duplicate=False)} - missing
        missing_keys = missing - untie(lm, stored)
    with refusals(name_or_path, config):
        _adapt(lm, options)
    return lm, missing_keys


def _adapt(lm: PreTrainedModel, options: LoadOptions) -> None:
    """Change a model's modules: segments, attention, norms, adapters; switch it to eval mode."""
    if lm.config.model_type == "bert":
        _grow_segments(lm, options.random_segment)
    use_plain_attention(lm)
    use_plain_rms_norms(lm)
    # The products of all experts at once do not exist in float64.
    lm.set_experts_implementation("eager")
    if lm.config.model_type == "big_bird":
        # BigBird would choose by the length of its first prompt, for all later ones.
        cast(Any, lm.base_model).set_attention_type("original_full")
    keep_generator_state(lm.base_model)
    if options.lora is not None:
        if options.lora.folder is not None:
            set_seed(options.seed)  # peft draws some initialisations at random, with this seed
        add_adapters(lm, options.lora)
    lm.eval()


def _finalise_classifier(make: Callable[[], Model], encoder: Any, name_or_path: str, options: LoadOptions) -> Model:
    """Make a classifier, and check that the inputs of its head are the outputs of its encoder."""
    if not is_causal(encoder.config):
        return _finalise(make(), name_or_path, options)
    wanted = own_answer(
        lambda prompt: encoder(input_ids=prompt["input_ids"]).last_hidden_state[0, prompt["mask_pos"][0]],
        encoder.config,
        name_or_path,
    )
    model = make()
    scale = float(wanted.max() - wanted.min())
    choose_how_to_ask(model, lambda prompt: model.last_layer_inputs(prompt)[0], wanted, scale, name_or_path)
    return _finalise(model, name_or_path, options)


def _finalise(model: Model, name_or_path: str, options: LoadOptions) -> Model:
    """Load adapters and head, convert to the dtype, copy the weights into memory of torch's, and check the model."""
    if not options.random_init and options.given is None:
        restore_extras(model, Path(name_or_path))
    if options.lora is not None and options.lora.folder is not None:
        restore_extras(model, options.lora.folder)
    narrowed = summation_dtype(options.dtype) != options.dtype
    if narrowed:
        # Rounding to 8 bits would hide what the checks look for.
        find_out_about_padding(model.eval(), name_or_path, options.longest)
    model.convert(options.dtype)
    for parameter in model.parameters():
        # Weights read from a file keep its alignment, by which small products round differently. In memory that torch
        # allocates, the same run gives the same bits, started alone or by torchrun.
        parameter.data = parameter.data.clone()
    if not narrowed:
        find_out_about_padding(model.eval(), name_or_path, options.longest)
    return model


def _load(
    auto: Any, name_or_path: str, config: PretrainedConfig, cache_dir: str | None
) -> tuple[PreTrainedModel, set[str]]:
    """Return the model that `auto` makes, and the names of the weights that the checkpoint lacks."""
    with (
        reading(name_or_path, "model_name_or_path", "weights"),
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
            ignore_mismatched_sizes=True,  # they are named below
        )
    check_number_types(name_or_path, cache_dir)
    missing = set(report["missing_keys"])
    mismatched = {str(key[0]) for key in report["mismatched_keys"]}
    if auto is AutoModelForSequenceClassification:
        # A head for another number of classes counts as missing.
        of_head = {name for name in mismatched if not name.startswith(_prefix(lm))}
        missing, mismatched = missing | of_head, mismatched - of_head
    if mismatched:
        raise ModelError(
            f"the weights in '{name_or_path}' do not have the shapes in its config.json: "
            f"{', '.join(sorted(mismatched))}",
            path=name_or_path,
        )
    if {name for name, _ in lm.named_parameters(remove_duplicate=False)} <= missing:
        raise ModelError(
            f"'{name_or_path}' holds no weight of a {config.model_type} {family_of(config)} language model",
            path=name_or_path,
        )
    check_finite(dict(lm.named_parameters()), f"`model_name_or_path`: the checkpoint '{name_or_path}'")
    return lm, missing


@contextlib.contextmanager
def _without_adapters(name_or_path: str) -> Iterator[str]:
    """A folder without its LoRA adapters, which transformers would put on the model by itself."""
    folder = Path(name_or_path)
    if not (folder / CONFIG_FILE).is_file():
        yield name_or_path
        return
    with tempfile.TemporaryDirectory() as place:
        for path in folder.iterdir():
            if path.name != CONFIG_FILE:
                (Path(place) / path.name).symlink_to(path.resolve())
        yield place


def _warn_of_random_weights(name_or_path: str, missing_keys: set[str]) -> None:
    if missing_keys:
        bar = "!" * 100
        logger.warning(
            "\n%s\nThe checkpoint '%s' lacks weights that the prediction needs. They are RANDOM now, and so are the "
            "results:\n  %s\n%s",
            bar,
            name_or_path,
            "\n  ".join(sorted(missing_keys)),
            bar,
        )


def _prefix(lm: PreTrainedModel) -> str:
    """Return the beginning of the names of the encoder's parameters."""
    return f"{lm.base_model_prefix}."


def _grow_segments(lm: PreTrainedModel, random_segment: bool) -> None:
    """Enlarge BERT's segment embeddings to `NUM_SEGMENTS` rows: the checkpoint's, then random or repeated ones."""
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
