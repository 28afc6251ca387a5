"""Where a model comes from: a checkpoint by name or folder, a GGUF file, or LoRA adapters that name their model."""

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lmntk.errors import ModelError, SettingError
from lmntk.models.families import is_causal, vocabulary_size
from lmntk.models.gguf import converted
from lmntk.models.lora_files import CONFIG_FILE, LoraSettings, stored_adapters
from lmntk.models.pretrained import load_config, load_tokenizer

GGUF_CACHE = "converted-models"


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint, its tokenizer, and the adapters on it.

    Attributes:
        weights: The checkpoint's name on the hub, or its folder.
        tokenizer: The tokenizer's name on the hub, or its folder.
        lora: The adapters, new or stored; None for a model without adapters.
    """

    weights: str
    tokenizer: str
    lora: LoraSettings | None = None

    @property
    def adapters(self) -> Path | None:
        """The folder of stored adapters; None where there are none, or new ones."""
        return None if self.lora is None else self.lora.folder


def find_source(
    name_or_path: str,
    new_adapters: LoraSettings | None = None,
    lora_r: int | None = None,
    lora_alpha: float | None = None,
) -> ModelSource:
    """Find out what a name stands for: a checkpoint, or a folder of LoRA adapters that name their checkpoint.

    Args:
        name_or_path: A name on the hub or a local folder.
        new_adapters: The adapters to put on a checkpoint; None leaves LoRA out.
        lora_r: The rank that stored adapters must have; None accepts any.
        lora_alpha: The scale that stored adapters must have; None accepts any.

    Raises:
        ModelError: The folder holds adapters that LoRA is not asked for, or their checkpoint is not there.
        SettingError: The rank or scale of stored adapters is another one.

    Examples:
        >>> find_source("roberta-base")
        ModelSource(weights='roberta-base', tokenizer='roberta-base', lora=None)
    """
    stored = stored_adapters(Path(name_or_path))
    if stored is None:
        return ModelSource(name_or_path, name_or_path, new_adapters)
    adapters, base = stored
    if new_adapters is None:
        raise ModelError(
            f"`model_name_or_path={name_or_path}` holds LoRA adapters for '{base}': add `apply_lora=True` to use them",
            path=name_or_path,
        )
    for setting, value, own in (("lora_r", lora_r, adapters.rank), ("lora_alpha", lora_alpha, adapters.alpha)):
        if value is not None and value != own:
            raise SettingError(
                f"`{setting}` is {value}, but the adapters in {name_or_path} have {own}: leave it out",
                setting=setting,
                value=value,
            )
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ModelError(
            f"`model_name_or_path={name_or_path}` holds LoRA adapters for the model in {base}, which is not there: "
            f"bring it back, or write its new place as base_model_name_or_path into {Path(name_or_path) / CONFIG_FILE}",
            path=base,
        )
    has_tokenizer = (Path(name_or_path) / "tokenizer_config.json").is_file()
    return ModelSource(base, name_or_path if has_tokenizer else base, adapters)


def converted_source(source: ModelSource, gguf_file: str, cache: Path, downloads: str | None = None) -> ModelSource:
    """Return the source of a GGUF file's model, which is converted to a checkpoint on its first use.

    Args:
        source: The folder or name on the hub where the file is.
        gguf_file: The file's name.
        cache: The folder in which converted models are kept.
        downloads: The folder for downloads; None leaves the choice to transformers.

    Raises:
        UsageError: The source is a folder of adapters; or see `models.gguf.converted`.
    """
    if source.adapters is not None:
        raise ModelError(
            f"`gguf_file`: {source.adapters} holds LoRA adapters, which name their own model ({source.weights}): "
            "leave it out",
            path=source.adapters,
        )
    folder = str(converted(source.weights, gguf_file, cache, downloads))
    return replace(source, weights=folder, tokenizer=folder)


def load_config_and_tokenizer(
    source: ModelSource,
    *,
    config_name: str | None = None,
    tokenizer_name: str | None = None,
    family: str | None = None,
    fills_masks: bool = True,
    cache_dir: str | None = None,
    local_only: bool = False,
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Load what prompts are made with.

    Args:
        source: Where the model comes from.
        config_name: Another name or folder for the configuration.
        tokenizer_name: Another name or folder for the tokenizer.
        family: ``"masked"`` or ``"causal"``; None leaves the choice to the configuration.
        fills_masks: Whether a masked model is asked about a mask, for which its tokenizer needs a token.
        cache_dir: The folder for downloads; None leaves the choice to transformers.
        local_only: Download nothing.

    Raises:
        UsageError: See `load_config` and `load_tokenizer`.
    """
    config = load_config(config_name or source.weights, cache_dir, family, local_only=local_only)
    tokenizer = load_tokenizer(
        tokenizer_name or source.tokenizer,
        cache_dir,
        needs_mask=fills_masks and not is_causal(config),
        model_size=vocabulary_size(config),
        local_only=local_only,
    )
    return config, tokenizer
