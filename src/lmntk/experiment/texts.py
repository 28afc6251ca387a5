"""Texts and labels as Python users have them: lists, numpy arrays, columns of a data frame."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.utils.multiclass import type_of_target

from lmntk.errors import DataError, SettingError


def read_texts(texts: Any) -> list[tuple[str, ...]]:
    """Read examples of one or several sentences.

    Args:
        texts: A list, array or pandas Series of strings; or rows of as many strings each: tuples, lists, a
            two-dimensional array, a pandas DataFrame.

    Returns:
        The sentences of each example.

    Raises:
        DataError: There are no examples, one is not of strings, or they differ in their number of sentences.

    Example:
        >>> read_texts(["a great film", "boring"])
        [('a great film',), ('boring',)]
        >>> read_texts([("a man eats", "a man is fed")])
        [('a man eats', 'a man is fed')]
    """
    if isinstance(texts, str | bytes) or not hasattr(texts, "__iter__"):
        raise DataError("`texts` must be a list of strings, or of rows of strings", example=None)
    rows = texts.to_numpy() if hasattr(texts, "to_numpy") else texts
    read = [(row,) if isinstance(row, str) else _row(row, number) for number, row in enumerate(rows)]
    if not read:
        raise DataError("`texts` holds no examples", example=None)
    for number, sentences in enumerate(read):
        if len(sentences) != len(read[0]):
            raise DataError(
                f"`texts`: example {number} (counted from 0) has {len(sentences)} sentences, but the first has "
                f"{len(read[0])}",
                example=number,
            )
        for sentence in sentences:
            _check_text(sentence, number)
    return read


def _row(row: Any, number: int) -> tuple[Any, ...]:
    if isinstance(row, tuple | list | np.ndarray) and len(row):
        return tuple(row)
    raise DataError(
        f"`texts`: example {number} (counted from 0) is {row!r:.60}, not a string or a row of strings", example=number
    )


def _check_text(sentence: Any, number: int) -> None:
    if not isinstance(sentence, str):
        raise DataError(
            f"`texts`: example {number} (counted from 0) holds {sentence!s:.60}, a {type(sentence).__name__}, "
            "which is not a string",
            example=number,
        )
    try:
        sentence.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"`texts`: example {number} (counted from 0) holds half a character, {ascii(sentence[error.start])}",
            example=number,
        ) from error


def read_labels(labels: Any, examples: int) -> np.ndarray:
    """Read one label per example, of any type that can be sorted: strings, integers, booleans.

    Args:
        labels: A list, array or pandas Series.
        examples: How many there must be.

    Returns:
        The labels, ``[N]``.

    Raises:
        DataError: There are more or fewer, or one is missing.
    """
    array = np.asarray(labels)
    if array.shape != (examples,):
        raise DataError(
            f"`labels` must hold one label for each of the {examples} texts, but has the shape {list(array.shape)}",
            example=None,
        )
    for number, label in enumerate(array.tolist()):
        if label is None or label != label:
            raise DataError(f"`labels`: example {number} (counted from 0) has no label", example=number)
    if (kind := type_of_target(array)) not in ("binary", "multiclass"):
        raise DataError(f"`labels` must be classes, but are {kind}", example=None)
    return array


def match_label_words(
    labels: np.ndarray, label_words: Mapping[Any, str] | Sequence[str] | None
) -> tuple[dict[str, str], np.ndarray]:
    """Give each class its label word.

    Args:
        labels: The labels of the train texts, ``[N]``.
        label_words: A word for each label; or words in the sorted order of the labels.

    Returns:
        The word of each label, spelled as text, in the order of the logits; and the labels in that order.

    Raises:
        SettingError: There are no words, or not as many as there are labels.
        DataError: A label has no word, or labels of several types do not sort.

    Example:
        >>> match_label_words(np.array([1, 0, 1]), ["terrible", "great"])
        ({'0': 'terrible', '1': 'great'}, array([0, 1]))
    """
    try:
        seen = np.unique(labels)
    except TypeError as error:
        raise DataError(f"`labels` are of several types that do not sort: {error}", example=None) from error
    names = {str(label): label for label in seen.tolist()}
    if isinstance(label_words, Mapping):
        words = {str(label): word for label, word in label_words.items()}
        keys = {str(label): label for label in label_words}
        for name in names:
            if name not in words:
                example = int(np.flatnonzero(labels == names[name])[0])
                raise DataError(
                    f"`labels`: example {example} (counted from 0) has the label {names[name]!r:.40}, which is not a "
                    f"key of `label_words`: {', '.join(words)}",
                    example=example,
                )
        return words, _array([names.get(name, keys[name]) for name in words], labels.dtype)
    if not isinstance(label_words, Sequence) or isinstance(label_words, str):
        raise SettingError(
            "`label_words` must give each label its word, as in {'negative': 'terrible', 'positive': 'great'}",
            setting="label_words", value=label_words,
        )  # fmt: skip
    if len(label_words) != len(names):
        raise SettingError(
            f"`label_words` holds {len(label_words)} words, but the labels are {', '.join(names)}: give as many words, "
            "or a dictionary",
            setting="label_words", value=label_words,
        )  # fmt: skip
    return dict(zip(names, label_words, strict=True)), seen


def _array(values: Sequence[Any], dtype: np.dtype) -> np.ndarray:
    """The labels as an array of the type that those of the train texts have, or else of objects."""
    if dtype.kind in "US":
        return np.array([str(value) for value in values])
    array = np.empty(len(values), dtype=object)
    array[:] = values
    try:
        return array if dtype.hasobject else array.astype(dtype)
    except (TypeError, ValueError):
        return array
