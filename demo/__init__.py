"""What `make demo` and `make ui` run: the local servers, one pipeline run, and its progress."""
