"""The `beaker` command. Runs on Python 3.9 with the standard library alone, and imports only what one command needs."""
