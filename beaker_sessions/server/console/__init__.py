"""The console: pages of the server for people, made from the same service as the REST API."""
