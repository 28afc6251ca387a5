"""The error of features as their file has it and as a command prints it."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmntk.errors import SettingError
from lmntk.kernels.projection_check import NUM_DRAWS, EntryError
from lmntk.storage.atomic import write_text
from lmntk.storage.readers import read_json
from lmntk.storage.wording import quantity
from lmntk.trainers.projected_width import ERROR_KEY


@dataclass(frozen=True)
class FeatureError:
    """The error of the kernel of the train features, as some train examples show it.

    Attributes:
        examples: How many examples were looked at.
        draws: How many seeds were drawn, that of the features first.
        entries: The errors, the same quantity as of a projected kernel's entries.
    """

    examples: int
    draws: int
    entries: EntryError

    @classmethod
    def read(cls, path: Path, described: Mapping[str, Any], examples: int) -> "FeatureError | None":
        """Return what a file says of these features and so many examples; None if it says nothing of them."""
        try:
            stored = read_json(path)
            error = stored.pop(ERROR_KEY)
            if stored != json.loads(json.dumps(described)) or (error["examples"], error["draws"]) != (
                [examples, examples],
                NUM_DRAWS,
            ):
                return None
            entries = EntryError(**{field.name: float(error[field.name]) for field in dataclasses.fields(EntryError)})
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        return cls(examples, NUM_DRAWS, entries)

    def write(self, path: Path, described: Mapping[str, Any]) -> None:
        """Write the error, and what says which features it is of."""
        text = json.dumps({**described, ERROR_KEY: self.description}, indent=2, ensure_ascii=False)
        write_text(path, f"{text}\n")

    @property
    def upper(self) -> float:
        """What a tolerance is compared with, of the rounded numbers: the same when they are read from the file."""
        error = self.description
        return max(error["own"], error["mean"] + error["std"])

    @property
    def description(self) -> dict[str, Any]:
        """What the file says, rounded to four digits, as the description of a projected kernel has it."""
        entries = {name: float(f"{value:.4g}") for name, value in dataclasses.asdict(self.entries).items()}
        return {"examples": [self.examples, self.examples], "draws": self.draws, **entries}

    def __str__(self) -> str:
        entries = self.entries
        return (
            f"relative error of the features' kernel on {quantity(self.examples, 'train text')}: {entries.own:.1%} "
            f"± {entries.sampling:.1%} ({entries.mean:.1%} ± {entries.std:.1%} over {self.draws} seeds)"
        )


def too_little_memory(what: str, needed: int, given: int) -> SettingError:
    """Return the error that `kernel_memory_gb` has no room for something, given in bytes."""
    needed_gb, given_gb = needed / 2**30, given / 2**30
    return SettingError(
        f"`kernel_memory_gb`: {what} takes {needed_gb:.2f} GB beside the model, but only {given_gb:.2f} GB are "
        f"allowed; give at least {needed_gb + 0.005:.2f}, or a smaller `width`",
        setting="kernel_memory_gb",
        value=given_gb,
    )
