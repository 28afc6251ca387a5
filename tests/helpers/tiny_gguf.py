"""Tiny GGUF files, written as llama.cpp writes them: with the rows of queries and keys in its own order."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from tiny_tokenizers import make_gpt2_tokenizer

# Blocks of quantised numbers are of 32, so that rows must be.
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def random_lm(
    config_class: type[PretrainedConfig] = LlamaConfig, tied: bool = True, **rotations: object
) -> PreTrainedModel:
    """A model of grouped queries whose every weight is random; positions are rotated as `rotations` say."""
    torch.manual_seed(0)
    special = {"vocab_size": 528, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": tied}
    config = config_class(**SHAPE, **HEADS, **special, rms_norm_eps=2**-10, **{"rope_theta": 5000.0, **rotations})
    lm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return lm


def in_order_of_llama_cpp(name: str, weight: np.ndarray) -> np.ndarray:
    """A Llama's queries and keys with the two halves of each head interleaved: llama.cpp rotates neighbours."""
    of_queries, of_keys = (f"{letter}_proj" in name for letter in "qk")
    if not (of_queries or of_keys):
        return weight
    heads = HEADS["num_attention_heads" if of_queries else "num_key_value_heads"]
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind = Kind.F32,
    leave_out: Iterable[str] = (),
    also: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> Path:
    """Write a model of `random_lm` with a byte-level tokenizer; its matrices in a format, the rest in float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    config = lm.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_tokenizer(writer, tokenizer)
    also(writer)
    architecture = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    absent = {*leave_out, *(["lm_head.weight"] if config.tie_word_embeddings else [])}
    for name, tensor in lm.state_dict().items():
        if name not in absent:
            weight = in_order_of_llama_cpp(name, tensor.numpy()) if config.model_type == "llama" else tensor.numpy()
            own = kind if weight.ndim == 2 else Kind.F32
            stored_as = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(stored_as, gguf.quants.quantize(np.ascontiguousarray(weight), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in tokenizer.all_special_tokens else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)


@dataclass(frozen=True)
class Made:
    """A folder of GGUF files, and the model and tokenizer that they were made of."""

    folder: Path
    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def make_gguf_files(folder: Path) -> Made:
    """Write a model's weights as they are, and quantised in two ways."""
    made = Made(folder / "files", random_lm(), make_gpt2_tokenizer(folder / "tokenizer"))
    assert len(made.tokenizer) == made.lm.config.vocab_size
    for kind in (Kind.F32, Kind.Q8_0, Kind.Q4_1):
        write_gguf(made.folder / f"tiny-{kind.name}.gguf", made.lm, made.tokenizer, kind)
    return made
