"""What a run has told TensorBoard."""

from __future__ import annotations

from pathlib import Path

Curves = dict[str, list[tuple[int, float]]]


def tensorboard_curves(folder: Path) -> Curves:
    """By TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    # Files of one second are read in the order of their names, which is not that of their making.
    found = {tag: sorted(events.Scalars(tag), key=lambda event: event.wall_time) for tag in tags}
    return {tag: [(event.step, round(event.value, 4)) for event in curve] for tag, curve in found.items()}
