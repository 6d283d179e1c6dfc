"""What a response says: one reader for each kind of answer, and the benchmarks' own."""
