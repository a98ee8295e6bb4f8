"""The fault campaign: `make soak` at random, and the sweep over every event of an operation."""
