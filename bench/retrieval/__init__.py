"""Is retrieval as a vector search far ahead of scanning, and does it find the same? See `__main__.py`."""
