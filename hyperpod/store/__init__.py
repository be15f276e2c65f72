"""Durable records below the state folder (DESIGN section 8)."""
