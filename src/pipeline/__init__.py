"""Running recipes: stages and their fingerprints, dry run, downloads, sweeps.

- `recipes` reads the stages and parameters of a recipe, `stages` executes one stage and stamps it,
  `runs` goes through all of them; `fingerprints` says which code a stage depends on.
- `dryrun` tells what a stage will need, `download` fetches what a recipe needs.
- `grid` reads the points of a sweep, `jobs` runs commands side by side, `sweep` puts both together.

Names are imported from these modules: nothing is imported here, so that `run.py list` starts
without the libraries that the others need.
"""
