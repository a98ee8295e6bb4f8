"""`login`: from a terminal to the console in a browser, without showing the token to anybody."""

from __future__ import annotations

from . import config, output, rest
from .args import Options, command


@command("")
def login(options: Options) -> int:
    """The link works once and for minutes, so that a look over one's shoulder or a shell's history opens nothing."""
    settings = config.load()
    server = rest.client(settings)
    link = server.create_link()
    server.close()
    address = settings.address.rstrip("/") + link["path"]
    if options.json:
        output.json({"url": address, "expiry": link["expiry"]})
        return 0
    if not options.quiet:
        output.say("Open this link in your browser within 5 minutes; it signs you in to the console, once:")
    output.line(address)
    return 0
