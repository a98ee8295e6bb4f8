"""What nobody expected: in the log with its traceback, and by its id in what people are told."""

from __future__ import annotations

import logging

from .. import ids
from ..errors import Error


def incident(log: logging.Logger) -> Error:
    """The error to tell in place of the exception that is being handled, which is logged."""
    id = ids.ulid()
    log.exception("incident %s", id)
    hint = "tell the administrator, who finds it in the executor's log"
    return Error("internal", f"the executor failed (incident {id})", hint)
