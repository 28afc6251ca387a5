"""The template language, label words and demonstrations: from examples to token features."""
