"""The daemon's side of a shim's control socket."""
