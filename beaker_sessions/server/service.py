"""Everything that the server can do, with every rule and permission. No HTTP. `client.Client` has the same methods.

Each method takes the caller first and returns the JSON of the answer; failures are `errors.Error`. `initialize` alone
has no caller: who can run it on the server's machine needs none.
"""

from __future__ import annotations

from .. import ids
from ..bodies import AccountBody, ClusterBody, check
from ..model import Scope
from . import tables
from .accounts import Accounts, add_account, add_token
from .audit import Audit
from .jobs import Jobs
from .metrics import Metrics
from .nodes import Nodes, add_cluster
from .signins import Signins
from .workspaces import Workspaces

ORGANIZATION, CLUSTER = "lab", "main"


class Service(Accounts, Signins, Workspaces, Nodes, Jobs, Metrics, Audit):
    """The parts over one store."""

    def healthy(self) -> None:
        """Raises Error unavailable unless the database answers."""
        with self.store.read() as rows:
            rows.one(tables.organizations, name=ORGANIZATION)

    def initialize(self, account: str, tokens: dict[Scope, str], hostname: str | None = None) -> None:
        """Make sure that the organization, its cluster and an administrator called `account` exist, and give it tokens.

        tokens: minted by the caller, who has them on disk already, so that an interruption loses none; one that is
        known is left as it is. hostname: the machine that an executor's is for.
        """
        body = check(AccountBody, {"name": account, "role": "admin"})
        with self.store.write() as rows:
            known = rows.account(account)
            organization = rows.organization(ORGANIZATION)
            if organization is None:
                values = {"name": ORGANIZATION, "display_name": ORGANIZATION, "description": "", "created": rows.now}
                rows.insert(tables.organizations, id=ids.ulid(), **values)
                organization = rows.organization(ORGANIZATION)
            assert organization is not None
            id = known.id if known else add_account(rows, body)
            if not rows.clusters(full_name=f"{ORGANIZATION}/{CLUSTER}"):
                add_cluster(rows, organization.id, check(ClusterBody, {"name": CLUSTER}))
            if known is not None and known.role != "admin":
                rows.update(tables.accounts, id, role="admin")
            for scope, token in tokens.items():
                if rows.token(ids.hash_token(token)) is None:
                    token_id = add_token(rows, id, token, "first", scope)
                    if scope == Scope.EXECUTOR:
                        rows.update(tables.tokens, token_id, hostname=hostname)
                    rows.record(id, token_id, "initialize", account, scope=scope.value)
