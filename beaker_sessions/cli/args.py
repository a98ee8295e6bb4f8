"""What a command takes: its flags as a table, and the parser that reads a command line by it.

Owns the grammar of flags and their error messages. Must not import anything heavy (argparse alone costs 8 ms), nor
check what only an executor or the server can know: sizes, names and images are validated there, once.
"""

from __future__ import annotations

from ..errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

ANY = 1 << 30  # no upper bound on a number of words


class Flag:
    """One flag of a command.

    kind: switch, text, count (a whole number from 0), number (a decimal from 0), or a tuple of the allowed words.
    stands_for_word: this flag and the command's first word are two ways of saying the same.
    """

    __slots__ = ("help", "kind", "name", "repeat", "short", "stands_for_word", "value")

    def __init__(
        self,
        name: str,
        kind: str | tuple[str, ...],
        help: str,
        short: str = "",
        value: str = "",
        repeat: bool = False,
        stands_for_word: bool = False,
    ) -> None:
        self.name, self.kind, self.help, self.short = name, kind, help, short
        self.value = value or (f"{'|'.join(kind)}" if isinstance(kind, tuple) else kind.upper())
        self.repeat, self.stands_for_word = repeat, stands_for_word


GLOBAL = (
    Flag("format", ("table", "json"), "how to print results"),
    Flag("quiet", "switch", "print ids and nothing else", "q"),
    Flag("help", "switch", "show this help", "h"),
)


class Options:
    """A parsed command line. `options["gpus"]` is None when the flag was not given, [] if it repeats.

    words: what stands before the command of the session. command: what stands after `--`, or after the leading words.
    """

    def __init__(self, flags: Sequence[Flag]) -> None:
        self.values: dict[str, Any] = {
            flag.name: [] if flag.repeat else False if flag.kind == "switch" else None for flag in flags
        }
        self.words: list[str] = []
        self.command: list[str] = []

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def json(self) -> bool:
        return bool(self.values["format"] == "json")

    @property
    def quiet(self) -> bool:
        return bool(self.values["quiet"])


class Command:
    """One command: `run(options)` returns its exit code. words: how many it takes, (fewest, most).

    leading: after so many words the session's command begins, as in `docker run`; None: flags and words mix freely.
    """

    def __init__(
        self,
        run: Callable[[Options], int],
        usage: str,
        flags: tuple[Flag, ...],
        words: tuple[int, int],
        leading: int | None,
    ) -> None:
        self.run, self.usage, self.flags = run, usage, flags + GLOBAL
        self.words, self.leading = words, leading


def command(
    usage: str, *flags: Flag, words: tuple[int, int] = (0, 0), leading: int | None = None
) -> Callable[[Callable[[Options], int]], Command]:
    """Declares a function as a command. usage: what stands after the command's name and `[flags]` in its help."""
    return lambda run: Command(run, usage, flags, words, leading)


def parse(command: Command, arguments: Sequence[str]) -> Options:
    """The options that `arguments` give. Raises Error invalid that names the flag, the value and what to do.

    `--help` stops the parsing, so that it works whatever else is missing.
    """
    options = Options(command.flags)
    names = {f"--{flag.name}": flag for flag in command.flags}
    shorts = {flag.short: flag for flag in command.flags if flag.short}
    leading = ANY if command.leading is None else command.leading
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument == "--":
            options.command += queue
            break
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            flag = names.get(name)
            if flag is None:
                raise _unknown(name, names)
            _take(options, flag, name, [value] if equals else None, queue)
        elif argument.startswith("-") and len(argument) > 1:
            flag = _take_shorts(options, argument, shorts, queue)
        else:
            if len(options.words) >= leading:
                options.command += [argument, *queue]
                break
            options.words.append(argument)
            continue
        if flag.stands_for_word and leading != ANY:
            leading -= 1
        if options["help"]:
            return options
    _check_words(command, options)
    return options


def _take_shorts(options: Options, argument: str, shorts: dict[str, Flag], queue: list[str]) -> Flag:
    rest = argument[1:]
    while True:
        flag = shorts.get(rest[0])
        if flag is None:
            raise Error("invalid", f"unknown flag {argument!r}", "see --help; put -- before a command with flags")
        rest = rest[1:]
        if flag.kind == "switch" and rest:
            _take(options, flag, f"-{flag.short}", None, queue)
            continue
        _take(options, flag, f"-{flag.short}", [rest[rest.startswith("=") :]] if rest else None, queue)
        return flag


def _take(options: Options, flag: Flag, shown: str, inline: list[str] | None, queue: list[str]) -> None:
    if flag.kind == "switch":
        text = inline[0] if inline else "true"
        if text not in ("true", "false"):
            raise Error("invalid", f"{shown}: takes no value, but {text!r} was given", "leave the value out")
        options.values[flag.name] = text == "true"
        return
    if inline is None:
        if not queue or queue[0].startswith("--"):
            raise Error("invalid", f"{shown}: needs a value", f"for example {shown} {_example(flag)}")
        inline = [queue.pop(0)]
    value = _convert(flag, shown, inline[0])
    if flag.repeat:
        options.values[flag.name].append(value)
    else:
        options.values[flag.name] = value


def _convert(flag: Flag, shown: str, text: str) -> Any:
    if isinstance(flag.kind, tuple):
        if text not in flag.kind:
            raise Error("invalid", f"{shown}: {text!r} is none of {', '.join(flag.kind)}", "choose one of them")
        return text
    if flag.kind == "text":
        return text
    example = f"for example {shown} {_example(flag)}"
    try:
        number = int(text) if flag.kind == "count" else float(text)
    except ValueError:
        noun = "a whole number" if flag.kind == "count" else "a number"
        raise Error("invalid", f"{shown}: {text!r} is not {noun}", example) from None
    if number < 0:
        raise Error("invalid", f"{shown}: {text} is negative", example)
    if not number < 1e9:  # infinity and not-a-number too
        raise Error("invalid", f"{shown}: {text} is more than any machine has", example)
    return number


def _example(flag: Flag) -> str:
    if isinstance(flag.kind, tuple):
        return flag.kind[-1]
    return {"count": "1", "number": "7.5"}.get(flag.kind, flag.value)


def _unknown(name: str, names: dict[str, Flag]) -> Error:
    if name in LATER:
        return Error("invalid", f"{name} is not supported yet", "leave it out")
    return Error("invalid", f"unknown flag {name!r}", closest(name, list(names)) or "see --help")


LATER = (
    "--budget", "--mount", "--no-update-default-image", "--remote", "--save-image",
)  # fmt: skip


def closest(word: str, known: Sequence[str]) -> str:
    """`did you mean 'create'?`, or "" when nothing is near."""
    import difflib

    matches = difflib.get_close_matches(word, known, 1)
    return f"did you mean {matches[0]!r}?" if matches else ""


def _check_words(command: Command, options: Options) -> None:
    fewest, most = command.words
    if len(options.words) > most:
        raise Error(
            "invalid", f"unexpected argument {options.words[most]!r}", f"usage: {command.usage or 'no arguments'}"
        )
    if len(options.words) < fewest:
        raise Error("invalid", "an argument is missing", f"usage: {command.usage}")
    if options.command and command.leading is None:
        raise Error("invalid", f"unexpected argument {options.command[0]!r} after --", "leave it out")
