"""The result in a sentence or two of plain language."""

from __future__ import annotations

from cit_fast.report.collect import Runs, RunView, number

_MOST_RUNS = 4


def headline(runs: Runs) -> str:
    """What the compared runs show: who forgot how much, and the upper bound; runs under way are left out."""
    complete = [view for view in runs.compared if view.is_complete]
    if not complete:
        return (
            "No complete run yet: "
            + "; ".join(
                f"{view.label} is {view.incomplete}"
                if view.record.status != "finished"
                else f"{view.label} {view.incomplete}"
                for view in runs.compared
            )
            + "."
        )
    continual = [view for view in complete if view.metrics.forgetting is not None]
    sentences = []
    chosen = _chosen(continual)
    if chosen:
        sentences.append("; ".join(_clause(view) for view in chosen) + ".")
    baseline = next((view for view in chosen if view.record.method_name == "sequential"), None)
    best = min(chosen, key=_forgot, default=None)
    # The difference of the values as shown, which is what a reader works out.
    less = round(_forgot(baseline), 1) - round(_forgot(best), 1) if baseline and best else 0.0
    if baseline and best and less > 0:
        sentences.append(f"Compared with {baseline.label}, {best.label} forgot {number(less)} points less.")
    rest = [
        view for view in complete if view.metrics.forgetting is None and view.metrics.average_performance is not None
    ]
    for view in rest[:2]:
        bound = ", the upper bound" if view.is_joint and continual else ""
        points = number(view.metrics.average_performance)
        sentences.append(f"{view.label} reached an average of {points} points{bound}.")
    if not sentences:
        sentences.append("The runs hold no scores from which average or forgetting could be computed.")
    if len(chosen) < len(continual):
        sentences.append(f"The table below has all {len(complete)} complete runs.")
    return " ".join(sentences)


def _chosen(continual: list[RunView]) -> list[RunView]:
    """The baseline first; of many runs only the baseline and the three that forgot least."""
    baseline = [view for view in continual if view.record.method_name == "sequential"]
    others = [view for view in continual if view not in baseline]
    if len(continual) <= _MOST_RUNS:
        return baseline + others
    return (baseline[:1] + sorted(others or baseline[1:], key=_forgot))[:_MOST_RUNS]


def _forgot(view: RunView) -> float:
    return view.metrics.forgetting if view.metrics.forgetting is not None else 0.0


def _clause(view: RunView) -> str:
    forgot = round(_forgot(view), 1) + 0.0
    subject = view.label
    if view.replayed:
        new = sum(stage.train_examples for stage in view.trained)
        share = f" ({number(100 * view.replayed / new)} % of the new ones)" if new else ""
        subject += f", bringing back {view.replayed} earlier examples{share},"
    what = (
        f"forgot {number(forgot)} points"
        if forgot >= 0
        else f"forgot nothing (earlier tasks gained {number(-forgot)} points)"
    )
    if view.metrics.average_performance is None:
        return f"{subject} {what}"
    return f"{subject} {what} and ended at an average of {number(view.metrics.average_performance)}"
