"""hyperpod: a Kubernetes CRI runtime with a virtual machine per pod."""

__version__ = "0.1.0"
