"""Running recipes: what a stage depends on, and what it needs."""
