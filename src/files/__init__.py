"""Files that may be anything: images, tables and settings of others, and folders that others write.

- `images`: the one decoder of image files.
- `foreign`: opens arrays, tables and texts, and says what is wrong with a file.
- `weights`: networks from configs, never larger than the file that holds their weights.
- `yaml_files`: recipes and other settings, read strictly.
- `ownership`: one owner of a folder while it is written.
"""
