"""The demo: a small model, data with planted errors, and the question that finds them."""
