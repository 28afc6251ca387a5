"""Tiny random models of every supported architecture, in memory and as checkpoint folders."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from lmntk.models.attention import use_plain_attention
from lmntk.models.families import AUTO_CLASSES, family_of
from lmntk.models.heads import OneTokenClassifier, SequenceClassifier
from lmntk.models.lora import add_adapters
from lmntk.models.lora_files import LoraSettings
from lmntk.models.prompt_model import PromptModel
from lmntk.models.rms_norm import use_plain_rms_norms
from tiny_tokenizers import make_bert_tokenizer, make_gpt2_tokenizer, make_roberta_tokenizer

MASKED = ("bert", "roberta", "distilbert", "modernbert")
# Two of OPT: that with a projection of its word embeddings (as of 350 million parameters) has its norms behind.
CAUSAL = ("gpt2", "opt", "opt-projected", "llama", "qwen2", "qwen3")
ARCHITECTURES = MASKED + CAUSAL
# One of a kind: GPT-2's transposed layers, OPT's positions and biases, Llama's rotations, groups and RMSNorms.
TYPICAL_CAUSAL = ("gpt2", "opt", "llama")
TYPICAL = MASKED + TYPICAL_CAUSAL
# Not one parameter of theirs is a bias.
WITHOUT_BIASES = ("llama", "qwen3")
# ModernBERT's classifier looks at the first token or at the mean of all.
CLASSIFIERS = ("bert", "roberta", "distilbert", "modernbert-cls", "modernbert-mean", *TYPICAL_CAUSAL)
# Large enough for gradients of every size, so that float32 has something to lose.
INITIALIZER_RANGE = 0.15
LABEL_WORDS = (11, 7)
# What transformers offers beside our attention that takes its softmax in the model's own dtype.
OTHER_ATTENTION = {"bert": "eager", "roberta": "eager", "distilbert": "eager", "modernbert": "sdpa", "gpt2": "eager"}
OTHER_ATTENTION |= {"opt": "sdpa", "llama": "sdpa", "qwen2": "sdpa", "qwen3": "sdpa"}


def tiny_config(architecture: str, vocab_size: int = 64, pad_token_id: int = 0):
    """A configuration of two layers (three with ModernBERT's local attention) of 16 features."""
    common = {"vocab_size": vocab_size, "pad_token_id": pad_token_id, "initializer_range": INITIALIZER_RANGE}
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
    }
    special = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    if architecture == "bert":
        return BertConfig(**common, **shape)
    if architecture == "roberta":
        return RobertaConfig(**common, **{**shape, "max_position_embeddings": 300}, type_vocab_size=1)
    if architecture == "distilbert":
        return DistilBertConfig(**common, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=64)
    if architecture == "modernbert":
        return ModernBertConfig(
            **common, **{**shape, "num_hidden_layers": 3}, **special, local_attention=4, global_attn_every_n_layers=2
        )
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    if architecture == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 64}
        return GPT2Config(**common, **ends, **sizes)
    if architecture in ("opt", "opt-projected"):
        opt = {"ffn_dim": 24, **{name: size for name, size in shape.items() if name != "intermediate_size"}}
        common["init_std"] = common.pop("initializer_range")
        projected = {"word_embed_proj_dim": 8, "do_layer_norm_before": False} if "-" in architecture else {}
        return OPTConfig(**common, **ends, **opt, **projected)
    grouped = {**common, **ends, **shape, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-3}
    grouped["tie_word_embeddings"] = True  # as in the small ones of all three
    if architecture == "llama":
        return LlamaConfig(**grouped)
    if architecture == "qwen2":
        return Qwen2Config(**grouped)
    if architecture == "qwen3":
        return Qwen3Config(**grouped, head_dim=6)
    raise ValueError(architecture)


def tiny_lm(architecture: str, seed: int = 0, our_attention: bool = True) -> PreTrainedModel:
    """A random language model whose every parameter, biases included, is random."""
    torch.manual_seed(seed)
    config = tiny_config(architecture)
    config.tie_word_embeddings = False
    auto = AUTO_CLASSES[family_of(config)]
    lm = auto.from_config(config, attn_implementation=OTHER_ATTENTION[config.model_type]).eval()
    use_plain_rms_norms(lm)
    if our_attention:
        use_plain_attention(lm)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(INITIALIZER_RANGE * torch.randn_like(parameter))
    return lm


def tiny_prompt_model(
    architecture: str,
    dtype: torch.dtype = torch.float64,
    binary: bool = False,
    seed: int = 0,
    our_attention: bool = True,
) -> PromptModel:
    """A prompt model over `tiny_lm`, two label words."""
    return PromptModel(tiny_lm(architecture, seed, our_attention).to(dtype), LABEL_WORDS, binary)


def tiny_prompts(lengths: list[int], seed: int = 0, vocab_size: int = 64) -> list[dict[str, torch.Tensor]]:
    """Random prompts of one example each; few tokens to choose from, so that they repeat within and across."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for length in lengths:
        ids = torch.randint(5, min(20, vocab_size), (1, length), generator=generator)
        position = torch.randint(0, length, (1,), generator=generator)
        ids[0, position] = 4
        prompts.append({"input_ids": ids, "mask_pos": position})
    return prompts


def ending(prompts: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The examples of `tiny_prompts` as causal models take them: it is the last position that predicts."""
    last = [torch.tensor([prompt["input_ids"].shape[1] - 1]) for prompt in prompts]
    return [{**prompt, "mask_pos": position} for prompt, position in zip(prompts, last, strict=True)]


def prompts_for(architecture: str, lengths: list[int], seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """The examples of `tiny_prompts` as an architecture takes them."""
    prompts = tiny_prompts(lengths, seed)
    return ending(prompts) if architecture in CAUSAL else prompts


class PaddedPrompts:
    """The prompts of `tiny_prompts` as engines take them: batches of mixed lengths are padded, mostly on the right."""

    padded = True
    equal_lengths = False
    PADDING = 0

    def __init__(self, prompts: Sequence[dict[str, torch.Tensor]], side: str = "right") -> None:
        self.prompts = prompts
        self.side = side
        self.shapes = [prompt["input_ids"].shape[1] for prompt in prompts]

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        ids = [self.prompts[index]["input_ids"][0] for index in indices]
        batch = {
            "input_ids": pad_sequence(ids, True, self.PADDING, self.side),
            "mask_pos": torch.cat([self.prompts[index]["mask_pos"] for index in indices]),
        }
        if len(set(map(len, ids))) > 1:
            batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], True, 0, self.side)
            if self.side == "left":
                batch["mask_pos"] = batch["mask_pos"] + (batch["attention_mask"] == 0).sum(dim=1)
        return batch


def save_tiny_checkpoint(architecture: str, folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint as people have it: decoder tied and not stored, tokenizer beside it."""
    if architecture in CAUSAL:
        tokenizer = make_gpt2_tokenizer(folder)
    else:
        wordpiece = architecture in ("bert", "distilbert")
        tokenizer = (make_bert_tokenizer if wordpiece else make_roberta_tokenizer)(folder)
    torch.manual_seed(seed)
    config = tiny_config(architecture, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    lm = AUTO_CLASSES[family_of(config)].from_config(config).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(INITIALIZER_RANGE * torch.randn_like(parameter))
    lm.save_pretrained(folder)
    return folder


def add_noise(module: torch.nn.Module, seed: int = 0) -> None:
    """Make every parameter random, biases and what starts at zero included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(INITIALIZER_RANGE * torch.randn(parameter.shape, generator=generator).to(parameter))


def tiny_classification_config(family: str, num_labels: int = 2):
    """The configuration of one of `CLASSIFIERS` with a head for some classes."""
    architecture, _, pooling = family.partition("-") if family.startswith("modernbert") else (family, "", "")
    config = tiny_config(architecture)
    config.num_labels = num_labels
    if pooling:
        config.classifier_pooling = pooling
    return config


def tiny_classifier(
    family: str,
    first_token: bool = False,
    dtype: torch.dtype = torch.float64,
    binary: bool = False,
    num_labels: int = 2,
    seed: int = 0,
    our_attention: bool = True,
) -> SequenceClassifier | OneTokenClassifier:
    """A classifier of one of `CLASSIFIERS` whose every parameter, its head's included, is random."""
    torch.manual_seed(seed)
    config = tiny_classification_config(family, num_labels)
    attention = OTHER_ATTENTION[config.model_type]
    if first_token:
        lm = AUTO_CLASSES[family_of(config)].from_config(config, attn_implementation=attention).base_model
    else:
        lm = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    use_plain_rms_norms(lm)
    if our_attention:
        use_plain_attention(lm)
    lm = lm.eval().to(dtype)
    model = OneTokenClassifier(lm, num_labels, binary) if first_token else SequenceClassifier(lm, binary)
    add_noise(model, seed)
    return model.to(dtype).eval()


def save_tiny_classification_checkpoint(family: str, folder: Path, num_labels: int = 2, seed: int = 0) -> Path:
    """Write a checkpoint of transformers' own classifier of one of `CLASSIFIERS`, without a tokenizer."""
    torch.manual_seed(seed)
    lm = AutoModelForSequenceClassification.from_config(tiny_classification_config(family, num_labels))
    add_noise(lm, seed)
    lm.save_pretrained(folder)
    return folder


def has_noise_for_a_gradient(name: str) -> bool:
    """Whether a parameter is a key's bias: it moves all attention scores of a query alike, which softmax does not see.

    Its gradient is zero, and its sign rounding's. In GPT-2 queries' and values' biases are one vector with it; Qwen2's
    is rotated by position, and so is real.
    """
    of_opt = ".decoder." in name and name.endswith("k_proj.bias")
    return of_opt or name.endswith(("key.bias", "k_lin.bias", "c_attn.bias"))


def classified(prompts: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The examples of `tiny_prompts` as classifiers take them: it is the first position that predicts."""
    return [{**prompt, "mask_pos": torch.zeros_like(prompt["mask_pos"])} for prompt in prompts]


def texts_for(family: str, lengths: list[int], seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """The examples of `tiny_prompts` as the classifiers of an architecture take them."""
    prompts = tiny_prompts(lengths, seed)
    return ending(prompts) if family in CAUSAL else classified(prompts)


def tiny_adapted_prompt_model(
    architecture: str, settings: LoraSettings, binary: bool = False, at_start: bool = False, seed: int = 0
) -> PromptModel:
    """A prompt model over `tiny_lm` with LoRA adapters, float64: all random, or B zero as it is at the start."""
    lm = tiny_lm(architecture, seed)
    add_adapters(lm, settings)
    if not at_start:
        randomise_adapters(lm, seed)
    return PromptModel(lm.double(), LABEL_WORDS, binary).eval()


def randomise_adapters(module: torch.nn.Module, seed: int = 0) -> None:
    """Draw the matrices B of LoRA adapters, which are zero at the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(INITIALIZER_RANGE * drawn)
