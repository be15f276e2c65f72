"""Streams between host and guest: the kernel's vhost-vsock where it exists, else a vhost-user device of ours.

`device.VsockDevice` is the device, made of: `frontend` (QEMU's side: messages, memory, rings), `switch` (the
data path), `connection` (one host client), `journal` (what a successor must reset). `dial` is how everybody
else connects; `kernel` tells whether the kernel can do it.
"""
