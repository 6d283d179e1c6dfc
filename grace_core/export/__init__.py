"""Releases: trained checkpoints written as others load them, and the proof that nothing changed."""
