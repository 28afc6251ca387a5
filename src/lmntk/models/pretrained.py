"""What a checkpoint holds besides weights: its configuration and its tokenizer."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from lmntk.errors import ModelError, as_usage_error
from lmntk.models.families import choose_family
from lmntk.models.gguf import files_in
from lmntk.models.lora_files import CONFIG_FILE
from lmntk.models.vocabulary import check_vocabulary


def load_config(
    name_or_path: str, cache_dir: str | None = None, family: str | None = None, *, local_only: bool = False
) -> PretrainedConfig:
    """Load the configuration of a checkpoint; from then on it says of which family the model is.

    Args:
        name_or_path: A name on the hub or a local folder.
        cache_dir: The folder for downloads; None leaves the choice to transformers.
        family: ``"masked"`` or ``"causal"``; None leaves the choice to the configuration.
        local_only: Download nothing.

    Raises:
        ModelError: There is no configuration, or transformers has no such language model of its architecture.
    """
    with reading(name_or_path, "model_name_or_path", "a model"):
        config = AutoConfig.from_pretrained(name_or_path, cache_dir=cache_dir, local_files_only=local_only)
    choose_family(config, family)
    return config


def load_tokenizer(
    name_or_path: str,
    cache_dir: str | None = None,
    needs_mask: bool = True,
    model_size: int = 0,
    *,
    local_only: bool = False,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint.

    Args:
        name_or_path: A name on the hub or a local folder.
        cache_dir: The folder for downloads; None leaves the choice to transformers.
        needs_mask: Whether the prompts have a mask.
        model_size: The number of tokens that the model knows.
        local_only: Download nothing.

    Raises:
        ModelError: There is no tokenizer, it lacks a mask token that it needs, or two of its tokens have one id.
    """
    kept = _kept.get(name_or_path)
    if kept is not None and kept.files == _files_in(name_or_path):
        tokenizer = kept.tokenizer
    else:
        with reading(name_or_path, "tokenizer_name", "a tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, cache_dir=cache_dir, local_files_only=local_only)
    check_tokenizer(tokenizer, name_or_path, needs_mask, model_size)
    return tokenizer


class _Kept(NamedTuple):
    """A tokenizer, and the state of the files that it was loaded from."""

    tokenizer: PreTrainedTokenizerBase
    files: object


_kept: dict[str, _Kept] = {}


def keep_tokenizer(folder: str) -> None:
    """Load the tokenizer of a local folder for those that call `load_tokenizer` later, until a file of it changes.

    They share it, so only a process that forks for each of them should keep one.

    Raises:
        ModelError: See `check_tokenizer`.
    """
    files = _files_in(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer, folder, needs_mask=False)
    _kept[folder] = _Kept(tokenizer, files)


def _files_in(folder: str) -> object:
    found = [(path.resolve(), path.stat()) for path in Path(folder).glob("*")]
    return sorted((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in found)


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, name_or_path: str, needs_mask: bool = True, model_size: int = 0
) -> None:
    """Check that a tokenizer can make prompts; the arguments are those of `load_tokenizer`.

    Raises:
        ModelError: It has no vocabulary, lacks a mask token that it needs, or two of its tokens have one id.
    """
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(
            f"'{name_or_path}' holds no vocabulary of a tokenizer; copy the tokenizer's files there, or name another "
            "folder with `tokenizer_name`",
            path=name_or_path,
        )
    if needs_mask and tokenizer.mask_token_id is None:
        raise ModelError(
            f"the tokenizer of '{name_or_path}' has no mask token, which the prompts of a masked language model need: "
            "name another with `tokenizer_name`, or another model with `model_name_or_path`",
            path=name_or_path,
        )
    check_vocabulary(tokenizer, name_or_path, model_size)


def reading(name_or_path: str, setting: str, what: str) -> AbstractContextManager[None]:
    """Turn what transformers raises while it reads a checkpoint into one sentence that says what the name stands for.

    Args:
        name_or_path: The name that transformers was given.
        setting: The setting that holds the name.
        what: What is read: ``"a model"``, ``"a tokenizer"``, ``"weights"``.
    """

    def describe(reason: str) -> ModelError:
        path = Path(name_or_path)
        if path.is_dir():
            cause = f"the folder '{name_or_path}' holds no {what.removeprefix('a ')} that can be loaded ({reason})"
            if adapters := sorted(place.parent.name for place in path.glob(f"*/{CONFIG_FILE}")):
                cause += f"; it holds folders of adapters: name one of {', '.join(adapters)}"
            if found := files_in(path):
                cause += f"; it holds GGUF files: name one of them as `gguf_file`: {', '.join(found)}"
        elif path.is_file():
            cause = f"'{name_or_path}' is a file: name the folder it is in"
            cause += f", and `gguf_file={path.name}`" if path.suffix == ".gguf" else ""
        else:
            cause = f"'{name_or_path}' is not a local folder, and the hub did not give {what} of that name ({reason})"
        return ModelError(f"`{setting}`: {cause}", path=name_or_path)

    return as_usage_error(describe)
