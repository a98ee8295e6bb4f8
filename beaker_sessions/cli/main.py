"""The `beaker` command: a table of names, of which one command's module is imported and run.

Owns dispatch, help, and how an error or an interruption ends the process. Must not import what a command may not need:
`beaker --version` is to cost little more than Python itself.
"""

from __future__ import annotations

import os
import sys

from .. import __version__
from ..errors import Error
from . import args, output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# name -> (module of this package, function there, what it does)
COMMANDS = {
    "session create": (
        "session",
        "create",
        "Start a session on this machine and go to its terminal (Ctrl-^ d leaves it running)",
    ),
    "session attach": ("session", "attach", "Come back to a running session's terminal (Ctrl-^ d leaves it running)"),
    "session exec": ("session", "exec", "Open a second terminal in a session, or run a command there"),
    "session stop": ("jobs", "stop", "End a session"),
    "session list": ("jobs", "list_jobs", "List sessions on this node, or elsewhere with the server's help"),
    "session top": ("top", "top", "Watch this machine's GPUs and sessions, and what they use"),
    "session get": ("jobs", "get", "Show sessions in a table"),
    "session describe": ("jobs", "describe", "Show everything about one session"),
    "session logs": ("jobs", "logs", "Print what a session has written to its terminal"),
    "login": ("login", "login", "Print a link that signs your browser in to the console, once"),
    "account whoami": ("account", "whoami", "Show the account you are logged in to"),
    "account token": ("account", "token", "Print your token"),
    "account generate-token": ("account", "generate_token", "Replace your token by a new one"),
    "account list": ("account", "list_accounts", "List accounts (administrators)"),
    "account organizations": ("account", "organizations", "List your organizations"),
    "account create": ("account", "create", "Create an account and show its token once (administrators)"),
    "cluster list": ("cluster", "list_clusters", "List the clusters of an organization"),
    "cluster get": ("cluster", "get", "Show clusters"),
    "cluster nodes": ("cluster", "nodes", "List the nodes of a cluster"),
    "cluster create": ("cluster", "create", "Create a cluster"),
    "cluster delete": ("cluster", "delete", "Delete a cluster"),
    "node list": ("node", "list_nodes", "List nodes of a cluster, or of all of yours"),
    "node get": ("node", "get", "Show nodes"),
    "node cordon": ("node", "cordon", "Let no new session start on a node"),
    "node uncordon": ("node", "uncordon", "Let sessions start on a node again"),
    "secret list": ("secret", "list_secrets", "List the secrets of a workspace"),
    "secret read": ("secret", "read", "Print the value of a secret, byte for byte"),
    "secret write": ("secret", "write", "Set a secret; the value comes from standard input"),
    "secret delete": ("secret", "delete", "Delete a secret"),
    "workspace create": ("secret", "create_workspace", "Create a workspace: NAME, or ORGANIZATION/NAME"),
    "workspace get": ("secret", "get_workspace", "Show a workspace"),
    "workspace list": ("secret", "list_workspaces", "List your workspaces"),
    "credential get": ("credential", "get", "Git's credential helper: tell what is kept for a host"),
    "credential store": ("credential", "store", "Git's credential helper: keep a credential"),
    "credential erase": ("credential", "erase", "Git's credential helper: forget a credential"),
    "config list": ("configure", "list_settings", "Show the configuration and where each value comes from"),
    "config set": ("configure", "set_value", "Save a value in the configuration file"),
    "config unset": ("configure", "unset_value", "Remove a value from the configuration file"),
    "config test": ("configure", "test", "Check that the configuration works"),
    "executor images": ("images", "images", "List, load or prune this machine's images (administrators)"),
    "executor end-sessions": ("ending", "end_sessions", "End all sessions of this machine, as its shutdown does"),
    "executor doctor": ("doctor", "doctor", "Check this machine and say how to mend what is wrong"),
}
NOUNS = {
    "session": "Work in a sandbox of your own, with GPUs claimed for you",
    "account": "Your account and token",
    "cluster": "Groups of nodes",
    "node": "The machines that run sessions",
    "secret": "Values that only you can read, kept sealed on the server",
    "workspace": "What your secrets are kept in",
    "credential": "What Git asks for user names and passwords, with: git config --global credential.helper beaker",
    "config": "The settings of this command",
    "executor": "The service that runs sessions on a machine",
}
TOP = {**NOUNS, **{name: text for name, (_, _, text) in COMMANDS.items() if " " not in name}}


def main() -> None:
    """Run the command line of this process and end it; never returns.

    It leaves without the interpreter's clean-up, which takes milliseconds and has nothing to do: all is flushed here.
    """
    for fd in (0, 1, 2):  # a closed standard stream would otherwise become the next socket opened
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = 141
    except OSError as error:
        output.say(f"beaker: cannot write to standard output: {error.strerror}")
        code = code or 74
    os._exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; every failure is told on standard error in one line."""
    try:
        return _dispatch(arguments)
    except Error as error:
        report(error, _wants_json(arguments))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141  # 128 + SIGPIPE: what a shell reports for a program that was cut off by `| head`
    except Exception as error:
        if os.environ.get("BEAKER_DEBUG"):
            import traceback

            traceback.print_exc()
        hint = "" if os.environ.get("BEAKER_DEBUG") else "BEAKER_DEBUG=1 shows where"
        failure = Error("internal", f"unexpected {type(error).__name__}: {error}", hint)
        report(failure, _wants_json(arguments))
        return failure.exit_code


def report(error: Error, json: bool = False) -> None:
    if json:
        import json as codec

        output.say(codec.dumps(error.as_dict()))
    else:
        output.say(f"beaker: {error.message}" + (f"; {error.hint}" if error.hint else ""))


def _wants_json(arguments: Sequence[str]) -> bool:
    before = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    return "--format=json" in before or ("--format", "json") in zip(before, before[1:])


def _dispatch(arguments: Sequence[str]) -> int:
    name, rest = _split(arguments)
    if name not in COMMANDS:
        options = args.parse(args.Command(lambda _: 0, "", (VERSION,) if not name else (), (0, 0), None), rest)
        if not name and options["version"]:
            output.line(f"beaker {__version__}")
            return 0
        sys.stdout.write(_group_help(name))
        return 0
    module, function, summary = COMMANDS[name]
    command: args.Command = getattr(__import__(f"{__package__}.{module}", fromlist=[function]), function)
    options = args.parse(command, rest)
    if options["help"]:
        sys.stdout.write(_command_help(name, summary, command))
        return 0
    return command.run(options)


VERSION = args.Flag("version", "switch", "show the version")


def _split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command's name, complete or as far as it goes, and all other arguments. Raises Error invalid."""
    name, rest = "", []
    queue = list(arguments)
    while queue and name not in COMMANDS:
        word = queue.pop(0)
        if word.startswith("-"):
            rest.append(word)
            if word == "--format" and queue:
                rest.append(queue.pop(0))
            continue
        longer = f"{name} {word}".strip()
        if longer not in COMMANDS and longer not in NOUNS:
            known = [key.rpartition(" ")[2] for key in COMMANDS if key.startswith(f"{name} ")] if name else list(TOP)
            hint = args.closest(word, known) or f"see beaker {name} --help".replace("  ", " ")
            raise Error("invalid", f"unknown command {longer!r}", hint)
        name = longer
    return name, rest + queue


def _group_help(noun: str) -> str:
    lines = [f"Usage: beaker {noun + ' ' if noun else ''}COMMAND [flags]", ""]
    if noun:
        lines += [f"{NOUNS[noun]}.", ""]
        listed = {
            name.rpartition(" ")[2]: text for name, (_, _, text) in COMMANDS.items() if name.startswith(f"{noun} ")
        }
    else:
        lines += ["Interactive GPU sessions on the machines that you share.", ""]
        listed = TOP
    width = max(len(name) for name in listed)
    lines += ["Commands:"] + [f"  {name:{width}}  {text}" for name, text in listed.items()]
    lines += ["", "Flags:", *_flag_lines(args.GLOBAL if noun else (*args.GLOBAL, VERSION))]
    return "\n".join(lines) + "\n"


def _command_help(name: str, summary: str, command: args.Command) -> str:
    usage = f"Usage: beaker {name} [flags] {command.usage}".rstrip()
    return "\n".join([usage, "", f"{summary}.", "", "Flags:", *_flag_lines(command.flags)]) + "\n"


def _flag_lines(flags: Sequence[args.Flag]) -> list[str]:
    shown = [
        (f"-{flag.short}, " if flag.short else "    ")
        + f"--{flag.name}"
        + ("" if flag.kind == "switch" else f" {flag.value}")
        for flag in flags
    ]
    width = max(len(text) for text in shown)
    return [
        f"  {text:{width}}  {flag.help}" + (" (repeatable)" if flag.repeat else "") for text, flag in zip(shown, flags)
    ]
