"""The process beside each sandbox: vsock device, CRI logs, relays, console (DESIGN section 2).

`main` puts it together; `control` is what the daemon says to it; `logs`, `stream` and `logfile` bring a
container's output to its log exactly once; `collect` relays an exec's output; `fdstore` gives the supervisor
what a successor needs. `packets`, `channel` and `caller` are the control sockets' transport, which the clients
of shim and supervisor use as well.
"""
