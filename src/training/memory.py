"""What happens when a training runs out of memory: one sentence, and the state is kept."""

from __future__ import annotations

from src.training.session import Session
from src.utils import PerceptError, describe_peak_memory

# what is lowered, by what the training was doing; parameters of the notebooks
REMEDIES = {
    "a step": "lower batch_size, work through it in parts (accumulate), or set step_in_backward"
    " (and gradient_checkpointing where the notebook has it)",
    "the validation": "lower the number of images that are validated at a time (batch_size)",
    "the figures": "lower the number of samples that are drawn, or batch_size",
    "saving": "lower batch_size",
}


def explain_out_of_memory(session: Session, doing: str, saved: str) -> PerceptError:
    """The error to raise when memory ends.

    Args:
        session: that was training.
        doing: key of REMEDIES.
        saved: what is on the disk, for the message.
    """
    position = session.position
    return PerceptError(
        f"Memory of {session.device} ran out in {doing} (epoch {position.epoch}, step"
        f" {position.step}, batch_size {session.batching.batch_size};"
        f" {describe_peak_memory(str(session.device))}): {REMEDIES[doing]}; {saved}."
    )
