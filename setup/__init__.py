"""Brings this machine to a session: `python3 -m setup`, called by the Makefile.

Owns: installing, starting, stopping and removing the parts on one machine. It runs before anything is installed, so it
is the standard library alone, and it must not import what it installs.
"""
