"""virtio-vsock without input or output: packets, streams with credit, split virtqueues, vhost-user messages.

Everything here reads what a hostile guest (rings, packets) or a compromised QEMU (messages) wrote. Each value
is copied out of shared memory once and checked before use; a violation raises `ProtocolError` and nothing
else.
"""
