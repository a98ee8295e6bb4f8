"""The one error type that crosses layers, and its two tables: to HTTP statuses and to exit codes.

Owns: the list of error codes. Must not import anything: the command line loads this first.

A message says what failed, with which value. A hint says what to do next. Both are one line, for people; programs look
at `code`, which travels through the REST API, the executor's door and the exit status.
"""

# code -> (HTTP status, exit code). Exit codes are sysexits.h's, so that they stay clear of what a session's own command
# usually returns; 126, 127 and 128 + signal are the command's, as in Bash and Docker.
CODES = {
    "invalid": (400, 64),
    "unauthorized": (401, 77),
    "forbidden": (403, 77),
    "not_found": (404, 66),
    "conflict": (409, 73),
    "storage_full": (507, 74),
    "limit": (429, 75),  # somebody has as much as one may have
    "internal": (500, 70),
    "unavailable": (503, 69),
}


class Error(Exception):
    """Something a user can read and act on.

    code: a key of CODES. message: what failed, with the value. hint: what to do next, or "".
    """

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        if code not in CODES:
            raise ValueError(f"unknown error code {code!r}")
        self.code = code
        self.message = message
        self.hint = hint

    @property
    def status(self) -> int:
        """The HTTP status that carries this error."""
        return CODES[self.code][0]

    @property
    def exit_code(self) -> int:
        """The exit code of a `beaker` command that ends with this error."""
        return CODES[self.code][1]

    def as_dict(self) -> dict:
        """`{"code": 404, "error": "not_found", "message": …, "hint": …}`: REST bodies and door frames alike.

        `code` is the HTTP status, which is what clients of the original API expect there; `error` is ours.
        """
        return {"code": self.status, "error": self.code, "message": self.message, "hint": self.hint}

    @classmethod
    def from_dict(cls, data: dict) -> "Error":
        """The inverse of `as_dict`; an unknown code becomes the one with the same HTTP status, else `internal`."""
        code = data.get("error")
        if code not in CODES:
            code = next((name for name, (status, _) in CODES.items() if status == data.get("code")), "internal")
        return cls(code, str(data.get("message") or "no message"), str(data.get("hint") or ""))
