"""Files: where they lie, how they are written, and who may use them."""
