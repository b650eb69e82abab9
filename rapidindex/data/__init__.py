"""Training data: files, examples, templates and tokens. Knows no models."""
