"""Handing releases over: to a directory, or to the Hugging Face Hub. Whole, or not at all."""
