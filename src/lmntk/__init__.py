"""The empirical neural tangent kernel of language-model prompts, and what it predicts."""

__version__ = "0.1.0"
