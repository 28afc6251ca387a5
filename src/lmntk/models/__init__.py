"""Language models behind one interface: `logits(features) -> [B, C]` at one position of the sequence."""
