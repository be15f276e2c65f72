"""A pod's network namespace, the CNI plugins that fill it, and the taps that join a VM to it."""
