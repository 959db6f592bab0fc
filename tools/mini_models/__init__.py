"""Training of the miniature of every frozen model, a module a model.

`python tools/train_mini_models.py --help` is the command. `data` has the images and the folders,
`training` the loop that all stages share.
"""
