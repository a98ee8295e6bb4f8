"""The driver for Docker Engine, over its HTTP API."""
