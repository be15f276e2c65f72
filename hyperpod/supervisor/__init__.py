"""The parent of everything that outlives the daemon (DESIGN section 2).

`main` is what `hyperpod serve` runs. `loop` turns a selector into callbacks and timers, single-threaded, so that
forking is safe. `daemon` keeps the daemon running, `shims` the shims and their descriptors (`store`), `server`
answers daemon and shims. `client` is the daemon's side. It parses nothing that a guest made. `nursery` is the line
to a second process, `forks`, that shims and host agents are forked from; `children` is what those do first.
"""
