"""The host's side of the agent API: plain dataclasses in and out, hyperpod errors, everything bounded."""
