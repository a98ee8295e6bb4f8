"""The executor: the program that owns one machine's resources and runs its sessions."""
