"""The fault campaign: `make soak` at random for as long as one likes, and the sweep over every event of an operation."""
