"""LatteFlowModel: the generation path of LaTtE-Flow over a VLM, as a transformers PreTrainedModel.

    noisy latent --patch embedding--> image tokens --the M layers of one group--> image head --> velocity

Couple holds the generation path only; the frozen VLM is a separate model that provides the context. Blend holds the VLM
too (``model.vlm``), shares submodules with it and trains it. Vanilla is one group without residual attention.

Shapes: B batch, C latent channels, (H, W) latent size, N image tokens, S context tokens, D hidden, E head_dim, K groups.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_utils import str_to_torch_dtype
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from latte_flow.model.attention import ContextKeyValues, Residual
from latte_flow.model.configuration import LatteFlowConfig, load_network_config
from latte_flow.model.context import Context, as_key_values, encode_context
from latte_flow.model.errors import ArgumentError
from latte_flow.model.files import locate, reading
from latte_flow.model.generation_layer import GenerationLayer, set_initial_std
from latte_flow.model.position import float32_positions, rotary_2d


class ImageIO(nn.Module):
    """Patch embedding, time embedding and image head: the input and output of a group's layers (paper section 3).

    The head is RMS norm, scale and shift by the time embedding, and a linear map; both of its linears start at zero, so a new
    model predicts zero velocity.
    """

    def __init__(self, config: LatteFlowConfig):
        super().__init__()
        hidden = config.hidden_size
        patch_channels = config.latent_channels * config.patch_size**2
        self.patch_size = config.patch_size
        self.token_grid = config.token_grid
        self.timestep_features = Timesteps(config.timestep_frequencies, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(config.timestep_frequencies, hidden)
        self.patch_embed = nn.Linear(patch_channels, hidden)
        self.head_norm = LlamaRMSNorm(hidden, eps=config.text_config.rms_norm_eps)
        self.head_modulation = set_initial_std(nn.Linear(hidden, 2 * hidden), 0.0)
        self.head = set_initial_std(nn.Linear(hidden, patch_channels), 0.0)
        # Tokens and h_t get unit scale at any width: at transformers' fixed 0.02 the time embedding of a narrow model would be
        # near zero, and so would everything that it modulates.
        for linear in (self.time_embed.linear_1, self.time_embed.linear_2):
            set_initial_std(linear, linear.in_features**-0.5)
        # The layers see tokens through an RMS norm, which keeps their direction only. Without a bias the token of a one-channel
        # latent would be a multiple of one vector, and all but its sign would be lost.
        set_initial_std(self.patch_embed, patch_channels**-0.5, bias_std=patch_channels**-0.5)

    def embed(self, noisy_latents: Tensor) -> Tensor:
        """Cut latents [B, C, H, W] into patches and embed them as tokens [B, N, D]."""
        p = self.patch_size
        patches = rearrange(noisy_latents, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        return self.patch_embed(patches.to(self.patch_embed.weight.dtype))

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Return the time embedding h_t [B, D] of timesteps tau [B]. The sinusoids are computed in float32."""
        features = self.timestep_features(timesteps.float())
        return self.time_embed(features.to(self.patch_embed.weight.dtype))

    def predict(self, tokens: Tensor, time_embedding: Tensor) -> Tensor:
        """Return the velocity [B, C, H, W] read from the group's last tokens [B, N, D]."""
        shift, scale = self.head_modulation(nn.functional.silu(time_embedding))[:, None, :].chunk(2, dim=-1)
        patches = self.head((1 + scale) * self.head_norm(tokens) + shift)
        p, (h, w) = self.patch_size, self.token_grid
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", p=p, q=p, h=h, w=w)


class LatteFlowModel(PreTrainedModel):
    """The flow-matching network of LaTtE-Flow.

    Build one with ``LatteFlowModel.from_vlm(vlm, config)``, which copies the VLM's weights into the generation layers, or load
    one with ``LatteFlowModel.from_pretrained(folder)``.
    """

    config_class = LatteFlowConfig
    base_model_prefix = "latte_flow"
    main_input_name = "noisy_latents"
    _no_split_modules = ["GenerationLayer"]  # noqa: RUF012  # transformers wants a list, and adds those of Blend's VLM

    def __init__(self, config: LatteFlowConfig):
        super().__init__(config)
        self.experts = config.timestep_experts()
        spec = config.attention_spec()
        vlm_layers: Iterable[nn.Module | None] = [None] * config.num_hidden_layers
        if config.variant == "blend":
            # In the type that the whole model is built in; its configuration may remember the one that it came in.
            # trust_remote_code: without an answer transformers may ask at the terminal.
            dtype = torch.get_default_dtype()
            self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config, dtype=dtype, trust_remote_code=False)
            vlm_layers = config.backbone.decoder_layers(self.vlm)
        self.image_io = nn.ModuleList(
            [ImageIO(config) for _ in range(config.num_groups if config.group_io == "per_group" else 1)]
        )
        self.layers = nn.ModuleList(
            [GenerationLayer(config, i, spec, vlm_layer) for i, vlm_layer in enumerate(vlm_layers)]
        )
        self.context_rotary = config.backbone.rotary(config.text_config)
        cos, sin = self._image_rotary()
        self.image_cos: Tensor
        self.image_sin: Tensor
        self.register_buffer("image_cos", cos, persistent=False)
        self.register_buffer("image_sin", sin, persistent=False)
        self.post_init()

    @classmethod
    def from_vlm(cls, vlm, config: LatteFlowConfig) -> "LatteFlowModel":
        """Build a model whose generation layers (and, for Blend, whose VLM) start from a VLM's weights.

        Args:
            vlm: a transformers model of a family in model/backbone.py.
            config: its ``vlm_config`` must be the VLM's.

        Raises:
            ArgumentError: when the configuration describes another VLM.
        """
        ours, theirs = config.text_config, vlm.config.text_config
        fields = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        for field in (*fields, "head_dim", "intermediate_size"):
            mine, other = getattr(ours, field, None), getattr(theirs, field, None)
            if mine != other:
                raise ArgumentError(f"vlm_config.text_config.{field}: {mine} differs from the VLM's {other}")
        model = cls(config)
        if config.variant == "blend":
            model.vlm.load_state_dict(vlm.state_dict())
        for index, vlm_layer in enumerate(config.backbone.decoder_layers(vlm)):
            model.layer(index).copy_from(vlm_layer)
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs) -> Any:
        """Load a model as transformers does, but raise an error unless the weights are exactly the network's.

        Args:
            pretrained_model_name_or_path: a folder with config.json and model.safetensors (or shards and their index), or a hub
                id. Other formats: ``latte_flow.load_pipeline``. None builds from ``config`` and ``state_dict``, which may lack
                weights: these get initial values.
            config: None for the folder's own, except that the attention backend is chosen for this machine.
            args, kwargs: transformers' own; ``dtype`` defaults to the widest type of a folder's weights, because transformers
                would take the first weight's and round the others to it.

        Raises:
            ArgumentError: when weights are missing, unknown or of another shape (the message names the first few), or see
                ``model.files.locate``.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, config=config, **kwargs)
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        locate(folder if folder.is_dir() else pretrained_model_name_or_path)
        if folder.is_dir():
            config = load_network_config(folder) if config is None else config
            kwargs["dtype"] = kwargs.get("dtype") or kwargs.pop("torch_dtype", None) or _widest_dtype(folder)
        wants_report = kwargs.pop("output_loading_info", False)
        # Into the report, which is checked here.
        kwargs |= {
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        model, report = loaded
        for what, names in (
            ("missing", sorted(report["missing_keys"])),
            ("unknown", sorted(report["unexpected_keys"])),
            ("of another shape", sorted(str(name) for name, *_ in report["mismatched_keys"])),
        ):
            if names:
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                raise ArgumentError(f"{folder}: weights: {len(names)} {what}: {shown}; they are not of this network")
        return (model, report) if wants_report else model

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        *,
        context: Context | None = None,
        context_rows: Tensor,
        prompt_inputs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Predict the velocity of a training batch whose rows are ordered by group.

        The batch is K equal parts; part k runs through group k's layers and no others (the stratified draw, section 3). Shapes
        are static and every group runs at every call.

        Args:
            noisy_latents: x_t, [B, C, H, W]; B a multiple of K.
            timesteps: tau, [B]; part k inside group k's training interval.
            context: the context of P prompts. None for Blend, which computes it here from ``prompt_inputs`` with gradients.
            context_rows: the row of the context that each sample is conditioned on, integers, [B].
            prompt_inputs: tokenized prompts (input_ids and attention_mask, [P, S]), for Blend.

        Returns:
            v, [B, C, H, W].

        Raises:
            ArgumentError: when K does not divide B, or a Couple model is given no context.
        """
        if len(noisy_latents) % self.experts.num_groups:
            raise ArgumentError(
                f"noisy_latents: got {len(noisy_latents)}; accepted: a multiple of num_groups {self.experts.num_groups}"
            )
        if context is None:
            assert prompt_inputs is not None, "a batch comes with its context, or with the tokens of its prompts"
            context = self.encode_context(prompt_inputs)
        parts = (x.chunk(self.experts.num_groups) for x in (noisy_latents, timesteps, context_rows))
        velocities = []
        for group, (latents, tau, rows) in enumerate(zip(*parts, strict=True)):
            layer_context = context.gather(rows, self.experts.layers(group))
            velocities.append(self.forward_group(latents, tau, self.project_context(layer_context), group)[0])
        return torch.cat(velocities)

    def layer(self, index: int) -> GenerationLayer:
        """Return generation layer ``index``."""
        return cast(GenerationLayer, self.layers[index])

    def image_io_of(self, group: int) -> ImageIO:
        """Return the embeddings and the head of a group: its own, or those that all share."""
        return cast(ImageIO, self.image_io[group % len(self.image_io)])

    def forward_group(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        key_values: Mapping[int, ContextKeyValues],
        group: int,
    ) -> tuple[Tensor, dict[int, Residual | None]]:
        """Predict the velocity with one group: its M layers, whatever the timesteps.

        Args:
            noisy_latents: x_t, [B, C, H, W].
            timesteps: tau, [B].
            key_values: from ``project_context``, holding at least this group's layers.
            group: k.

        Returns:
            v [B, C, H, W], and each layer's residual (with ``reference``, its attention maps; see model/attention.py).
        """
        image_io = self.image_io_of(group)
        time_embedding = image_io.embed_time(timesteps)
        tokens = image_io.embed(noisy_latents)
        position_embeddings = (self.image_cos[None].to(tokens.dtype), self.image_sin[None].to(tokens.dtype))
        residuals, previous = {}, None
        for index in self.experts.layers(group):
            layer = self.layer(index)
            tokens, previous = layer(
                tokens,
                layer.condition(time_embedding),
                position_embeddings=position_embeddings,
                context=key_values[index],
                previous=previous,
            )
            residuals[index] = previous
        return image_io.predict(tokens, time_embedding), residuals

    def encode_context(self, prompt_inputs: Mapping[str, Tensor]) -> Context:
        """Compute the context of tokenized prompts with Blend's own VLM, with gradients when they are enabled.

        Raises:
            ArgumentError: for Couple, whose VLM is not part of the model.
        """
        if self.config.variant != "blend":
            raise ArgumentError(
                "context: a Couple model holds no VLM; compute it with model.context.encode_context(vlm, ...)"
            )
        return encode_context(self.vlm, prompt_inputs, self.config.context_projection)

    def project_context(self, context: Context) -> dict[int, ContextKeyValues]:
        """Return each layer's keys and values of a context; once per prompt at inference.

        Args:
            context: as ``config.context_projection`` says: hidden states, or the VLM's keys and values, which pass unchanged.
        """
        if self.config.context_projection == "vlm":
            return as_key_values(context.to(dtype=self.dtype))
        hidden_states = cast(Mapping[int, Tensor], context.states)
        some_states = next(iter(hidden_states.values()))
        cos, sin = self.context_rotary(some_states.to(self.dtype), context.position_ids)
        return {
            index: self.layer(index).project_context(states.to(self.dtype), context.mask, (cos, sin))
            for index, states in hidden_states.items()
        }

    def gate_values(self, timesteps: Tensor) -> dict[int, Tensor]:
        """Return g(t) of every layer that has a gate, at given timesteps [B]: layer index -> [B, num heads] (Fig. 5b)."""
        gates = {}
        for index in range(len(self.layers)):
            gate = self.layer(index).residual_gate
            if gate is not None:
                image_io = self.image_io_of(self.experts.group_of_layer(index))
                gates[index] = torch.tanh(gate(image_io.embed_time(timesteps))).float()
        return gates

    def replace_linears(self, replacements: Mapping[str, nn.Module]) -> None:
        """Replace linears by other modules, also where a generation layer shares the VLM's.

        Args:
            replacements: name of a submodule -> a module that computes the same, or a rank's part of it.
        """
        for name, module in replacements.items():
            self.set_submodule(name, module, strict=True)
        if self.config.variant == "blend":
            for index, vlm_layer in enumerate(self.config.backbone.decoder_layers(self.vlm)):
                self.layer(index).share_again(vlm_layer)

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Save as transformers does, each weight under its name here.

        transformers would write Blend's Qwen2-VL under the names of an older one, which only its own loader maps back.
        """
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

    def unreached_parameters(self) -> set[str]:
        """Return the names of the parameters that the velocity does not depend on: without a gradient, weight decay erodes them.

        For Blend that is the vision tower, the language model's final norm and head, and the last VLM layer's parts behind its
        input norm that the generation path does not share: no generation layer reads the VLM's output. A tied head is the token
        embedding and is reached.
        """
        if self.config.variant != "blend":
            return set()
        backbone = self.config.backbone
        last_vlm_layer = backbone.decoder_layers(self.vlm)[-1]
        layers = [self.layer(index) for index in range(len(self.layers))]
        read = ["input_layernorm"]
        if self.config.context_projection == "vlm":
            read += [name for name in ("k_proj", "k_norm", "v_proj") if name in backbone.submodules]
        reached = [self.vlm.get_submodule(backbone.embeddings)]
        reached += [last_vlm_layer.get_submodule(backbone.path(name)) for name in read]
        reached += [module for layer in layers for module in layer._shared.values()]
        kept = {id(p) for module in reached for p in module.parameters()}
        unread = [last_vlm_layer, *map(self.vlm.get_submodule, backbone.unread)]
        unreached = {id(p) for module in unread for p in module.parameters()} - kept
        return {name for name, parameter in self.named_parameters() if id(parameter) in unreached}

    def activated_parameters(self) -> int:
        """Count the parameters that one sampling step runs: one group's layers and its embeddings and head."""
        layers = [self.layer(index) for index in self.experts.layers(0)]
        shared = [module for layer in layers for module in layer._shared.values()]
        return sum(p.numel() for module in [self.image_io_of(0), *layers, *shared] for p in module.parameters())

    def _image_rotary(self) -> tuple[Tensor, Tensor]:
        rows, columns = self.config.token_grid
        return rotary_2d(rows, columns, self.config.head_dim, self.config.rope_2d_theta)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """transformers' hook: called for every module when a model is built or its missing parts are filled in."""
        initial_std: Any = getattr(module, "initial_std", None)
        if not isinstance(module, nn.Linear) or initial_std is None:
            super()._init_weights(module)
        else:
            # These functions leave weights alone that were loaded from a checkpoint: transformers guards them.
            std, bias_std = initial_std
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=bias_std)
        if module is self:
            for buffer, value in zip((self.image_cos, self.image_sin), self._image_rotary(), strict=True):
                if buffer.device.type != "meta":
                    buffer.copy_(value)

    def _apply(self, fn, recurse: bool = True):
        """Move or cast the model, but see ``float32_positions``."""
        with float32_positions(self):
            return super()._apply(fn, recurse)


def _widest_dtype(folder: Path) -> torch.dtype:
    """Return the widest floating-point type of the weights in a folder's model*.safetensors.

    Raises:
        ArgumentError: when there is no such file, or one is damaged.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ArgumentError(f"{folder}: no model.safetensors; other formats are opened by latte_flow.load_pipeline")
    names = set()
    for file in files:
        with reading(file), safe_open(file, framework="pt") as opened:
            names |= {opened.get_slice(name).get_dtype() for name in list(opened.keys())}
    dtypes = [str_to_torch_dtype[name] for name in names]
    return max((dtype for dtype in dtypes if dtype.is_floating_point), key=lambda dtype: dtype.itemsize)


AutoModel.register(LatteFlowConfig, LatteFlowModel)
