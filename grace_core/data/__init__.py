"""Data: from annotations and pictures to packed rows of tokens."""
