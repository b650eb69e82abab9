"""The caching stage: training examples become stored RapidGrads."""
