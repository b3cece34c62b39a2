"""`fasttr demo`: the main job on generated data."""

from __future__ import annotations

from fasttr.cli.arguments import settings_of_command


def run(args: list[str]) -> None:
    from fasttr.toy.demo import DemoSettings, demo

    values = settings_of_command(
        "fasttr demo",
        "SFT, then DPO beside TR-DPO on generated data with a known gold reward.",
        DemoSettings,
        args,
    )
    demo(DemoSettings(**values))
