"""Fields of dataclasses that HfArgumentParser turns into flags."""

import dataclasses
from collections.abc import Iterable
from typing import Any


def flag(help: str, default: Any = None, choices: Iterable[str] | None = None) -> Any:
    """Return a dataclass field that HfArgumentParser turns into an optional flag."""
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:
        metadata["choices"] = tuple(choices)
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str) -> Any:
    """Return a dataclass field that HfArgumentParser turns into a required flag."""
    return dataclasses.field(metadata={"help": help})
