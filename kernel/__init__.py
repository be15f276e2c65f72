"""Building the guest kernels."""
