"""Whether the tokens of prompts and label words are those of the model."""

from collections.abc import Mapping, Sequence

from transformers import PretrainedConfig

from lmntk.errors import ModelError, TemplateError
from lmntk.models.families import vocabulary_size
from lmntk.models.loading import NUM_SEGMENTS
from lmntk.prompts.features import FeatureDataset


def check_tokens(
    datasets: Mapping[str, FeatureDataset], label_words: Sequence[int], config: PretrainedConfig, tokenizer_name: str
) -> None:
    """Check that the model has an embedding for every token, and for every segment.

    Args:
        datasets: The prompts of each split.
        label_words: The token of each label word.
        config: The model's configuration.
        tokenizer_name: The tokenizer's name, for the error.

    Raises:
        ModelError: The tokenizer has tokens that the model does not know.
        TemplateError: The prompts have more segments than BERT.
    """
    features = [feature for data in datasets.values() for feature in data.features]
    largest = max([*label_words, *(max(feature.input_ids) for feature in features)])
    if largest >= (known := vocabulary_size(config)):
        raise ModelError(
            f"the tokenizer of '{tokenizer_name}' gives token {largest}, but the model knows {known}; "
            "`tokenizer_name` must name the model's own tokenizer",
            path=tokenizer_name,
        )
    segments = 1 + max((max(feature.token_type_ids) for feature in features), default=0)
    if config.model_type == "bert" and segments > NUM_SEGMENTS:
        raise TemplateError(
            f"the prompts have {segments} segments, but BERT has {NUM_SEGMENTS}: use *sep* for some *sep+* in "
            "`template`, or show fewer examples (`gpt3_in_context_num`, `num_demo`)",
            segments=segments,
        )
