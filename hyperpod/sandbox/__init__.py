"""Sandboxes: places where an agent runs. Today a virtual machine (DESIGN section 1)."""
