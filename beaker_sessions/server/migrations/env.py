"""What Alembic runs for every command: on the connection, and in the transaction, that `upgrade` hands over."""

from alembic import context

from beaker_sessions.server.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA, render_as_batch=True)
context.run_migrations()
