"""Per-example gradients and RapidGrads. Arrays in, arrays out: knows no store and no data files."""
