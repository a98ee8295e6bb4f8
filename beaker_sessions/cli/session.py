"""`session create`, `attach` and `exec`: what puts the user's terminal into a session. The path that has to be fast.

Owns turning flags into the door's requests, and logging in on the way. Sizes, names and images go as they were typed to
the executor, which checks them. Must not import the REST client unless something has already failed.
"""

from __future__ import annotations

import os

from ..errors import Error
from . import config, door, output, terminal
from .args import Flag, Options, command
from .follow import Follow
from .progress import Progress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SESSION = Flag("session", "text", "the session's id or name", value="ID", stands_for_word=True)
ENV = Flag("env", "text", "set a variable; without a value, pass yours on", value="NAME=VALUE", repeat=True)
WORKDIR = Flag("workdir", "text", "directory to start in (default: home)", value="PATH")


@command(
    "[-- COMMAND...]",
    Flag("gpus", "count", "GPUs for you alone (default 1, or 0 on a node without GPUs)", value="COUNT"),
    Flag("cpus", "number", "CPU cores to reserve (default: the GPUs' share of the machine)", value="COUNT"),
    Flag("memory", "text", "memory to reserve (default: the GPUs' share of the machine)", value="6.5GiB"),
    Flag("shared-memory", "text", "size of /dev/shm", value="1GiB"),
    Flag("image", "text", "container image: NAME, docker://NAME or beaker://NAME", "i", "IMAGE"),
    Flag("pull", ("always", "missing", "never"), "when to fetch the image (default missing)"),
    Flag("name", "text", "a name for the session", "n", "NAME"),
    Flag("workspace", "text", "workspace of the session", "w", "WORKSPACE"),
    Flag("node", "text", "the node that it must run on", value="HOST"),
    Flag("cluster", "text", "the cluster that it must run in", value="CLUSTER", repeat=True),
    Flag("hostname", "text", "host name inside the session", value="NAME"),
    Flag("detach", "switch", "start it, print its id and leave it running", "d"),
    ENV,
    Flag("secret-env", "text", "set a variable to the value of a secret", value="NAME=SECRET", repeat=True),
    Flag("secret-mount", "text", "put a secret in a file that is gone afterwards", value="SECRET=/PATH", repeat=True),
    WORKDIR,
    Flag("bare", "switch", "without your home directory and /net"),
    Flag("timeout", "text", "end it after so long", value="8h"),
    Flag("priority", ("low", "normal", "high", "urgent"), "priority (default normal)"),
    Flag("port", "text", "lead a port of the node, any or a given one, to this", value="[NODE:]PORT", repeat=True),
    Flag("host-networking", "switch", "use the machine's own network, where that is allowed"),
    leading=0,
)
def create(options: Options) -> int:
    settings = config.load()
    detach = options["detach"]
    tty = terminal.is_terminal() or (detach and not options.command)
    session = body(options, settings, tty)
    try:
        token = "" if door.inside() else settings.token or log_in(settings)
        request = door.request(
            "create", token, key=os.urandom(16).hex(), session=session, tty=tty, stdin=tty or not detach,
            size=terminal.size() if tty else None, detach=detach,
        )  # fmt: skip
        following = Follow(
            request, tty=tty and not detach, progress=Progress(options.quiet, options["gpus"] is not None)
        )
        code = following.run()
    except Error as error:
        raise _elsewhere(error, settings) from None
    if detach and code == 0:
        if options.json:
            output.json({"id": following.id})
        else:
            output.line(following.id)
    return code


@command("[ID]", SESSION, words=(0, 1))
def attach(options: Options) -> int:
    token = require_token(config.load())
    # A session that has no terminal of its own needs the user's as it is: not raw, with its echo and its Ctrl-C.
    job = door.ask("get", token, id=target(options))["job"]
    tty = terminal.is_terminal() and job.get("session", {}).get("tty", True)
    request = door.request(
        "attach", token, id=job["id"], size=terminal.size() if tty else None, replay=True, stream=True
    )
    return Follow(request, tty=tty, progress=Progress(options.quiet)).run()


@command(
    "[ID] [-- COMMAND...]",
    SESSION,
    ENV,
    WORKDIR,
    Flag("root", "switch", "as root of the sandbox, which is nobody outside it"),
    words=(0, 1),
    leading=1,
)
def exec(options: Options) -> int:
    token = require_token(config.load())
    tty = terminal.is_terminal()
    request = door.request(
        "exec", token, id=target(options), command=options.command, env=environment(options["env"], tty), stdin=True,
        size=(terminal.size() or [24, 80]) if tty else None, workdir=options["workdir"], root=options["root"],
    )  # fmt: skip
    return Follow(request, tty=tty, progress=Progress(options.quiet)).run()


def target(options: Options) -> str | None:
    """The session that a command is about: a word, or --session; None is the caller's only one."""
    word = options.words[0] if options.words else None
    if word and options["session"] and word != options["session"]:
        raise Error("invalid", f"two sessions are named: {word!r} and {options['session']!r}", "name one")
    named: str | None = options["session"] or word
    return named


def body(options: Options, settings: config.Config, tty: bool) -> dict[str, Any]:
    """The `session` object of `POST /jobs`."""
    clusters = options["cluster"]
    if len(clusters) > 1:
        raise Error("invalid", "--cluster: more than one cluster is not supported yet", "name one")
    image = options["image"] or settings.get("default_image")
    kind, name = ("beaker", image[len("beaker://") :]) if image.startswith("beaker://") else ("docker", image)
    requests = {
        "gpuCount": options["gpus"],
        "cpuCount": options["cpus"],
        "memory": options["memory"],
        "sharedMemory": options["shared-memory"],
    }
    session = {
        "workspace": options["workspace"] or settings.get("default_workspace") or None,
        "name": options["name"],
        "node": options["node"],
        "cluster": clusters[0] if clusters else None,
        "requests": {key: value for key, value in requests.items() if value is not None},
        "command": options.command or None,
        "envVars": environment(options["env"], tty) + _secret_variables(options["secret-env"]) or None,
        "datasets": _secret_files(options["secret-mount"]) or None,
        "image": {kind: name} if image else None,
        "pull": options["pull"],
        "workDir": options["workdir"],
        "hostname": options["hostname"],
        "bare": options["bare"] or None,
        "timeout": options["timeout"],
        "priority": options["priority"],
        "ports": options["port"] or None,
        "hostNetworking": options["host-networking"] or None,
    }
    return {key: value for key, value in session.items() if value is not None}


def environment(pairs: list[str], tty: bool) -> list[dict[str, str]]:
    """`--env` as `envVars`, after what describes the user's terminal. Raises Error invalid."""
    variables = {name: os.environ[name] for name in ("TERM", "COLORTERM") if tty and os.environ.get(name)}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name:
            raise Error("invalid", f"--env: {pair!r} has no name", "for example --env NAME=value")
        if not equals and name not in os.environ:
            raise Error("invalid", f"--env: {name!r} is not set here", f"for example --env {name}=value")
        variables[name] = value if equals else os.environ[name]
    return [{"name": name, "value": value} for name, value in variables.items()]


def _secret_variables(pairs: list[str]) -> list[dict[str, str]]:
    """`--secret-env VAR=SECRET` as `envVars`; a name alone is both."""
    split = [(pair.partition("=")[0], pair.partition("=")[2] or pair) for pair in pairs]
    return [{"name": name, "secret": secret} for name, secret in split]


def _secret_files(pairs: list[str]) -> list[dict[str, Any]]:
    """`--secret-mount SECRET=/path` as `datasets`. Raises Error invalid."""
    for pair in pairs:
        if "=" not in pair:
            raise Error(
                "invalid", f"--secret-mount: {pair!r} has no path", "for example --secret-mount KEY=/secrets/key"
            )
    split = [pair.partition("=") for pair in pairs]
    return [{"mountPath": path, "source": {"secret": secret}} for secret, _, path in split]


def require_token(settings: config.Config) -> str:
    """The user's token, "" in a session, which needs none. Raises Error unauthorized that says where to get one."""
    if door.inside():
        return ""
    if not settings.token:
        hint = f"find your token at {settings.address}/user and save it with: beaker config set user_token"
        raise Error("unauthorized", "you are not logged in", hint)
    return settings.token


def log_in(settings: config.Config) -> str:
    """Ask for a token until the executor accepts it, then save it. Raises Error unauthorized without a terminal."""
    door.Door().close()  # without an executor there is nothing to log in for
    prompt = f"You are not logged in. Your token is at {output.escape(settings.address)}/user\nToken: "
    while True:
        token = terminal.ask_secret(prompt)
        prompt = "Token: "
        if token is None:
            return require_token(settings)  # which raises
        if not token:
            continue
        try:
            for _ in door.ask_all("list", token):
                pass
        except Error as error:
            if error.code != "unauthorized":
                raise
            output.say(f"{error.message}. Try again, or press Ctrl+C.")
            continue
        settings.set("user_token", token)
        output.say(f"Saved your token in {settings.path}")
        return token


def _elsewhere(error: Error, settings: config.Config) -> Error:
    """An executor that is not installed here means that this is no node: say which machines are."""
    if error.code != "unavailable" or os.path.exists(door.path()) or not settings.token:
        return error
    from .rest import hostnames

    names = hostnames(settings)
    return (
        Error(error.code, error.message, f"connect to a node and run this there: {', '.join(names)}")
        if names
        else error
    )
