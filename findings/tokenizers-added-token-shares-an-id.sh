#!/usr/bin/env bash
# tokenizers 0.23: the id of a special token that is added to a vocabulary whose ids have a gap.
#
# Expected: an id that no other token has, or an error.
# Found:    the new token gets the number of tokens as its id, also where another token has that id already. Both tokens
#           then encode to one id, and decoding gives the added one.
# Effect:   a masked language model is asked at a word that is not its mask, and every prediction is wrong in silence.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.1
"$place/venv/bin/python" - <<'PY'
import sys

import tokenizers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

print("tokenizers", tokenizers.__version__)
tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "bad": 1, "good": 3}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = WhitespaceSplit()
added = tokenizer.add_special_tokens(["[MASK]"])
ids = {token: tokenizer.token_to_id(token) for token in ("[UNK]", "bad", "good", "[MASK]")}
print("tokens added:", added, "ids:", ids)
print("'good [MASK]' is encoded as", tokenizer.encode("good [MASK]").ids)
print("id 3 is decoded as", repr(tokenizer.decode([3], skip_special_tokens=False)))
as_described = added == 1 and ids["good"] == ids["[MASK]"] == 3 and tokenizer.encode("good [MASK]").ids == [3, 3]
sys.exit(0 if as_described else "an added token no longer shares an id with another one")
PY
