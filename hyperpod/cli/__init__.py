"""The `hyperpod` command."""
