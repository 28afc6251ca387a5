"""Numbers as people read them: how many things, how long, how many bytes."""


def quantity(number: int, noun: str, separator: str = ",") -> str:
    """Write a number of things.

    Args:
        number: How many there are.
        noun: What they are, in the singular.
        separator: ``","`` or ``""``, what separates thousands.

    Returns:
        The number and the noun in singular or plural.

    Examples:
        >>> quantity(1, "run"), quantity(1200, "run")
        ('1 run', '1,200 runs')
    """
    return f"{number:{separator}} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Write a number of seconds in seconds, minutes or hours.

    Examples:
        >>> duration(4.26), duration(80), duration(100), duration(7200)
        ('4.3 s', '80 s', '1.7 min', '2.0 h')
    """
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def data_size(size: int) -> str:
    """Write a number of bytes in decimal units, as disks and downloads are measured.

    Examples:
        >>> data_size(500), data_size(1_300_000_000)
        ('500 bytes', '1.3 GB')
    """
    for exponent, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if size >= 1000**exponent:
            return f"{size / 1000**exponent:.1f} {unit}"
    return f"{size} bytes"
