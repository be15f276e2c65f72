"""The Container Runtime Interface over the managers: validation, conversion, filters. No state of its own."""
