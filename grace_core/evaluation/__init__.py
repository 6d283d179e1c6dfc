"""Scoring models on benchmarks: questions in, generated answers, letters read, table out."""
