"""The names of a kernel's parts, by which parameters are told apart: ``layer.3/query/weight``."""

import re
from collections.abc import Sequence

from lmntk.errors import SettingError

PART_KEYS = ("layer", "kind", "weight-or-bias")
"""What parameters are told apart by, in the order in which a part's name has them."""
KINDS = (*("embedding", "query", "key", "value", "query-key-value", "output", "feed-forward", "norm", "other", "head"),)
"""The kinds of parameters, in the order of tables; ``output`` is the attention's."""
SEPARATOR = "/"
_NUMBERED = re.compile(r"layer\.(\d+)")


def read_part_keys(text: str) -> tuple[str, ...]:
    """Read the setting `kernel_parts`.

    Args:
        text: Some of `PART_KEYS`, separated by commas, in any order.

    Returns:
        The keys in the order of `PART_KEYS`.

    Raises:
        SettingError: A word is not one of them.

    Examples:
        >>> read_part_keys("kind,layer")
        ('layer', 'kind')
    """
    words = [word.strip().replace("_", "-") for word in text.split(",")]
    if not any(words):
        sentence = f"`kernel_parts` names nothing: give one or more of {', '.join(PART_KEYS)}, separated by commas"
        raise SettingError(sentence, setting="kernel_parts", value=text)
    unknown = [word for word in words if word not in PART_KEYS]
    if unknown:
        raise SettingError(
            f"`kernel_parts={text}`: parameters are not told apart by {unknown[0] or 'nothing'!r}; give one or more of "
            f"{', '.join(PART_KEYS)}, separated by commas",
            setting="kernel_parts",
            value=text,
        )
    return tuple(key for key in PART_KEYS if key in words)


def join_part_name(values: Sequence[str]) -> str:
    """Return the name of a part.

    Args:
        values: The part's layer, kind, and weight or bias, as far as parts are told apart by them.

    Examples:
        >>> join_part_name(["layer 3", "query", "weight"])
        'layer.3/query/weight'
    """
    return SEPARATOR.join(value.replace(" ", ".") for value in values)


def split_part_name(name: str, keys: Sequence[str]) -> dict[str, str]:
    """Return what a part's name says.

    Args:
        name: The name of a part, also that of a layer alone: ``"layer 3"``.
        keys: Those of `PART_KEYS` that parts are told apart by.

    Examples:
        >>> split_part_name("layer.3/bias", ["layer", "weight-or-bias"])
        {'layer': 'layer.3', 'weight-or-bias': 'bias'}
    """
    return dict(zip(keys, name.replace(" ", ".").split(SEPARATOR), strict=True))


def layer_number(layer: str) -> int | None:
    """Return the number of a layer, from 0 on; None for embeddings, the head, and what is between layers.

    Examples:
        >>> layer_number("layer.3"), layer_number("head")
        (3, None)
    """
    found = _NUMBERED.fullmatch(layer)
    return int(found[1]) if found else None
