"""The host's side of a sandbox's virtio-fs share: its virtiofsd, and the folders and files put into it.

`<run_dir>/m/<12 digits>/`, root's alone:

    fs.sock   what QEMU connects to, owned by the sandbox's user
    pid       of virtiofsd, and when it began
    log       a FIFO that holds virtiofsd's last words: bounded, whatever a guest makes it say
    share/    empty folders and files as mount points

The mounts themselves are in virtiofsd's own mount namespace and nowhere else. So nothing of a tenant is mounted on
the host, no rmdir of the host finds a mount point busy, no clean-up can reach a tenant's files, and the kernel
unmounts all when virtiofsd ends, however it ends. Removing a mount point on the host unmounts what lies on it.
"""
