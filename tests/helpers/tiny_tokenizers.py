"""Small tokenizers, built from a word list: WordPiece as BERT has it, BPE as RoBERTa, GPT-2, Qwen and Llama have it."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

LABEL_WORDS = (
    "terrible bad okay good great subjective objective incorrect correct No Yes Maybe world sports business tech "
    "Description Entity Expression Human Location Number"
)
OTHER_WORDS = (
    "It was This is article about news the a an and of to in not very but with for film movie story actor plot "
    "funny boring moving dull bright slow he she they who what where how many people city year country won said "
    "never always nothing much more"
)
WORDS = f"{LABEL_WORDS} {OTHER_WORDS}".split()


def make_bert_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A lower-casing WordPiece tokenizer; known words are one token, others come in characters.

    Written to `folder` so that `AutoTokenizer.from_pretrained(folder)` loads it.
    """
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = ["##" + character for character in characters if character.isalnum()]
    words = dict.fromkeys(word.lower() for word in WORDS if len(word) > 1)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *pieces, *words]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return _load(folder, {"tokenizer_class": "BertTokenizer", "do_lower_case": True})


def make_roberta_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer; known words are one token after a space, everything else comes in bytes.

    Merges grow each word from its space to the right (Ġ t, Ġt e, Ġte r, …): as every merge starts at a space, no two
    of them compete, and a word outside the list is cut after its longest prefix in it.

    Written to `folder` so that `AutoTokenizer.from_pretrained(folder)` loads it.
    """
    _write_bytes_and_merges(folder, ["<s>", "<pad>", "</s>", "<unk>"], ["<mask>"])
    return _load(folder, {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": False})


def make_gpt2_tokenizer(folder: Path, *bare: str) -> PreTrainedTokenizerBase:
    """The same as GPT-2 has it: one special token, for the beginning and the end; none for padding or a mask.

    Args:
        folder: Written to so that `AutoTokenizer.from_pretrained(folder)` loads it.
        *bare: Words that are one token where no space is before them.
    """
    _write_bytes_and_merges(folder, ["<|endoftext|>"], [], bare)
    return _load(folder, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False})


def make_qwen_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The same as Qwen has it: no token for the beginning.

    Written to `folder` so that `AutoTokenizer.from_pretrained(folder)` loads it.
    """
    _write_bytes_and_merges(folder, ["<|endoftext|>"], [])
    end = "<|endoftext|>"
    return _load(folder, {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": end, "pad_token": end})


def make_llama_tokenizer(folder: Path, always_adds_space: bool = True) -> PreTrainedTokenizerBase:
    """A SentencePiece-like BPE tokenizer, as Llama 2 has it: known words are one token, others come in characters.

    Args:
        folder: Written to so that `AutoTokenizer.from_pretrained(folder)` loads it.
        always_adds_space: Put a space in front of a text that begins with one too, as SentencePiece does; transformers'
            own class for Llama does not.
    """
    merges = _merges("▁")
    characters = ["▁", *(chr(code) for code in range(33, 127))]
    tokens = ["<unk>", "<s>", "</s>", *characters, *map("".join, merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if always_adds_space:
        backend = Tokenizer(BPE(vocabulary, list(merges), unk_token="<unk>", fuse_unk=True))
        backend.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
        backend.decoder = Metaspace()
        PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **special).save_pretrained(folder)
    else:
        LlamaTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=512).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _merges(space: str) -> dict[tuple[str, str], None]:
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        for end in range(len(word)):
            merges[space + word[:end], word[end]] = None
    return merges


def _write_bytes_and_merges(folder: Path, first: list[str], last: list[str], bare: Iterable[str] = ()) -> None:
    merges = _merges("Ġ")
    for word in bare:
        spelled = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)[0][0]
        for end in range(1, len(spelled)):
            merges[spelled[:end], spelled[end]] = None
    tokens = [*first, *sorted(ByteLevel.alphabet()), *map("".join, merges), *last]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _load(folder: Path, config: dict[str, object]) -> PreTrainedTokenizerBase:
    config = {"model_max_length": 512, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer
