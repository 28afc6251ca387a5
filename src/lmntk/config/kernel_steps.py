"""The steps of a training at which snapshots are written: ``0,1,2,5,10,last``."""

from dataclasses import dataclass

from lmntk.errors import SettingError

LAST = "last"


@dataclass(frozen=True)
class KernelSteps:
    """The steps at which a training writes snapshots.

    Attributes:
        numbers: Numbers of optimizer steps, 0 for the start.
        last: Whether the model that the run evaluates gets a snapshot too.
    """

    numbers: frozenset[int]
    last: bool

    @classmethod
    def parse(cls, text: str) -> "KernelSteps":
        """Read a list without spaces.

        Raises:
            SettingError: An entry is neither a whole number from 0 nor ``last``.

        Example:
            >>> KernelSteps.parse("0,5,last")
            KernelSteps(numbers=frozenset({0, 5}), last=True)
        """
        entries = [entry.strip() for entry in text.split(",")]
        for entry in entries:
            if entry != LAST and not (entry.isascii() and entry.isdigit()):
                raise SettingError(
                    f"`kernel_steps={text}` is not a list of steps ('{entry}'): give whole numbers from 0, and last, "
                    "without spaces between them, such as 0,1,2,5,10,last",
                    setting="kernel_steps",
                    value=text,
                )
        return cls(frozenset(int(entry) for entry in entries if entry != LAST), LAST in entries)

    def at(self, step: int, last_step: int) -> bool:
        """Return whether a step is wanted in a training of `last_step` steps."""
        return step in self.numbers or (self.last and step == last_step)
