"""Exec, attach and port-forward: a client's socket on one side, the agent's stdio port on the other.

`command` and `forward` are the sessions; `socket` is a stream socket with back-pressure and without copies;
`stdin` and `tap` bring a process's streams to and from a session, `port` those of a port of the pod, `direct` what
an agent on this host hands over; `spec` is what the daemon asks for.
"""
