"""The server: accounts, tokens, clusters, the directory of nodes, and the record of sessions."""
