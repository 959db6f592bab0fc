"""What a stage will need, told before it starts: parameters, memory and disk, from a notebook's
parameters alone.

- Nothing is loaded or downloaded. Sizes (`sizes`) come from the prepared data and the pretrained
  models' config files where these are there, else from what is known of the mini world, and
  published of NSD, CLIP and the autoencoder.
- Memory is told of trainings, disk also of the stages that write data and images.
- Activations are not guessed (`memory`): the step is traced with tensors that have shapes and no
  memory, and what autograd keeps is followed through the backward pass, in which activations are
  freed and gradients appear.
- Memory is that of the process: its base (interpreter and libraries, as large as they are here
  now), weights, optimizer state, the peak of that trace, frozen models, and the files that are
  mapped while training.
"""

from src.pipeline.dryrun.memory import (
    estimate_training_memory,
    find_backward_peak,
    measure_base_memory,
    trace_step,
)
from src.pipeline.dryrun.plan import Plan, plan_stage
from src.pipeline.dryrun.sizes import NSD_VOXELS, Sizes, find_sizes

__all__ = [
    "NSD_VOXELS",
    "Plan",
    "Sizes",
    "estimate_training_memory",
    "find_backward_peak",
    "find_sizes",
    "measure_base_memory",
    "plan_stage",
    "trace_step",
]
