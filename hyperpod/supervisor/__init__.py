"""The parent of everything that outlives the daemon (DESIGN section 2).

`main` is what `hyperpod serve` runs. `loop` turns a selector into callbacks and timers, single-threaded, so that
forking is safe. `daemon` keeps the daemon running, `shims` forks the shims and keeps their descriptors (`store`),
`server` answers daemon and shims. `client` is the daemon's side. It parses nothing that a guest made.
"""
