"""The page and the pictures of `tools/report.py`."""
