"""The training loop.

For each window of steps between two moves of the reference: score the window's rows, train on them,
move the reference. At a step where several fall together: evaluate, move, save.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fasttr.checkpoint import folder as checkpoint
from fasttr.config.train_config import TrainConfig
from fasttr.errors import FasttrError
from fasttr.metrics.sums import SUMS, MetricsLog, means, named, pack_sums
from fasttr.metrics.throughput import Speed
from fasttr.training.evaluate import evaluate
from fasttr.training.run import Run, say
from fasttr.training.setup import start
from fasttr.training.stopping import FiniteGuard, Interrupted, StopRequest
from fasttr.training.window import score_anchor, score_window


class TrainResult(NamedTuple):
    """What a finished run returns."""

    output_dir: Path
    steps: int
    metrics: dict[str, float]  # of the last line of metrics.jsonl


def train(config: TrainConfig) -> TrainResult:
    """Train a model on preferences as `config` says; the command `fasttr train` calls this.

    Writes checkpoints, metrics.jsonl and the final model into `config.output_dir`. Raises
    FasttrError, one line, for mistakes in configuration, data or model; raises Interrupted (a
    SystemExit) after SIGTERM or Ctrl-C, once saved.
    """
    with StopRequest() as stop:
        run = start(config)
        try:
            run.output_dir.mkdir(parents=True, exist_ok=True)
            checkpoint.remove_torn(run.output_dir)
            (run.output_dir / "train_config.json").write_text(
                json.dumps(config.as_dict(), indent=1) + "\n"
            )
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise FasttrError(f"output_dir: cannot write {config.output_dir!r}: {error}") from error
        log = MetricsLog(
            run.output_dir,
            config.report_to,
            keep_until=run.step if run.resumed else None,
            run_name=config.run_name,
            project=config.project,
            config=config.as_dict(),
        )
        try:
            return _loop(run, log, stop)
        finally:
            log.close()


def _loop(run: Run, log: MetricsLog, stop: StopRequest) -> TrainResult:
    config, plan = run.config, run.plan
    guard, speed, began = FiniteGuard(), Speed(run.policy.model, run.device), time.perf_counter()
    first_step, line = run.step, dict[str, float]()
    bar = tqdm(
        total=plan.total_steps,
        initial=run.step,
        desc="Training",
        unit="step",
        disable=config.disable_tqdm or None,
    )

    if run.step == 0:
        score_anchor(run)
    for window in plan.windows(config.schedule.every, start=run.step):
        if run.loss.needs_reference and not run.window_scored:
            paused = speed.pause()
            score_window(run, window, lambda: _stop_if_asked(run, stop, guard))
            speed.resume(paused)
        if run.step == 0 and config.eval_on_start:
            log.write(0, evaluate(run))
        for step in window[run.step - window.start :]:
            gradient_norm, rate = _step(run, step, guard, speed)
            run.step = step + 1
            bar.update()

            # once in a while: log, evaluate, move the reference, save
            if run.cadence.logs(run.step):
                line = _log_line(run, gradient_norm, rate, speed, window)
                guard.verify(run.output_dir)
                log.write(run.step, line)
                say(_summary(run, line))
            paused = speed.pause()
            saves = run.cadence.saves(run.step)
            if run.cadence.evaluates(run.step):
                evaluation = evaluate(run)
                log.write(run.step, evaluation)
                say(_evaluation_summary(run, evaluation))
                saves |= run.note_best(evaluation)
            if (
                config.schedule.every is not None
                and run.step == window.start + config.schedule.every
            ):
                run.reference.move()
                run.window_scored = False
                log.write(
                    run.step, {"event": "reference_update", "ref/updates": run.reference.updates}
                )
            if saves:
                guard.verify(run.output_dir)
                run.save(only_model=config.save_only_model)
            _stop_if_asked(run, stop, guard)
            speed.resume(paused)
    bar.close()
    guard.verify(run.output_dir)
    if config.load_best_model_at_end and run.best_checkpoint is not None:
        checkpoint.copy_final(run.best_checkpoint, run.output_dir)
        say(f"the final model is {run.best_checkpoint.name}, the best by {config.best_metric}")
    else:
        checkpoint.save_final(run.output_dir, run.policy, run.tokenizer)
    seconds = time.perf_counter() - began
    rows = sum(len(plan.rows(step)) for step in range(first_step, run.step))
    total = {
        "train_loss": float(run.total_loss) / max(run.step, 1),
        "train_runtime": seconds,
        "train_pairs_per_second": rows / seconds,
    }
    log.write(run.step, total)
    say(
        f"done: {run.step} steps in {seconds:.1f} s ({rows / seconds:.2f} rows/s, scoring and "
        "saving included)"
    )
    say(f"model and metrics in {run.output_dir}")
    return TrainResult(run.output_dir, run.step, line | total)


def _step(run: Run, step: int, guard: FiniteGuard, speed: Speed) -> tuple[torch.Tensor, float]:
    """One optimizer step; returns the gradient's norm before clipping (on the device) and the rate
    it used."""
    config, loss = run.config, run.loss
    rows = run.plan.rows(step)
    chosen_tokens = run.chosen_tokens_means(run.train_trees, rows)
    sums = torch.zeros(len(SUMS), device=run.device)
    for host_batch in run.plan.packs(step):
        batch = host_batch.to(run.device)
        ref_logp = (
            run.scores.get(batch.rows).to(run.device, non_blocking=True)
            if loss.needs_reference
            else None
        )
        out = run.policy(
            batch, run.loss_fn(batch, chosen_tokens), ref_logp, normalizer=len(rows), stats=True
        )
        out.loss.backward()
        sums += pack_sums(out, ref_logp, batch, loss)
        speed.add(host_batch, len(host_batch.rows))
        run.num_tokens += host_batch.num_tokens

    parameters = [p for p in run.policy.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if config.max_grad_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
    not_finite = (~torch.isfinite(norm) | ~torch.isfinite(sums[0])).to(torch.float32)
    run.optimizer.found_inf = not_finite  # type: ignore[attr-defined]  # the fused kernel then changes nothing
    rate = run.scheduler.get_last_lr()[0]
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)

    guard.verify(run.output_dir)
    guard.raise_flag(step + 1, rows, not_finite)
    run.averages.add(means(sums))
    run.total_loss += sums[0]
    return norm, rate


def _log_line(
    run: Run, norm: torch.Tensor, rate: float, speed: Speed, window: range
) -> dict[str, float]:
    line = named(run.averages.read(), run.loss)
    line |= {
        "grad_norm": float(norm),
        "learning_rate": rate,
        "num_tokens": run.num_tokens,
        "epoch": run.step / run.plan.steps_per_epoch,
    }
    if run.loss.needs_reference:
        line |= {"ref/updates": run.reference.updates, "ref/age_steps": run.step - 1 - window.start}
    return line | speed.read()


def _stop_if_asked(run: Run, stop: StopRequest, guard: FiniteGuard) -> None:
    if stop.signum is None:
        return
    guard.verify(run.output_dir)
    if run.step > 0:
        saved = run.save()
        say(
            f"stopped by a signal at step {run.step}; saved {saved}; go on with "
            "--resume_from_checkpoint true"
        )
    else:
        say("stopped by a signal before the first step; go on with --resume_from_checkpoint true")
    raise Interrupted(stop.signum)


def _summary(run: Run, line: dict[str, Any]) -> str:
    parts = [f"step {run.step}/{run.plan.total_steps}", f"loss {line['loss']:.4f}"]
    for key, label, form in (
        ("rewards/margins", "margin", "+.4f"),
        ("rewards/accuracies", "accuracy", ".3f"),
        ("kl", "kl", ".3f"),
        ("ref/updates", "updates", "d"),
    ):
        if key in line:
            parts.append(f"{label} {line[key]:{form}}")
    parts += [
        f"grad {line['grad_norm']:.3g}",
        f"lr {line['learning_rate']:.2e}",
        f"{line['perf/pairs_per_second']:.1f} rows/s",
    ]
    return "  ".join(parts)


def _evaluation_summary(run: Run, line: dict[str, Any]) -> str:
    text = f"evaluation at step {run.step}: loss {line['eval_loss']:.4f}"
    if "eval_rewards/accuracies" in line:
        accuracy, error = (line[f"eval_rewards/accuracies{end}"] for end in ("", "_stderr"))
        text += f"  accuracy {accuracy:.3f} +- {error:.3f}"
    for key, label in (
        ("eval_rewards/margins", "margin"),
        ("eval_anchor/rewards/margins", "against the initial policy"),
    ):
        if key in line:
            text += f"  {label} {line[key]:+.4f}"
    return text
