"""The streaming server: exec, attach and port-forward begin here and go on in the sandbox's shim.

`tokens` keeps what the CRI calls have asked for; `server` speaks HTTP until the upgrade; `tls` its certificates;
`streams` joins them with containers and sandboxes. No byte of a session passes the daemon, but with TLS.
"""
