"""`python -m beaker_sessions.cli`."""

from .main import main

main()
