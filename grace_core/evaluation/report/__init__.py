"""Recorded evaluations side by side: numbers, differences, worst items; as page and text."""
