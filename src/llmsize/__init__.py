"""Memory, compute, time and loss of large language models, before anything is rented."""

__version__ = "0.1.0"
