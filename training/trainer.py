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

from model.autoencoder import LatentCodec
from model.context import tokenize_prompts, truncate_prompts
from model.context_cache import ContextSource, FixedContextCache, PromptEncoder, context_capacity, make_context_source
from model.flow_matching import flow_matching_loss, interpolate
from model.images import grid_scale, make_grid, to_pil, to_uint8
from model.latte_flow import LatteFlowModel
from model.pipeline import PIPELINE_FILE, LatteFlowPipeline
from model.sampling import image_seeds, initial_noise, sample_latents
from model.vlm import build_tiny_image_processor, load_image_processor
from training.checkpoint import MODEL_FOLDER, CheckpointStore, step_name
from training.components import build_components, parameter_groups
from training.config import TrainingConfig, differences, load_config, save_config, to_yaml
from training.data.datasets import ImageDataset, load_image_dataset
from training.data.loader import Batch, FlowMatchingSamples, make_loader
from training.data.record import check_same_data, read_record, verify_data, write_record
from training.deepspeed_config import load_deepspeed_config, make_batch_layout
from training.ema import AdamWWithEMA, ema_weights
from training.errors import UserError
from training.metrics import LossMeter, MetricsWriter, expert_gradient_norms
from training.preemption import REQUEUE_FILE, STOP_FILE, StopRequest

CONFIG_FILE = "config.yaml"
DATA_FILE = "data.json"


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
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(get_accelerator().current_device_name())
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32

        self._check_output_dir()
        self.stop = StopRequest(self.output_dir, self.device)
        images = load_image_dataset(config.data)
        data_file = self.output_dir / DATA_FILE
        data_record = read_record(data_file)
        data_are_new = check_same_data(images, data_record, allow_changed=config.data.allow_changed)
        if data_are_new:
            verify_data(images)
        vlm, self.tokenizer, codec, model_config, self.pipeline_config = build_components(
            config, images, self.output_dir / MODEL_FOLDER
        )
        experts = model_config.timestep_experts()
        self.layout = make_batch_layout(
            config, num_groups=experts.num_groups, world_size=self.world_size, rank=self.rank
        )
        deepspeed_config = load_deepspeed_config(config, self.layout)

        torch.manual_seed(config.seed)
        model = LatteFlowModel.from_vlm(vlm, model_config)
        model.freeze_unreached_parameters()
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
        self.null_row = len(images.prompts)
        if model_config.variant == "couple":
            self.contexts, self.prompt_inputs = self._make_context_source(vlm, model_config.context_projection), None
        else:
            self.contexts = None
            tokens = tokenize_prompts(self.tokenizer, self.messages)
            self.prompt_inputs = {name: t.to(self.device) for name, t in tokens.items()}
        if self.rank == 0:
            self._write_components(model, vlm)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config)
        self.model: LatteFlowModel = self.engine.module

        self.samples = FlowMatchingSamples(
            images,
            experts,
            latent_shape=(model_config.latent_channels, *model_config.latent_size),
            seed=config.seed,
            condition_drop=config.data.condition_drop,
            null_row=self.null_row,
            horizontal_flip=config.data.horizontal_flip,
            groups_per_sample=config.groups_per_sample,
        )
        self.meter = LossMeter(experts.num_groups, config.logging.timestep_bins, self.device)
        self.checkpoints = CheckpointStore(
            self.output_dir / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_every
        )
        self.step = self._resume()
        if self.rank == 0:
            # max_steps and the like may differ from what the run had so far.
            save_config(self.config, self.output_dir / CONFIG_FILE)
            if data_are_new:
                write_record(images, data_file, data_record, self.step)
        if data_are_new and data_record:
            self._say(
                f"data.allow_changed: {images.name} has changed (fingerprint {data_record['fingerprint']} before, "
                f"{images.fingerprint} now); the run goes on with the changed data"
            )
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
                batch_prompts=max(self.layout.micro_batch_size, self._samples_per_rank + 1),
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
        stopped = False
        while self.step < config.max_steps and not stopped:
            logs = (self.step + 1) % config.logging.every == 0 or self.step + 1 == config.max_steps
            gradient_norms = self.train_step(batches, report_gradients=logs)
            progress.update()
            last = self.step == config.max_steps
            if logs:
                progress.set_postfix(loss=f"{self._log(gradient_norms):.4f}")
            draws = config.sample.every and (last or self.step % config.sample.every == 0)
            if draws:
                self._draw_samples()
            stopped = not last and self.stop.poll(wait=bool(draws))
            if (last or stopped or self.step % config.checkpoint.every == 0) and not self._save() and (last or stopped):
                raise UserError(
                    f"output_dir: the checkpoint of step {self.step}, at which the run ends, could not be written to "
                    f"{self.checkpoints.folder}; the same command resumes from the one before"
                )
        progress.close()
        if self.writer:
            self.writer.close()
        self.stop.finish(stopped=stopped)
        if stopped:
            self._say(f"stopped at step {self.step} with a checkpoint; the same command resumes the run")
        return not stopped

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
        norms = {}
        for micro_step in range(self.layout.accumulation_steps):
            batch = next(batches).to(self.device)
            losses = self.compute_losses(batch)
            self.meter.update(losses, batch.groups, batch.timesteps)
            self.engine.backward(losses.mean())
            if report_gradients and micro_step == self.layout.accumulation_steps - 1:
                norms = expert_gradient_norms(self.engine, self.group_labels)
            self.engine.step()
        self.step += 1
        return norms

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
        losses = self.meter.compute()
        with torch.no_grad():  # on every rank: under ZeRO-3 running a module gathers its weights, a collective
            gates = self.model.gate_values(torch.linspace(1000, 0, 21, device=self.device))
        now = time.perf_counter()
        steps, seconds = self.step - self._logged_step, now - self._logged_time
        self._logged_step, self._logged_time = self.step, now
        if self.writer:
            metrics = {
                **losses,
                "lr": self.learning_rate(self.step - 1),
                "grad_norm": float(self.engine.get_global_grad_norm()),
                "samples_per_second": steps * self.config.global_batch_size / seconds,
                "samples": self.step * self.config.global_batch_size,
                "skipped_steps": self.engine.skipped_steps,
                "failed_saves": self.checkpoints.failed_saves,
            }
            metrics |= {f"grad_norm_{label}": float(norm) for label, norm in gradient_norms.items()}
            self.writer.scalars(self.step, metrics)
            self.writer.gates(self.step, gates)
        return losses["loss"]

    def _draw_samples(self) -> None:
        """Draw the fixed-seed grid from the averaged weights; each rank draws its share. Collective."""
        config, model_config = self.config.sample, self.model.config
        share = self._samples_per_rank
        first = self.rank * share
        rows = torch.cat([torch.arange(first, first + share) % self.null_row, torch.tensor([self.null_row])])
        noise = initial_noise(
            image_seeds(config.seed, first, share), (model_config.latent_channels, *model_config.latent_size)
        )
        with ema_weights(self.engine), torch.no_grad():
            if self.contexts is not None:
                context, rows = self.contexts.lookup(rows)
            else:
                distinct, rows = torch.unique(rows.to(self.device), return_inverse=True)
                context = self.model.encode_context({n: tokens[distinct] for n, tokens in self.prompt_inputs.items()})
            latents = sample_latents(
                self.model,
                noise,
                context.gather(rows[:-1]),
                context.gather(rows[-1:]),
                num_steps=config.num_steps,
                cfg_scale=config.cfg_scale,
                solver=config.solver,
            )
        images = self.codec.decode(latents).float().contiguous()
        parts = [torch.empty_like(images) for _ in range(self.world_size)]
        dist.all_gather(parts, images)
        if self.writer:
            pixels = to_uint8(torch.cat(parts)[: config.num_images])
            columns = min(10 if self.null_row % 10 == 0 else 8, len(pixels))
            grid = make_grid(pixels, columns, scale=grid_scale(self.config.data.resolution))
            path = self.output_dir / "samples" / f"{step_name(self.step)}.png"
            path.parent.mkdir(exist_ok=True)
            to_pil(grid).save(path)
            self.writer.image(self.step, "samples", grid)
            self.writer.flush()

    @property
    def _samples_per_rank(self) -> int:
        """How many images of a grid a rank draws: equal shares, so that every rank runs the same modules equally often."""
        return -(-self.config.sample.num_images // self.world_size)

    def _save(self) -> bool:
        """Save a checkpoint; return whether it could be written. Collective."""
        state = {"step": self.step, "meter": self.meter.state_dict()}
        return self.checkpoints.save(self.engine, self.step, state) is not None

    def _resume(self) -> int:
        """Load the newest valid checkpoint and return its step; 0 when the run is new."""
        path = self.checkpoints.newest_valid()
        if path is None:
            return 0
        state = self.checkpoints.load(self.engine, path)
        self.meter.load_state_dict(state["meter"])
        self._say(f"resumed from {path}")
        return state["step"]

    def _check_output_dir(self) -> None:
        """Refuse an output_dir that holds another run, before anything is written."""
        saved = self.output_dir / CONFIG_FILE
        if saved.is_file():
            changes = differences(load_config(saved), self.config)
            if changes:
                raise UserError(
                    f"output_dir: {self.output_dir} holds a run with another configuration ({'; '.join(changes)}); "
                    "accepted: the same values, or another output_dir"
                )
        elif self.output_dir.exists() and (
            not self.output_dir.is_dir()
            or any(path.name not in (STOP_FILE, REQUEUE_FILE) for path in self.output_dir.iterdir())
        ):
            raise UserError(
                f"output_dir: {self.output_dir} exists and is not a training run; accepted: a new or empty folder, or a run's"
            )
        dist.barrier()

    def _write_components(self, model: LatteFlowModel, vlm) -> None:
        """Make the output_dir of a new run complete in itself: its configuration, and the model folder without weights."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if not (self.output_dir / CONFIG_FILE).exists():
            save_config(self.config, self.output_dir / CONFIG_FILE)
        # pipeline.json is written last: without it the folder is incomplete.
        if not (self.output_dir / MODEL_FOLDER / PIPELINE_FILE).exists():
            path = self.config.vlm.path
            processor = load_image_processor(path) if path else build_tiny_image_processor(vlm.config)
            pipeline = LatteFlowPipeline(model, vlm, self.tokenizer, self.codec, self.pipeline_config, processor)
            pipeline.save_components(self.output_dir / MODEL_FOLDER)
            model.train()

    def _describe(self, images: ImageDataset) -> str:
        """Return in two lines what is trained, on what, and how the batch is spread."""
        model, layout, experts = self.model, self.layout, self.model.experts
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        return (
            f"{model.config.variant}: {trained / 1e6:.2f} M trained parameters, {experts.num_groups} groups of "
            f"{experts.group_size} layers, attention by {model.layers[0].spec.backend}\n"
            f"{images.name}: {len(images)} images, {len(images.prompts)} prompts; batch {layout.global_batch_size} = "
            f"{layout.world_size} ranks x {layout.micro_batch_size} x {layout.accumulation_steps} accumulation steps"
        )

    def _say(self, message: str) -> None:
        if self.rank == 0:
            print(message, flush=True)
