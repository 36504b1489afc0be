"""The training loop: the outer part says what happens, ``train_step`` says how.

    while step < max_steps: train a step, log, draw samples, save a checkpoint

Everything random is a function of (seed, global sample index), so resuming needs the step and the weights and nothing else.
"""

import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from tqdm import tqdm

from latte_flow.model.codecs import LatentCodec
from latte_flow.model.context import tokenize_prompts, truncate_prompts
from latte_flow.model.flow_matching import flow_matching_loss, interpolate
from latte_flow.model.images import to_pil
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.training.checkpoint.formats.source import read_export_record
from latte_flow.training.checkpoint.manifest import CHECKPOINTS_FOLDER, MODEL_FOLDER, read_manifest, step_name
from latte_flow.training.checkpoint.model_folder import PIPELINE_FILE
from latte_flow.training.checkpoint.store import CheckpointStore, newest_valid
from latte_flow.training.components import build_components
from latte_flow.training.configs.deepspeed import load_deepspeed_config
from latte_flow.training.configs.fields import TrainingConfig
from latte_flow.training.configs.saved import CONFIG_FILE, differences, load_config, save_config, to_yaml
from latte_flow.training.data.context_cache import (
    ContextSource,
    FixedContextCache,
    PromptEncoder,
    context_capacity,
    make_context_source,
)
from latte_flow.training.data.datasets import ImageDataset, load_image_dataset
from latte_flow.training.data.loader import make_loader
from latte_flow.training.data.record import DataRecord
from latte_flow.training.distributed.batch_layout import make_batch_layout
from latte_flow.training.distributed.ranks import arrange_ranks
from latte_flow.training.distributed.zero import mark_universal
from latte_flow.training.errors import UserError
from latte_flow.training.initial_weights import find_initial_weights, load_initial_weights
from latte_flow.training.monitor.health import StepHealth
from latte_flow.training.monitor.metrics import LossMeter, MetricsWriter, expert_gradient_norms
from latte_flow.training.monitor.preemption import StopRequest
from latte_flow.training.monitor.sample_grid import SampleGrid, samples_per_rank
from latte_flow.training.monitor.stragglers import RankTimer
from latte_flow.training.monitor.watchdog import PHASES, Watchdog
from latte_flow.training.objectives.flow_matching import Batch, FlowMatchingSamples
from latte_flow.training.optimizer import AdamWWithEMA, parameter_groups
from latte_flow.training.run_folder import DATA_FILE, check_output_dir, find_origin, write_components

ABANDON_SECONDS = 600.0
"""How long a run that ends by an error waits for a checkpoint that is being written."""


class Trainer:
    """Trains one configuration; builds everything, resumes what the output_dir holds.

    Args:
        config: the run.

    Raises:
        UserError: when the configuration or the output_dir does not allow the run; nothing has been overwritten then.
    """

    def __init__(self, config: TrainingConfig):
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.rank = dist.get_rank()
        self.ranks = arrange_ranks(config.tensor_parallel, config.health.patience)
        self.device = torch.device(get_accelerator().current_device_name())
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32

        check_output_dir(config)
        self.origin, initial = find_origin(config), find_initial_weights(config)
        dist.barrier()  # the stop request removes a file that others look at
        self.stop = StopRequest(self.output_dir, self.device)
        images = load_image_dataset(config.data)
        data_record = DataRecord(images, self.output_dir / DATA_FILE, allow_changed=config.data.allow_changed)
        data_record.verify()
        start = self.origin or initial
        is_new = not (self.output_dir / MODEL_FOLDER / PIPELINE_FILE).is_file()
        vlm, self.tokenizer, codec, model_config, pipeline_config = build_components(
            config, images, start.components if start and is_new else self.output_dir / MODEL_FOLDER
        )
        experts = model_config.timestep_experts()
        self.layout = make_batch_layout(
            config, num_groups=experts.num_groups, world_size=self.ranks.data_size, rank=self.ranks.data_rank
        )
        deepspeed_config = load_deepspeed_config(config, self.layout)

        torch.manual_seed(config.seed)
        model = LatteFlowModel.from_vlm(vlm, model_config)
        if initial is not None:
            self._say(load_initial_weights(model, initial))
        self.ranks.split_model(model)
        model.freeze_unreached_parameters()
        mark_universal(model, self.ranks.tensor_size)
        groups = parameter_groups(model, config.optimizer.weight_decay)
        self.group_labels = [group["name"] for group in groups]
        optimizer = AdamWWithEMA(
            groups,
            ema_decay=config.optimizer.ema_decay,
            lr=config.optimizer.lr,
            betas=tuple(config.optimizer.betas),
            fused=True,
        )
        self.codec: LatentCodec = codec.to(self.device)
        prompts = [*images.prompts, config.data.null_prompt]
        self.messages = truncate_prompts(self.tokenizer, prompts, config.data.max_prompt_tokens)
        cut = sum(ours != whole for ours, whole in zip(self.messages, prompts, strict=True))
        if cut:
            self._say(
                f"data.max_prompt_tokens: {cut} of {len(prompts)} prompts are cut to {config.data.max_prompt_tokens} tokens"
            )
        null_row = len(images.prompts)
        if model_config.variant == "couple":
            reader = self.ranks.split_frozen(vlm)
            self.contexts, self.prompt_inputs = self._make_context_source(reader, model_config.context_projection), None
        else:
            self.contexts = None
            tokens = tokenize_prompts(self.tokenizer, self.messages)
            self.prompt_inputs = {name: t.to(self.device) for name, t in tokens.items()}
        dist.barrier()  # nobody writes before all have read what the run has
        if self.rank == 0:
            write_components(config, model.config, pipeline_config, vlm=vlm, tokenizer=self.tokenizer)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config, mpu=self.ranks.mpu
        )
        self.model: LatteFlowModel = self.engine.module

        self.samples = FlowMatchingSamples(
            images,
            experts,
            latent_shape=(model_config.latent_channels, *model_config.latent_size),
            seed=config.seed,
            condition_drop=config.data.condition_drop,
            null_row=null_row,
            horizontal_flip=config.data.horizontal_flip,
            groups_per_sample=config.groups_per_sample,
        )
        self.grid = SampleGrid(config.sample, self.codec, self.contexts, self.prompt_inputs, null_row, self.ranks)
        group = self.ranks.data_group
        self.meter = LossMeter(experts.num_groups, config.logging.timestep_bins, self.device, group)
        self.health = StepHealth(config.health, config.global_batch_size, group)
        self.timer = RankTimer(self.device)
        self.watchdog = Watchdog(config.health.hang_minutes * 60)
        settings = config.checkpoint
        self.checkpoints = CheckpointStore(
            self.output_dir / CHECKPOINTS_FOLDER,
            settings.keep_last,
            settings.keep_every,
            asynchronous=settings.asynchronous,
        )
        self.step = self._resume()
        if self.rank == 0:
            # max_steps and the like may differ from what the run had so far.
            save_config(self.config, self.output_dir / CONFIG_FILE)
            data_record.update(self.step)
        self.writer = MetricsWriter(self.output_dir, self.step) if self.rank == 0 else None
        self._say(self._describe(images))

    def _make_context_source(self, vlm, projection: str) -> ContextSource:
        """Return where a frozen VLM's context of the prompts is read from, and say which way that is."""
        config = self.config
        encoder = PromptEncoder(vlm.to(self.device), self.tokenizer, self.messages, projection, self.dtype)
        try:
            capacity = context_capacity(
                config.vlm.context_cache,
                num_prompts=encoder.num_prompts,
                bytes_per_prompt=encoder.bytes_per_prompt(),
                budget=config.vlm.context_cache_gib * 2**30,
                batch_prompts=max(self.layout.micro_batch_size, samples_per_rank(config.sample, self.ranks) + 1),
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        size = f"{encoder.num_prompts} prompts of {encoder.bytes_per_prompt() / 2**20:.3g} MiB each"
        kept = {0: "none", encoder.num_prompts: "all"}.get(capacity, f"the {capacity} most recently used")
        self._say(f"context of the frozen VLM: {kept} of {size} kept on the device")
        source = make_context_source(encoder, capacity)
        if isinstance(source, FixedContextCache):
            vlm.cpu()  # all that training reads of it is in the cache
        return source

    def train(self) -> bool:
        """Train up to ``max_steps``, then leave a checkpoint and a sample grid of the last step.

        Returns:
            False when the run was asked to stop before that and left a checkpoint to go on from.
        """
        config = self.config
        if self.step >= config.max_steps:
            self._say(f"{self.output_dir} is already trained to step {self.step} of max_steps {config.max_steps}")
        if self.writer and self.step == 0:
            self.writer.text("config", to_yaml(config))
        loader = make_loader(
            self.samples,
            self.layout,
            first_step=self.step,
            last_step=config.max_steps,
            num_workers=config.data.num_workers,
        )
        batches = iter(loader)
        progress = tqdm(
            total=config.max_steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=self.rank != 0,
            mininterval=1.0,
        )
        self._logged_step, self._logged_time = self.step, time.perf_counter()
        self.watchdog.start()
        stopped = False
        try:
            while self.step < config.max_steps and not stopped:
                stopped = self._train_once(batches, progress)
        except BaseException:
            self.checkpoints.wait(ABANDON_SECONDS)  # one that is being written in the background is worth waiting for
            raise
        progress.close()
        self.watchdog.stop()
        if self.writer:
            self.writer.close()
        self.stop.finish(stopped=stopped)
        if stopped:
            self._say(f"stopped at step {self.step} with a checkpoint; the same command resumes the run")
        return not stopped

    def _train_once(self, batches, progress: tqdm) -> bool:
        """Train a step and do all that is due after it; return whether the run was asked to stop."""
        config = self.config
        logs = (self.step + 1) % config.logging.every == 0 or self.step + 1 == config.max_steps
        gradient_norms = self.train_step(batches, report_gradients=logs)
        progress.update()
        last = self.step == config.max_steps
        if self.health.skipped_in_a_row >= config.health.max_skipped_steps:
            self._give_up()
        if logs:
            progress.set_postfix(loss=f"{self._log(gradient_norms):.4f}")
        draws = config.sample.every and (last or self.step % config.sample.every == 0)
        if draws:
            self._draw_samples()
        self._enter("after the step")
        stopped = not last and self.stop.poll(wait=bool(draws))
        # In a row of skipped steps nothing is saved that is not asked for: the newest checkpoint stays the one from before.
        if last or stopped or (self.step % config.checkpoint.every == 0 and not self.health.skipped_in_a_row):
            self._save(before_skipped=not last)
        if (last or stopped) and not self.checkpoints.wait():
            raise UserError(
                f"output_dir: the checkpoint of step {self.step}, at which the run ends, could not be written to "
                f"{self.checkpoints.folder}; the same command resumes from the one before"
            )
        return stopped

    def train_step(self, batches, *, report_gradients: bool) -> dict[str, Tensor]:
        """Do one optimizer step: every micro-batch forward and backward, then the update.

        Args:
            batches: iterator of this rank's micro-batches.
            report_gradients: whether to measure the gradient norms of the experts.

        Returns:
            Gradient norm per parameter group label before clipping; empty unless asked for.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        norms, trained, skipped_before = {}, [], self.engine.skipped_steps
        for micro_step in range(self.layout.accumulation_steps):
            self._enter("data", micro_step)
            with self.timer.on_host():
                batch = next(batches).to(self.device)
            self._enter("forward", micro_step)
            with self.timer.on_device():
                losses = self.compute_losses(batch)
            self._enter("backward", micro_step)
            self.engine.backward(losses.mean())
            trained.append((losses.detach(), batch.groups, batch.timesteps, batch.sample_indices))
            if report_gradients and micro_step == self.layout.accumulation_steps - 1:
                norms = expert_gradient_norms(self.engine, self.group_labels)
            self._enter("optimizer step", micro_step)
            self.engine.step()
        self.step += 1
        losses = torch.cat([losses for losses, *_ in trained])
        if self.engine.skipped_steps > skipped_before:  # the same on all ranks: DeepSpeed asks all of them
            entry = self.health.step_skipped(self.step, losses, torch.cat([indices for *_, indices in trained]))
            self._say(f"step {self.step} skipped, its loss or gradient is not finite: {entry}")
            return {}
        for losses_of_rows, groups, timesteps, _ in trained:
            self.meter.update(losses_of_rows, groups, timesteps)
        self.health.step_done(self.step, losses)
        return norms

    def _give_up(self) -> None:
        """End a run whose newest steps were all skipped, with a checkpoint of the state before them.

        Raises:
            UserError: always.
        """
        count = self.health.skipped_in_a_row
        before = self.step - count
        self._save(before_skipped=True)
        if before == 0:
            where = "are those that the run started with"
        elif self.checkpoints.wait():
            where = f"are in {self.checkpoints.folder / step_name(before)}"
        else:
            where = "could not be saved; the newest checkpoint is an earlier one"
        self._log({})
        raise UserError(
            f"health.max_skipped_steps: steps {before + 1} to {self.step}, {count} in a row, were skipped because their loss or "
            f"gradient is not finite (samples in metrics.jsonl); the weights before them {where}; accepted: mended data (with "
            "--data.allow_changed true), or another output_dir with --resume CHECKPOINT and a smaller optimizer.lr"
        )

    def compute_losses(self, batch: Batch) -> Tensor:
        """Return the flow-matching loss of each row of a batch, [rows] (paper Eq. 1)."""
        with torch.no_grad():
            latents = batch.latents if batch.latents is not None else self.codec.encode(batch.images)
            data = latents.float()[batch.image_rows]
        noisy = interpolate(data, batch.noise, batch.timesteps)
        context, rows = None, batch.context_rows
        if self.contexts is not None:
            context, rows = self.contexts.lookup(rows)
        velocity = self.engine(
            noisy,
            batch.timesteps,
            context=context,
            context_rows=rows.to(self.device, non_blocking=True),
            prompt_inputs=self.prompt_inputs,
        )
        return flow_matching_loss(velocity, data, batch.noise)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update after ``step`` steps: linear warm-up, then constant."""
        return self.config.optimizer.lr * min(1.0, (step + 1) / max(self.config.optimizer.warmup_steps, 1))

    def _log(self, gradient_norms: dict[str, Tensor]) -> float:
        """Report the steps since the last report; return their mean loss. Collective."""
        self._enter("logging")
        losses = self.meter.compute()
        health = self.health.report()
        with torch.no_grad():  # on every rank: under ZeRO-3 running a module gathers its weights, a collective
            gates = self.ranks.gather_heads(self.model.gate_values(torch.linspace(1000, 0, 21, device=self.device)))
        now = time.perf_counter()
        steps, seconds = self.step - self._logged_step, now - self._logged_time
        self._logged_step, self._logged_time = self.step, now
        ranks = self.timer.report(steps)
        for spike in health.get("loss_spikes", []):
            self._say(
                "loss spike: step {step} has loss {loss:.4g}, {ratio:.3g} times the median before".format(**spike)
            )
        if self.writer:
            metrics = {
                **losses,
                "lr": self.learning_rate(self.step - 1),
                "grad_norm": float(self.engine.get_global_grad_norm()),
                "samples_per_second": steps * self.config.global_batch_size / seconds,
                "samples": self.step * self.config.global_batch_size,
                "skipped_steps": self.engine.skipped_steps,
                "failed_saves": self.checkpoints.failed_saves,
                **health,
                **ranks,
            }
            metrics |= {f"grad_norm_{label}": float(norm) for label, norm in gradient_norms.items()}
            self.writer.scalars(self.step, metrics)
            self.writer.gates(self.step, gates)
        return losses["loss"]

    def _draw_samples(self) -> None:
        """Draw the sample grid and put it into samples/ and TensorBoard. Collective."""
        self._enter("sampling")
        grid = self.grid.draw(self.engine)
        if self.writer:
            path = self.output_dir / "samples" / f"{step_name(self.step)}.png"
            path.parent.mkdir(exist_ok=True)
            to_pil(grid).save(path)
            self.writer.image(self.step, "samples", grid)
            self.writer.flush()

    def _save(self, *, before_skipped: bool = False) -> None:
        """Save a checkpoint, which may go on in the background. Collective.

        Args:
            before_skipped: when the newest steps were skipped, save the state before them: a start from there tries them again.
        """
        self._enter("checkpoint")
        count = self.health.skipped_in_a_row if before_skipped else 0
        step = self.step - count
        if step == 0:
            return
        # Skipped steps have left the weights as they were; only counters have moved.
        self._move_counters(-count)
        state = {"step": step, "meter": self.meter.state_dict(), "health": self.health.state_dict(forget_skipped=count)}
        self.checkpoints.save(self.engine, step, state)
        self._move_counters(count)

    def _move_counters(self, skipped_steps: int) -> None:
        self.engine.global_steps += skipped_steps
        self.engine.skipped_steps += skipped_steps
        self.engine.global_samples += skipped_steps * self.config.global_batch_size

    def _enter(self, phase: str, micro_step: int = 0) -> None:
        """Tell the watchdog what this rank begins to do in the step at hand, or after it."""
        trained = PHASES.index(phase) >= PHASES.index("logging")
        self.watchdog.enter(self.step if trained else self.step + 1, phase, micro_step)

    def _resume(self) -> int:
        """Load the checkpoint that the run goes on from and return its step; 0 when the run starts from nothing."""
        path = self.checkpoints.newest_valid()
        if path is not None:
            self._say(f"resumed from {path}")
            state = self.checkpoints.load(self.engine, path)
            self.meter.load_state_dict(state["meter"])
            if "health" in state:  # checkpoints of older versions have none
                self.health.load_state_dict(state["health"])
            if self.rank == 0:
                self.checkpoints.clean_up(path)
            return state["step"]
        if self.origin is None:
            return 0
        path = newest_valid(self.origin.checkpoints, read_export_record if self.origin.exported else read_manifest)
        changes = differences(load_config(self.origin.config_file), self.config)
        self._say(f"a new run from {path}" + "".join(f"; {change}" for change in changes))
        return self.checkpoints.load(self.engine, path, same_run=False)["step"]

    def _describe(self, images: ImageDataset) -> str:
        """Return in two lines what is trained, on what, and how the batch is spread."""
        model, layout, experts = self.model, self.layout, self.model.experts
        trained = sum(self.ranks.whole_size(name, p) for name, p in model.named_parameters() if p.requires_grad)
        tensor_size = self.ranks.tensor_size
        whom = "ranks" if tensor_size == 1 else f"sets of {tensor_size} tensor-parallel ranks"
        return (
            f"{model.config.variant}: {trained / 1e6:.2f} M trained parameters, {experts.num_groups} groups of "
            f"{experts.group_size} layers, attention by {model.layers[0].spec.backend}\n"
            f"{images.name}: {len(images)} images, {len(images.prompts)} prompts; batch {layout.global_batch_size} = "
            f"{layout.world_size} {whom} x {layout.micro_batch_size} x {layout.accumulation_steps} accumulation steps"
        )

    def _say(self, message: str) -> None:
        if self.rank == 0:
            print(message, flush=True)
