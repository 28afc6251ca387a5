"""Whether the tokens of prompts and label words are those of the model."""

from collections.abc import Mapping, Sequence

from transformers import PretrainedConfig

from lmntk.errors import UsageError
from lmntk.models.families import vocabulary_size
from lmntk.models.loading import NUM_SEGMENTS
from lmntk.prompts.features import FeatureDataset


def check_tokens(
    datasets: Mapping[str, FeatureDataset], label_words: Sequence[int], config: PretrainedConfig, tokenizer_name: str
) -> None:
    """See that the model has an embedding for every token, and for every segment.

    Args:
        datasets: The prompts.
        label_words: The tokens of the label words.
        config: The model's.
        tokenizer_name: What the error names.

    Raises:
        UsageError: It has not.
    """
    features = [feature for data in datasets.values() for feature in data.features]
    largest = max([*label_words, *(max(feature.input_ids) for feature in features)])
    if largest >= (known := vocabulary_size(config)):
        raise UsageError(
            f"the tokenizer of '{tokenizer_name}' gives token {largest}, but the model knows {known}; "
            "--tokenizer_name must name the model's own tokenizer"
        )
    segments = 1 + max((max(feature.token_type_ids) for feature in features), default=0)
    if config.model_type == "bert" and segments > NUM_SEGMENTS:
        raise UsageError(
            f"the prompts have {segments} segments, but BERT has {NUM_SEGMENTS}: use *sep* for some *sep+* in "
            "--template, or show fewer examples (--gpt3_in_context_num, --num_demo)"
        )
