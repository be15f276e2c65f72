"""A mount beside the guest's own disk, in one run: the same commands on both, in turn, medians of the rounds."""

from __future__ import annotations
