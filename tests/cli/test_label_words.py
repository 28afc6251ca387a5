"""The kernel's description shows which form of a label word was looked up."""

import json
from pathlib import Path

from command_line import Workplace
from tiny_tokenizers import make_roberta_tokenizer


def test_the_description_of_a_kernel_shows_which_form_was_taken(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    outcome = place.call(place.argv("--mapping", "{'0': '-b', '1': 'q'}", "--no_predict"))
    assert (outcome.status, outcome.err) == (0, "")
    assert "no token of this model: 'q'; the others have one" in outcome.messages
    description = json.loads((tmp_path / "out" / "dev_kernels_sst-2.json").read_text(encoding="utf-8"))
    tokenizer = make_roberta_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.convert_ids_to_tokens(description["label_word_ids"]) == ["b", "q"]
