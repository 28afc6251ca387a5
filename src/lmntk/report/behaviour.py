"""The picture of whether the kernel describes fine-tuning: four scores of each task."""

from collections.abc import Sequence

from lmntk.analysis.behaviour import BehaviourRow


def behaviour_figure(rows: Sequence[BehaviourRow]) -> bytes:
    """Draw the scores of the pre-trained, kernel, linearised and fine-tuned model as bars, with sd over seeds.

    Args:
        rows: From `lmntk.analysis.behaviour.behaviour_row`, one for each group of bars.

    Returns:
        The bytes of a PNG.
    """
    raise NotImplementedError
