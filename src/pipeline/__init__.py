"""Running recipes: stages and their fingerprints, dry run, downloads, sweeps."""
