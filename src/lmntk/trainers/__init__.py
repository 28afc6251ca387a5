"""Trainers: each a thin `transformers.Trainer` that turns features into predictions."""
