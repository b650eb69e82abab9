"""The language model: its files, loading, generation and fine-tuning."""
