"""Beaker Sessions: interactive, GPU-claiming container sandboxes on shared machines.

This module imports nothing: the `beaker` command's start-up time is part of the product.
"""

__version__ = "0.1.0"
