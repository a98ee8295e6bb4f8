"""One script for each version of the database, run in the order of their `down_revision`."""
