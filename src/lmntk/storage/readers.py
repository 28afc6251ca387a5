"""Reading JSON and NumPy files that others may have written, without executing anything in them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

DEEPEST_JSON = 20


def read_json(path: Path) -> Any:
    """Read a JSON file that anybody may have written.

    Raises:
        OSError: The file system refuses.
        ValueError: It is no JSON in UTF-8, holds text that is no Unicode, or is nested too deep to be worked with.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair could not be printed
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not _nested_at_most(content, DEEPEST_JSON):
        raise ValueError("it is nested too deep")
    return content


def _nested_at_most(content: Any, levels: int) -> bool:
    if not isinstance(content, dict | list):
        return True
    items = content.values() if isinstance(content, dict) else content
    return levels > 0 and all(_nested_at_most(item, levels - 1) for item in items)


def read_npy(path: Path) -> np.ndarray:
    """Read a ``.npy`` file that anybody may have written.

    Raises:
        OSError: The file system refuses.
        ValueError: It is damaged, holds objects, or says of itself what its bytes are not.
    """
    with path.open("rb") as file:
        try:
            return np.lib.format.read_array(file, allow_pickle=False)
        except OSError:
            raise
        # numpy parses the header as Python: damage makes it raise anything from TokenError to OverflowError.
        except Exception as error:
            raise ValueError("it is damaged, or no plain array of numpy") from error
