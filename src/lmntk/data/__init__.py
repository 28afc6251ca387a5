"""Tasks and their examples, k-shot splits and metrics: no torch."""
