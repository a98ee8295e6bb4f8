"""`beaker-server`: settings, wiring, and the process. Owns nothing else."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from .. import __version__, ids, trust
from ..errors import Error
from ..model import Scope
from ..settings import ExecutorSettings, ServerSettings, load
from . import backup
from .oidc import provider
from .seal import Seal
from .service import Service
from .store import Store, sqlite_url
from .workspaces import check_key


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, or that of the `Error` which is printed."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    names = ("storage_path", "host", "port", "database", "key")
    try:
        trust.check("the server")
        settings = load(ServerSettings, options.config, flags={name: getattr(options, name, None) for name in names})
        if options.command in ("backup", "restore"):
            _copy(settings, options.command, options.file)
            return 0
        login = provider(settings)
        with _service(settings) as service:
            if options.command == "init":
                hostname = options.hostname or load(ExecutorSettings, options.config).hostname or socket.gethostname()
                initialize(service, options.account, options.token_file, options.executor_token_file, hostname)
            else:
                from . import web  # here, because `init` needs no web server
                from .routes import api

                web.serve(api(service, login), settings)
    except Error as error:
        print(f"beaker-server: {error.message}" + (f"\n{error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    return 0


def initialize(service: Service, account: str, token_file: Path, executor_token_file: Path, hostname: str) -> None:
    """The first organization, cluster and administrator. What is there already stays, tokens that work included.

    hostname: of the machine whose executor gets the token.
    """
    for path, scope in ((token_file, Scope.ADMIN), (executor_token_file, Scope.EXECUTOR)):
        token = _read(path)
        if token is None:
            token = _write(path, ids.mint_token())
        service.initialize(account, {scope: token}, hostname)
        try:
            service.authenticate(token)
        except Error:  # revoked or expired: what the file is for needs one that works
            service.initialize(account, {scope: _write(path, ids.mint_token())}, hostname)


@contextlib.contextmanager
def _service(settings: ServerSettings) -> Iterator[Service]:
    file, marker = settings.file, _marker(settings)
    with contextlib.ExitStack() as stack:
        if file is not None:
            _make_directory(file.parent)
            stack.enter_context(backup.in_use(file))
            backup.check_marker(marker, file)
            try:
                os.close(os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            except OSError as error:
                raise Error("unavailable", f"cannot use the database {file}: {error.strerror}", "mend that") from error
        url = settings.database or sqlite_url(Path(settings.storage_path, "server.db"))
        store = Store(url, new=not marker.exists())
        stack.callback(store.close)
        seal = _seal(settings, store)
        backup.mark(marker)
        yield Service(store, seal)


def _seal(settings: ServerSettings, store: Store) -> Seal:
    """The key, which fits the database. Raises Error unavailable or forbidden."""
    path = settings.key_file
    with store.read() as rows:
        sealed = bool(rows.some_secrets(1))
    if not path.exists() and sealed:
        hint = "restore it from its backup, or delete the rows of the table secrets"
        raise Error("unavailable", f"the key {path} is missing, which the database's secrets are sealed with", hint)
    seal = Seal(path)
    check_key(store, seal)
    return seal


def _marker(settings: ServerSettings) -> Path:
    """Beside the key, which may be elsewhere than the database."""
    return settings.key_file.with_suffix(".made")


def _copy(settings: ServerSettings, command: str, file: Path) -> None:
    database = settings.file
    if database is None:
        what = f"the database is no SQLite file but {settings.database.partition(':')[0]}, which has its own tools"
        raise Error("invalid", what, "for PostgreSQL: pg_dump, and pg_restore while no server runs")
    if command == "backup":
        backup.backup(database, file)
        print(f"{file} is a backup of {database}. It opens with the key {settings.key_file}, which is not in it.")
        return
    _make_directory(database.parent)
    aside = backup.restore(database, file, _marker(settings), functools.partial(_seal, settings))
    print(f"{database} is {file} now. Start the server; executors report what they have started since.")
    if aside:
        print(f"What was there is {aside}.")


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        hint = "run it as a user who may write there, or set --storage-path"
        raise Error("unavailable", f"cannot keep the database in {path}: {error.strerror}", hint) from error


def _read(path: Path) -> str | None:
    try:
        token = path.read_text().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise Error("invalid", f"cannot read {path}: {error}", "correct or remove the file") from error
    return token if ids.looks_like_token(token) else None


def _write(path: Path, token: str) -> str:
    """Replace the file in one step, never readable by others."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(token + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise Error("storage_full", f"cannot write {path}: {error.strerror}", "mend that") from error
    return token


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="beaker-server", description="The server of Beaker Sessions.")
    parser.add_argument("--version", action="version", version=f"beaker-server {__version__}")
    parser.add_argument("--config", metavar="FILE", help="settings, under `server` (default /etc/beaker/config.yml)")
    parser.add_argument("--storage-path", metavar="DIR", help="where the SQLite database is (default /var/lib/beaker)")
    parser.add_argument("--database", metavar="URL", help="a SQLAlchemy URL instead")
    parser.add_argument("--key", metavar="FILE", help="what secrets are sealed with (default server.key there)")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("serve", help="serve the REST API")
    command.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    command.add_argument("--port", type=int, help="default 8420")
    command = commands.add_parser("init", help="create the organization, its cluster and the first administrator")
    command.add_argument("--account", required=True, metavar="NAME")
    command.add_argument("--token-file", required=True, type=Path, metavar="FILE", help="where to write its token")
    command.add_argument("--executor-token-file", required=True, type=Path, metavar="FILE", help="and an executor's")
    command.add_argument("--hostname", help="the executor's machine (default hostname in the settings, or this one)")
    command = commands.add_parser("backup", help="copy the database to a new file, while the server runs")
    command.add_argument("file", type=Path, metavar="FILE")
    command = commands.add_parser("restore", help="put a backup in the place of the database, while no server runs")
    command.add_argument("file", type=Path, metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
