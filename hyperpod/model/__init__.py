"""Frozen records of the domain: what is asked for, what was decided, and what state it is in."""
