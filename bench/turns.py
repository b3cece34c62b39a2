"""Providers in processes of their own that take turns on one machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Worker:
    """A provider's process: bench.peer_worker with what it is to do."""

    def __init__(self, name: str, spec: Mapping[str, Any]):
        out = Path(spec["out"])
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        self.name = name
        self.turns: list[dict[str, Any]] = []
        self.done: dict[str, Any] | None = None
        self._log = out / "log.txt"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.peer_worker", json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(out),
            )

    def hear(self) -> dict[str, Any]:
        """The next message; RuntimeError with the last line of its log when it is gone."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            tail = self._log.read_text().strip().splitlines()[-1:] or ["no message"]
            raise RuntimeError(
                f"stopped with status {self._process.returncode}: {tail[0]} (see {self._log})"
            )
        return json.loads(line)

    def turn(self) -> None:
        """Let it run until its next step, or sweep of the reference, is over."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        heard = self.hear()
        if heard["kind"] == "done":
            self.done = heard
            self._process.wait()
            return
        self.turns.append(heard)
        print(
            f"{self.name}: {heard['kind']}, turn {len(self.turns)}, {heard['seconds']:.2f} s",
            flush=True,
        )

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class Turns:
    """What came out of a run: the turns and losses of each provider, and why one failed."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}

    def run(self, specs: Mapping[str, Mapping[str, Any]], *, sequential: bool) -> None:
        """All of them in turn, or one after the other where they do not fit beside each other."""
        batches = [[name] for name in specs] if sequential else [list(specs)]
        for names in batches:
            workers: list[Worker] = []
            try:
                for name in names:
                    workers.append(Worker(name, specs[name]))
                    self._attempt(workers[-1], workers[-1].hear)  # set up one after the other
                self._take_turns(workers)
            finally:
                for worker in workers:
                    worker.stop()

    def _take_turns(self, workers: list[Worker]) -> None:
        rounds = 0
        while running := [w for w in workers if w.done is None and w.name not in self.failed]:
            for worker in running if rounds % 2 == 0 else reversed(running):
                self._attempt(worker, worker.turn)
            rounds += 1
        for worker in workers:
            if worker.done is not None:
                self.found[worker.name] = {**worker.done, "turns": worker.turns}

    def _attempt(self, worker: Worker, action: Callable[[], Any]) -> None:
        try:
            action()
        except RuntimeError as error:
            self.failed[worker.name] = str(error)


def _environment(out: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "PYTHONPATH": path,
        # A cache of its own, thrown away before every run, so that tokenising is timed.
        "HF_DATASETS_CACHE": str(out / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
