"""The training loop: ``train`` is the outer loop, ``train_step`` is one optimizer step.

    while step < max_steps: train a step, log, draw samples, save a checkpoint

Everything random is a function of (seed, global sample index), so resuming needs only the step and the training state.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from tqdm import tqdm

from latte_flow.model.context import check_chat_template
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.training.checkpoint.manifest import CHECKPOINTS_FOLDER, step_name
from latte_flow.training.checkpoint.store import CheckpointStore
from latte_flow.training.components import build_components, build_model, describe_run
from latte_flow.training.configs.deepspeed import load_deepspeed_config
from latte_flow.training.configs.fields import TrainingConfig
from latte_flow.training.configs.saved import to_yaml
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.data.loader import Batch, make_loader
from latte_flow.training.data.record import DataRecord
from latte_flow.training.distributed.batch_layout import make_batch_layout
from latte_flow.training.distributed.collectives import agree, print_once
from latte_flow.training.distributed.ranks import arrange_ranks
from latte_flow.training.doctor import Doctor
from latte_flow.training.errors import UserError, naming
from latte_flow.training.initial_weights import find_initial_weights
from latte_flow.training.monitor.health import StepHealth
from latte_flow.training.monitor.logs import failed_logs
from latte_flow.training.monitor.metrics import MetricsWriter, labelled_gradient_norms
from latte_flow.training.monitor.preemption import StopRequest
from latte_flow.training.monitor.progress import progress_bar
from latte_flow.training.monitor.stragglers import RankTimer
from latte_flow.training.monitor.watchdog import PHASES, Watchdog
from latte_flow.training.objectives.base import Objectives, RunParts, find_objectives, freeze_unreached, join_rows
from latte_flow.training.optimizer import build_optimizer, learning_rate
from latte_flow.training.run_folder import (
    DATA_FILE,
    check_files,
    check_output_dir,
    components_folder,
    find_origin,
    find_run_id,
    origin_differences,
    record_start,
    write_components,
)
from latte_flow.training.run_lock import RunLock

ABANDON_SECONDS = 600.0
"""How long a run that fails waits for a checkpoint that is being written."""


class Trainer:
    """Builds and trains one run, or resumes the run in its output_dir.

    Args:
        config: the run.
        launchers: the processes that started this rank (monitor/launcher.py); without them it stops with a checkpoint.

    Raises:
        UserError: when the configuration or the output_dir does not allow the run; nothing is overwritten in that case.
    """

    def __init__(self, config: TrainingConfig, launchers: list[tuple[int, int]]):
        # These steps contain barriers and collectives: all ranks must run them in the same order.
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.rank = dist.get_rank()
        self.ranks = arrange_ranks(config.tensor_parallel, config.health.patience)
        self.device = torch.device(get_accelerator().current_device_name())
        check_output_dir(config)  # first, so that no lock file is put into a folder that is not a run
        self.lock = RunLock(self.output_dir)
        try:
            self._build(launchers)
        except UserError:
            self.lock.release()
            raise

    def _build(self, launchers: list[tuple[int, int]]) -> None:
        """Build the run, in the same order on all ranks. From here on this run has exclusive use of the output_dir."""
        config = self.config
        kinds = find_objectives(config)
        check_output_dir(config)
        config.run_id = agree(find_run_id(config) if self.rank == 0 else None)
        self.origin, initial = find_origin(config), find_initial_weights(config)
        dist.barrier()  # StopRequest removes a file that the checks above look at
        self.stop = StopRequest(self.output_dir, self.device, launchers, self.lock.folder_is_there)
        images = load_image_dataset(config.data)
        data_record = DataRecord(images, self.output_dir / DATA_FILE, allow_changed=config.data.allow_changed)
        data_record.verify()
        check_files(config, data_record, own=True)
        components = build_components(config, images, components_folder(config, self.origin or initial))
        check_files(config, data_record, own=False)
        with naming():  # here: the prompts are read later, some of them during the training
            check_chat_template(components.tokenizer)
        self.layout = make_batch_layout(config, world_size=self.ranks.data_size, rank=self.ranks.data_rank)
        for kind in kinds.values():
            kind.check(config, components.model_config, self.layout)
        ds_config = load_deepspeed_config(config, self.layout)
        model = build_model(config, components, self.ranks, initial)
        freeze_unreached(model, kinds.values())
        optimizer = build_optimizer(model, config.optimizer)
        self.group_labels = [group["name"] for group in optimizer.param_groups]
        self.objectives = Objectives(RunParts(config, images, components, self.ranks, self.layout, self.device))
        dist.barrier()  # no rank writes before all have read the run's files
        if self.rank == 0:
            write_components(config, components, model)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, mpu=self.ranks.mpu)
        if initial is not None and config.precision == "bf16":
            initial.write_master_weights(self.engine)
        self.model: LatteFlowModel = self.engine.module
        self._make_monitors()
        self.step = self._resume(data_record)
        if self.rank == 0:
            record_start(config, data_record, self.step)
        self.writer = MetricsWriter(self.output_dir, self.step, self.objectives.cards) if self.rank == 0 else None
        self.doctor = Doctor(config, self.model, self.ranks, images)
        print_once(describe_run(self.model, self.doctor.facts.trained, images, self.ranks, self.layout))
        self.doctor.examine()

    def _make_monitors(self) -> None:
        """Create what monitors the training: health, timers, watchdog; and checkpoints. Collective."""
        config = self.config
        self.health = StepHealth(config.health, config.global_batch_size, self.ranks.data_group)
        self.timer = RankTimer(self.device)
        self.watchdog = Watchdog(config.health.hang_minutes * 60)
        self.checkpoints = CheckpointStore(
            self.output_dir / CHECKPOINTS_FOLDER,
            config.checkpoint.keep_last,
            config.checkpoint.keep_every,
            asynchronous=config.checkpoint.asynchronous,
            run_id=config.run_id,
        )

    def _resume(self, data_record: DataRecord) -> int:
        """Load the checkpoint to resume from and return its step, or 0 if there is none. Collective."""
        path = self.checkpoints.newest_valid()
        if path is not None:
            print_once(f"resumed from {path}")
            state = self.checkpoints.load(self.engine, path)
            self.objectives.meter.load_state_dict(state["meter"])
            if "health" in state:  # missing in checkpoints of older versions
                self.health.load_state_dict(state["health"])
            if self.rank == 0:
                self.checkpoints.clean_up(path)
            return state["step"]
        if self.origin is None:
            return 0
        path = self.origin.newest_checkpoint()
        changes = origin_differences(self.config, self.origin, data_record)
        print_once(f"a new run from {path}" + "".join(f"; {change}" for change in changes))
        return self.checkpoints.load(self.engine, path, same_run=False)["step"]

    def train(self) -> bool:
        """Train up to ``max_steps``; the last step writes a checkpoint and draws samples.

        Returns:
            False when the run was stopped before that, with a checkpoint to resume from.
        """
        config = self.config
        if self.step >= config.max_steps:
            print_once(f"{self.output_dir} is already trained to step {self.step} of max_steps {config.max_steps}")
        if self.writer and self.step == 0:
            self.writer.text("config", to_yaml(config))
        batches, progress = self._make_batches(), self._make_progress_bar()
        self._logged_step, self._logged_time = self.step, time.perf_counter()
        self.watchdog.start()
        stopped = False
        try:
            while self.step < config.max_steps and not stopped:
                logs = self._is_due(config.logging.every, self.step + 1)
                gradient_norms = self.train_step(batches, report_gradients=logs)
                progress.update()
                self._end_if_all_are_skipped()
                if logs:
                    progress.set_postfix(loss=f"{self._log(gradient_norms):.4f}")
                draws = self._is_due(config.sample.every, self.step)
                if draws:
                    self._enter("sampling")
                    self.objectives.draw(self.engine, self.writer, self.step)
                self._enter("after the step")
                stopped = self.step < config.max_steps and self.stop.poll(wait=draws)
                self._save_if_due(stopped)
        except BaseException:
            self.checkpoints.wait(ABANDON_SECONDS)  # let a background write finish
            raise
        progress.close()
        self._finish(stopped)
        return not stopped

    def _make_batches(self) -> Iterator[dict[str, Batch]]:
        """Return this rank's micro-batches of every objective up to the last step."""
        steps = {"first_step": self.step, "last_step": self.config.max_steps}
        return iter(
            make_loader(self.objectives.samples, self.layout, **steps, num_workers=self.config.data.num_workers)
        )

    def _make_progress_bar(self) -> tqdm:
        return progress_bar(
            total=self.config.max_steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=self.rank != 0,
            mininterval=1.0,
        )

    def _is_due(self, every: int, step: int) -> bool:
        """Return whether ``step`` is a multiple of ``every`` or the last step; ``every`` 0 means never."""
        return every > 0 and (step % every == 0 or step == self.config.max_steps)

    def _finish(self, stopped: bool) -> None:
        """Shut the run down cleanly, whether it finished or was stopped. Collective."""
        self.watchdog.stop()
        self.stop.finish(stopped=stopped)
        self.lock.release()
        if stopped:
            print_once(f"stopped at step {self.step} with a checkpoint; the same command resumes the run")

    def train_step(self, batches: Iterator[dict[str, Batch]], *, report_gradients: bool) -> dict[str, Tensor]:
        """Run one optimizer step: all micro-batches forward and backward, then the update.

        Args:
            batches: iterator of this rank's micro-batches, objective -> batch.
            report_gradients: whether to measure gradient norms.

        Returns:
            Gradient norm before clipping per parameter group label; empty unless requested, or if the step was skipped.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, self.step)
        norms, trained, skipped_before = {}, [], self.engine.skipped_steps
        for micro_step in range(self.layout.accumulation_steps):
            self._enter("data", micro_step)
            with self.timer.on_host():
                batch = {name: part.to(self.device) for name, part in next(batches).items()}
            self._enter("forward", micro_step)
            with self.timer.on_device():
                loss, rows = self.objectives.compute_losses(self.engine, batch)
            self._enter("backward", micro_step)
            self.engine.backward(loss)
            trained.append(rows)
            if report_gradients and micro_step == self.layout.accumulation_steps - 1:
                norms = labelled_gradient_norms(self.engine, self.group_labels)
            self._enter("optimizer step", micro_step)
            self.engine.step()
        self.step += 1
        rows = join_rows(trained)
        if self.engine.skipped_steps > skipped_before:  # the same on all ranks: DeepSpeed reduces it
            entry = self.health.step_skipped(self.step, self.objectives.losses_by_metric(rows))
            print_once(f"step {self.step} skipped because its loss or gradient is not finite: {entry}")
            return {}
        self.health.step_done(self.step, self.objectives.record(rows))
        return norms

    def _end_if_all_are_skipped(self) -> None:
        """Abort a run after ``max_skipped_steps`` consecutive skipped steps, with a checkpoint of the state before them.

        Raises:
            UserError: in that case.
        """
        count = self.health.consecutive_skips
        if count < self.config.health.max_skipped_steps:
            return
        before = self.step - count
        self._save(before_skipped=True)
        if before == 0:
            where = "are those the run started with"
        elif self.checkpoints.wait():
            where = f"are in {self.checkpoints.folder / step_name(before)}"
        else:
            where = "could not be saved; the newest checkpoint is an earlier one"
        self._log({})
        raise UserError(
            f"health.max_skipped_steps: {count} consecutive steps, {before + 1} to {self.step}, were skipped because their loss "
            f"or gradient is not finite (samples in metrics.jsonl); the weights before them {where}; accepted: fixed data (with "
            "--data.allow_changed true), or another output_dir with --resume CHECKPOINT and a smaller optimizer.lr"
        )

    def _log(self, gradient_norms: dict[str, Tensor]) -> float:
        """Log the steps since the last report and return their mean loss. Collective."""
        self._enter("logging")
        losses = self.objectives.report()
        health = self.health.report()
        self.objectives.log(self.engine, self.writer, self.step)
        now = time.perf_counter()
        steps, seconds = self.step - self._logged_step, now - self._logged_time
        self._logged_step, self._logged_time = self.step, now
        ranks = self.timer.report(steps)
        if self.doctor.facts.seconds_per_step is None:
            self.doctor.examine(seconds / steps)
        for spike in health.get("loss_spikes", []):
            print_once(
                "loss spike: step {step} has loss {loss:.4g}, {ratio:.3g} times the median before".format(**spike)
            )
        if self.writer:
            metrics = {
                **losses,
                "lr": learning_rate(self.config.optimizer, self.step - 1),
                "grad_norm": float(self.engine.get_global_grad_norm()),
                "samples_per_second": steps * self.config.global_batch_size / seconds,
                "samples": self.step * self.config.global_batch_size,
                "skipped_steps": self.engine.skipped_steps,
                "failed_saves": self.checkpoints.failed_saves,
                "failed_logs": failed_logs(),
                **health,
                **ranks,
            }
            metrics |= {f"grad_norm_{label}": float(norm) for label, norm in gradient_norms.items()}
            self.writer.scalars(self.step, metrics)
        return losses["loss"]

    def _save_if_due(self, stopped: bool) -> None:
        """Save a checkpoint if one is due or the run ends; the one at the end must succeed. Collective.

        While steps are being skipped no periodic checkpoint is saved: the newest one stays that of the state before them.
        """
        last = self.step == self.config.max_steps
        if last or stopped or (self.step % self.config.checkpoint.every == 0 and not self.health.consecutive_skips):
            self._save(before_skipped=not last)
        if (last or stopped) and not self.checkpoints.wait():
            raise UserError(
                f"output_dir: the checkpoint of step {self.step}, the last one of this run, could not be written to "
                f"{self.checkpoints.folder}; the same command resumes from the previous checkpoint"
            )

    def _save(self, *, before_skipped: bool = False) -> None:
        """Save a checkpoint, possibly in the background. Collective.

        Args:
            before_skipped: if the newest steps were skipped, save the state before them, so that resuming retries them.
        """
        self._enter("checkpoint")
        count = self.health.consecutive_skips if before_skipped else 0
        step = self.step - count
        if step == 0:
            return
        # Skipped steps left the weights unchanged; only counters moved.
        self._move_counters(-count)
        state = {
            "step": step,
            "meter": self.objectives.meter.state_dict(),
            "health": self.health.state_dict(forget_skipped=count),
        }
        self.checkpoints.save(self.engine, step, state)
        self._move_counters(count)

    def _move_counters(self, skipped_steps: int) -> None:
        self.engine.global_steps += skipped_steps
        self.engine.skipped_steps += skipped_steps
        self.engine.global_samples += skipped_steps * self.config.global_batch_size

    def _enter(self, phase: str, micro_step: int = 0) -> None:
        """Tell the watchdog which phase of the current step this rank enters."""
        trained = PHASES.index(phase) >= PHASES.index("logging")
        self.watchdog.enter(self.step if trained else self.step + 1, phase, micro_step)
