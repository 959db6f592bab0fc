"""Reading and writing files, our own and those of others.

- `errors`, `names`: what a user is told, and what may name a folder.
- `writing`, `write_errors`: files that are there whole or not at all; full and read-only disks.
- `tensors`: checkpoints, loaded strictly.
- `images`: the one decoder of image files.
- `foreign`: opens arrays, tables and texts, and says what is wrong with a file.
- `weights`: networks from configs, never larger than the file that holds their weights.
- `yaml_files`: recipes and other settings, read strictly.
- `ownership`: one owner of a folder while it is written.
"""
