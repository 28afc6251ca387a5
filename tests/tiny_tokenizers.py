"""Two small tokenizers, built from a word list: WordPiece as BERT has it, byte-level BPE as RoBERTa has it."""

import json
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

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


def make_gpt2_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The same as GPT-2 has it: one special token, for the beginning and the end; none for padding or a mask.

    Written to `folder` so that `AutoTokenizer.from_pretrained(folder)` loads it.
    """
    _write_bytes_and_merges(folder, ["<|endoftext|>"], [])
    return _load(folder, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False})


def _write_bytes_and_merges(folder: Path, first: list[str], last: list[str]) -> None:
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        for end in range(len(word)):
            merges["Ġ" + word[:end], word[end]] = None
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
