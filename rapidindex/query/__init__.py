"""The retrieval stage: a question becomes ranked training examples and heat-maps."""
