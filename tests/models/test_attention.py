"""The attention that takes the place of transformers' own: what architectures ask of it beside the usual."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config

from lmntk.models.attention import plain_attention, use_plain_attention


def test_scores_are_capped_as_gemma_2_has_them():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24, attn_logit_softcapping=0.5, initializer_range=0.5, query_pre_attn_scalar=8,
    )  # fmt: skip
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(5, 60, (2, 9))
    with torch.no_grad():
        theirs = lm(input_ids=ids).logits
        use_plain_attention(lm)
        ours = lm(input_ids=ids).logits
        lm.config.attn_logit_softcapping = None
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_a_score_for_no_token_takes_its_share_of_the_attention(key_heads):
    """Of GPT-OSS: exp(s) stands in the sum below the line only."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, 5, 3, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(2, key_heads, 5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    sink = torch.randn(4, generator=generator, dtype=torch.float64)
    mixed, weights = plain_attention(nn.Identity().eval(), query, key, value, None, scaling=0.7, s_aux=sink)
    for head in range(4):
        of_key = head // (4 // key_heads)
        scores = 0.7 * query[:, head] @ key[:, of_key].transpose(1, 2)
        expected = scores.exp() / (scores.exp().sum(-1, keepdim=True) + sink[head].exp())
        torch.testing.assert_close(weights[:, head], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mixed[:, :, head], expected @ value[:, of_key], rtol=1e-12, atol=1e-12)
