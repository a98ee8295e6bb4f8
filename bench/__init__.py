"""Speed and memory, always beside a peer measured in the same run on the same machine with the same image."""
