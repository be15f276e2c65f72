"""Containers of all sandboxes; the same code for every place where an agent runs."""
