"""What a terminal is sent so that it shows recent output again: everything but what it would answer.

Owns the grammar of terminal output as far as this needs it (ECMA-48; xterm's "Control Sequences" for private ones).
Pure. Live output never passes here: what a program asks now, its user's terminal answers.

A terminal answers in the input stream, so an answer to a question of the past would be typed into whatever runs now.
Therefore what is known to be harmless is kept, and all other sequences are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

SCANNED = 4 << 20  # bytes before the recent output in which modes are looked for

# Bytes that are no UTF-8 become lone surrogates. Those of the range of C1 controls are not kept.
_STRAY = re.compile("[\udc80-\udc9f]")
_C1 = re.compile("[\x80-\x9f]")

_TOKEN = re.compile(
    r"""
    \x1b\[ (?P<private>[<=>?]?) (?P<parameters>[0-9:;]*) (?P<between>[\x20-\x2f]*) (?P<final>[\x40-\x7e])
  | \x1b\] (?P<osc>[^\x07\x1b\x18\x1a]*) (?:\x07|\x1b\\)
  | \x1bP (?P<dcs>[^\x1b\x18\x1a]*) \x1b\\
  | \x1b (?P<escape>[\x20-\x2f]*[\x30-\x4f\x51-\x57\x59-\x5a\x5c\x60-\x7e])
  | (?P<begun>\x1b (?:\[[\x20-\x3f]* | [\]PX^_][^\x07\x18\x1a\x1b]*\x1b? | [\x20-\x2f]*) \Z)
  | (?P<other>
      \x1b (?: [X^_][^\x1b\x18\x1a]*(?:\x1b\\)? | [\]P][^\x07\x1b\x18\x1a]* | \[[\x00-\x17\x19\x1c-\x3f]*[\x40-\x7e]? )?
    | \x05
    )
    """,
    re.VERBOSE | re.DOTALL,
)

# Sequences without an answer, by private prefix and what stands between parameters and final character.
_CSI = {
    ("", ""): "@ABCDEFGHIJKLMPSTWXZ`abdefghlmqrsu",
    ("?", ""): "hlJKrs",
    (">", ""): "mnpTtu",
    ("<", ""): "u",
    ("=", ""): "u",
    ("", " "): "@Aq",
    ("", "!"): "p",
    ("", '"'): "pq",
    ("", "$"): "rtvxz{",
    ("", "*"): "x",
    ("", "#"): "pqPQ{}",
}
_TITLES = ("22", "23")  # of CSI t: pushing and popping titles. Others ask, or move the window
_ESCAPES = "6789=>DEHMNOcn|}~lmVW\\"
_CHARSETS = "()*+-./ #%"  # and these with what follows them
_SIXEL = re.compile(r"[0-9;]*q")

# Private modes that make a difference to what follows; those in _ON are set from the beginning.
_MODES = (1, 5, 6, 7, 12, 25, 47, 66, 1000, 1002, 1003, 1004, 1005, 1006, 1007, 1015, 1016, 1047, 1048, 1049, 2004,
          2027, 2031)  # fmt: skip
_ON = (7, 25)
_ALTERNATE = (47, 1047, 1049)
# Programs hide and show the cursor (25) all the time: it is looked for by itself, since this would find it everywhere.
_MODE = re.compile(rb"\x1b\[\?(?!25[hl])([0-9;]+)([hl])")
# A terminal forgets its margins when its size changes, and programs that are told of another size rely on that: in
# those of a smaller screen, what they draw for a larger one would scroll. Setting them moves the cursor, hence DECSC
# and DECRC.
_NO_MARGINS = "\x1b7\x1b[r\x1b8"
_NEAR = 1 << 16  # bytes before the recent output in which colours, margins and the like are looked for
_STATE = re.compile(
    rb"\x1b\[(?P<colour>[0-9;:]*)m|\x1b\[(?P<margins>[0-9]*;?[0-9]*)r|\x1b\((?P<charset>[0B])"
    rb"|\x1b\[>(?P<keys>4;?[0-9]*)m|\x1b\[(?P<keyboard>[<>=][0-9;]*)u|\x1b\[(?P<reset>!)p"
)


def shown(before: bytes, recent: bytes) -> bytes:
    """What to send to a terminal in place of `recent`, the latest output of a program with a terminal.

    before: the output that came before it, or the last SCANNED bytes of that. A sequence that is not complete at the
    end stays: what comes next belongs to it.
    """
    cut = _carried(before, recent)
    states = _STATE.finditer(before[-_NEAR:] + recent)
    margins = [match["margins"] for match in states if match["margins"] is not None]
    last = _NO_MARGINS if margins and margins[-1] else ""
    return modes(before[-SCANNED:] + recent[:cut]) + _without_questions(recent[cut:], last)


def alternate(output: bytes) -> bool:
    """Whether a program with this output has the alternate screen at its end."""
    return any(state for mode, state in _private(output).items() if mode in _ALTERNATE)


def modes(output: bytes) -> bytes:
    """The sequences that put a terminal in the modes in which this output leaves one that was just made."""
    output = output[max(0, output.rfind(b"\x1bc")) :]  # a full reset
    state = _private(output)
    changed = sorted((n, on) for n, on in state.items() if on != (n in _ON))
    # The alternate screen first: what is set after it holds there.
    changed.sort(key=lambda entry: entry[0] not in _ALTERNATE)
    keypad = b"\x1b=" if output.rfind(b"\x1b=") > output.rfind(b"\x1b>") else b""
    return b"".join([b"\x1b[?%d%s" % (number, b"h" if on else b"l") for number, on in changed]) + keypad + _near(output)


def _private(output: bytes) -> dict[int, bool]:
    """The private modes that were changed, and whether they are set."""
    state: dict[int, bool] = {}
    for match in _MODE.finditer(output, max(0, output.rfind(b"\x1bc"))):
        state |= {number: match[2] == b"h" for number in _numbers(match[1]) if number in _MODES}
    if (hidden := output.rfind(b"\x1b[?25l")) >= 0:
        state[25] = output.rfind(b"\x1b[?25h") > hidden
    return state


def _near(output: bytes) -> bytes:
    """Colours, margins, character set and keyboard, as far as the last _NEAR bytes tell."""
    last: dict[str, bytes] = {}
    colours: list[bytes] = []
    keyboards: list[bytes] = []
    for match in _STATE.finditer(output, max(0, len(output) - _NEAR)):
        kind = str(match.lastgroup)
        if kind == "colour":
            resets = match["colour"].split(b";")[0] in (b"", b"0")
            colours = [*([] if resets else colours), match[0]][-32:]
        elif kind == "keyboard":
            keyboards = keyboards[:-1] if match[kind][:1] == b"<" else [*keyboards, match[0]][-8:]
        elif kind == "reset":
            last, colours = {}, []
        else:
            last[kind] = match[0]
    return b"".join([*last.values(), *keyboards, *colours])


def _numbers(text: bytes) -> list[int]:
    return [int(word) for word in text.split(b";") if word and len(word) < 6]


def _carried(before: bytes, recent: bytes) -> int:
    """How many bytes of `recent` end a sequence, or a character, that began before it."""
    start = before.rfind(b"\x1b", max(0, len(before) - len(recent) - 65536))
    at = 0
    if start >= 0 and _begun(before[start:].decode("utf-8", "surrogateescape")):
        head = before[start:]
        match = _TOKEN.match((head + recent).decode("utf-8", "surrogateescape"))
        if match and not match["begun"]:
            at = max(0, len(match[0].encode("utf-8", "surrogateescape")) - len(head))
    elif before:
        while at < min(3, len(recent)) and 0x80 <= recent[at] < 0xC0:
            at += 1
    return at


def _begun(text: str) -> bool:
    match = _TOKEN.match(text)
    return bool(match and match["begun"])


def _without_questions(output: bytes, last: str) -> bytes:
    """last: what to add, before a sequence that is not complete."""
    text = _STRAY.sub("", output.decode("utf-8", "surrogateescape"))
    text = _C1.sub(lambda control: "\x1b" + chr(ord(control[0]) - 0x40), text)
    return "".join(_kept(text, last)).encode("utf-8", "surrogateescape")


def _kept(text: str, last: str) -> Iterator[str]:
    at = 0
    for match in _TOKEN.finditer(text):
        yield text[at : match.start()]
        at = match.end()
        if match["begun"]:
            yield last + match[0]
            return
        if not match["other"] and _harmless(match):
            yield match[0]
    yield text[at:] + last


def _harmless(match: re.Match[str]) -> bool:
    if match["final"]:
        if match["final"] == "t" and not match["private"] and not match["between"]:
            return match["parameters"].split(";")[0] in _TITLES
        return match["final"] in _CSI.get((match["private"], match["between"]), "")
    if match["osc"] is not None:
        return "?" not in match["osc"].split(";")
    if match["dcs"] is not None:
        return bool(_SIXEL.match(match["dcs"]))
    escape = match["escape"]
    return escape in _ESCAPES or escape[0] in _CHARSETS
