"""`fasttr plan`: a run on cards that nobody has rented yet."""

from __future__ import annotations

from fasttr.cli.arguments import settings_of_command


def run(args: list[str]) -> None:
    from fasttr.cluster.settings import PlanSettings

    values = settings_of_command(
        "fasttr plan",
        "Memory of a card, step time and traffic, by a model that was not measured.",
        PlanSettings,
        args,
    )
    from fasttr.cluster.report import report

    print(report(PlanSettings(**values)))
