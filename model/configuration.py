"""LatteFlowConfig: everything that defines the network. Defaults are the paper's values, or ours where it is silent."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from transformers import AutoConfig, PretrainedConfig

from latte_flow.model.attention import AttentionSpec
from latte_flow.model.backbone import Backbone, backbone_of
from latte_flow.model.errors import ArgumentError
from latte_flow.model.files import check_config, check_sizes, read_json, without_local_paths
from latte_flow.model.timestep_experts import TimestepExperts

VARIANTS = ("couple", "blend")
MODULATIONS = ("four", "six")
CONTEXT_PROJECTIONS = ("generation", "vlm")
GROUP_IO = ("shared", "per_group")
SHAREABLE_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "input_layernorm", "post_attention_layernorm", "mlp")


def _check_choice(field: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ArgumentError(f"{field}: {value!r} is unknown; accepted values: {', '.join(accepted)}")


class LatteFlowConfig(PretrainedConfig):
    """Configuration of a LatteFlowModel.

    The four models of the paper are one network: Couple and Blend by ``variant``; Vanilla is ``num_groups=1,
    residual_attention=False``.

    Args:
        vlm_config: the configuration of the vision-language model, of a family in model/backbone.py, or its dict. The
            generation path has its hidden size, heads and number of layers.
        variant: ``couple``, a generation layer beside every frozen VLM layer; ``blend``, generation layers that share some of
            their submodules with the VLM's, all of it trained (paper section 1).
        shared_modules: the submodules a Blend layer shares with the VLM's layer; any of q_proj, k_proj, v_proj, o_proj,
            input_layernorm, post_attention_layernorm, mlp. A family's norm of each query or key head is shared with the
            projection in front of it. Ignored by Couple.
        num_groups: K, the number of timestep experts; must divide the VLM's number of layers.
        timestep_overlap: width in timesteps of the band around each inner boundary that two groups train on (Appendix B).
        timestep_boundaries: K + 1 timesteps descending from 1000 to 0; None for the paper's uniform ones.
        group_io: ``shared``, one patch embedding, time embedding and image head for all groups; ``per_group``, one each.
        residual_attention: whether layers pass their attention maps to the next layer of their group (section 4).
        residual_source: ``raw`` | ``accumulated``, see model/attention.py.
        residual_space: ``logits`` | ``probabilities``, see model/attention.py.
        attention_backend: ``auto`` | ``reference`` | ``sdpa`` | ``flash``, see model/attention.py.
        context_projection: where the context's keys and values come from: ``generation``, the generation layer's own
            projections of the VLM's normalised hidden states; ``vlm``, the VLM's own keys and values (section 5).
        post_norm: whether each sublayer's output is normalised before it is scaled and added (section 5, figure).
        modulation: ``four`` vectors per layer from the time embedding (figure) or ``six`` (adaLN-Zero).
        latent_channels: C of the latent the flow runs in (DC-AE: 32).
        latent_size: (H, W) of the latent (DC-AE at 256x256: 8x8).
        patch_size: side of the square of latent positions that makes one token.
        rope_2d_theta: base of the image tokens' 2D rotary embedding.
        timestep_frequencies: size of the sinusoidal timestep features in front of the time embedding's MLP.

    Raises:
        ArgumentError: when a value is not accepted; the message names the field and what is.
    """

    model_type = "latte_flow"

    def __init__(
        self,
        vlm_config=None,
        *,
        variant: Literal["couple", "blend"] = "couple",
        shared_modules: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
        num_groups: int = 4,
        timestep_overlap: float = 100.0,
        timestep_boundaries: list[float] | None = None,
        group_io: Literal["shared", "per_group"] = "shared",
        residual_attention: bool = True,
        residual_source: Literal["raw", "accumulated"] = "raw",
        residual_space: Literal["logits", "probabilities"] = "logits",
        attention_backend: Literal["auto", "reference", "sdpa", "flash"] = "auto",
        context_projection: Literal["generation", "vlm"] = "generation",
        post_norm: bool = True,
        modulation: Literal["four", "six"] = "four",
        latent_channels: int = 32,
        latent_size: tuple[int, int] | list[int] = (8, 8),
        patch_size: int = 1,
        rope_2d_theta: float = 10000.0,
        timestep_frequencies: int = 256,
        **kwargs,
    ):
        if isinstance(vlm_config, dict):
            vlm_config = AutoConfig.for_model(**vlm_config)
        if vlm_config is not None:
            backbone_of(vlm_config)  # here: what follows reads its sizes
        self.vlm_config = vlm_config
        self.variant = variant
        self.shared_modules = list(shared_modules)
        self.num_groups = num_groups
        self.timestep_overlap = timestep_overlap
        self.timestep_boundaries = None if timestep_boundaries is None else list(timestep_boundaries)
        self.group_io = group_io
        self.residual_attention = residual_attention
        self.residual_source = residual_source
        self.residual_space = residual_space
        self.attention_backend = attention_backend
        self.context_projection = context_projection
        self.post_norm = post_norm
        self.modulation = modulation
        self.latent_channels = latent_channels
        self.latent_size = list(latent_size)
        self.patch_size = patch_size
        self.rope_2d_theta = rope_2d_theta
        self.timestep_frequencies = timestep_frequencies
        super().__init__(**kwargs)
        if vlm_config is not None:  # transformers builds an empty config to find the defaults
            self.check()

    def check(self) -> None:
        """Raise ArgumentError when the fields contradict each other or a value is not accepted."""
        for config in (self, self.vlm_config):
            check_config(config)
        _check_choice("variant", self.variant, VARIANTS)
        _check_choice("group_io", self.group_io, GROUP_IO)
        _check_choice("context_projection", self.context_projection, CONTEXT_PROJECTIONS)
        _check_choice("modulation", self.modulation, MODULATIONS)
        for name in self.shared_modules:
            _check_choice("shared_modules", name, SHAREABLE_MODULES)
        for name in ("patch_size", "rope_2d_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ArgumentError(f"{name}: got {getattr(self, name)}; accepted: greater than 0")
        if self.timestep_frequencies < 2 or self.timestep_frequencies % 2:
            raise ArgumentError(f"timestep_frequencies: got {self.timestep_frequencies}; accepted: even, 2 or more")
        if any(side < 1 or side % self.patch_size for side in self.latent_size):
            raise ArgumentError(f"patch_size: {self.patch_size} does not divide latent_size {tuple(self.latent_size)}")
        if self.head_dim % 4:
            raise ArgumentError(f"vlm_config: head_dim {self.head_dim} is not a multiple of 4, which the 2D RoPE needs")
        # Both check their arguments. ``auto`` is kept as it is: on another machine it may resolve to another backend.
        self.timestep_experts()
        self.attention_spec()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Return the configuration that was saved, except that the attention backend is chosen for this machine."""
        check_sizes(config_dict)
        return super().from_dict(config_dict | {"attention_backend": "auto"}, **kwargs)

    def to_dict(self) -> dict:
        """Return what is saved, without the local folder that the VLM was loaded from."""
        return without_local_paths(super().to_dict())

    @property
    def backbone(self) -> Backbone:
        """The family of the VLM."""
        return backbone_of(self.vlm_config)

    @property
    def text_config(self):
        """The language model's part of the VLM's configuration: hidden size, heads, layers."""
        return self.vlm_config.text_config

    @property
    def hidden_size(self) -> int:
        """D, the width of the generation path: the VLM's."""
        return self.text_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """L, the number of generation layers: the VLM's."""
        return self.text_config.num_hidden_layers

    @property
    def head_dim(self) -> int:
        """E, the size of one attention head."""
        return self.backbone.head_dim(self.text_config)

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return self.latent_size[0] // self.patch_size, self.latent_size[1] // self.patch_size

    @property
    def num_image_tokens(self) -> int:
        """N, the number of image tokens."""
        return self.token_grid[0] * self.token_grid[1]

    def timestep_experts(self) -> TimestepExperts:
        """Return the partition of layers and timesteps that this configuration describes."""
        return TimestepExperts(
            num_layers=self.num_hidden_layers,
            num_groups=self.num_groups,
            overlap=self.timestep_overlap,
            boundaries=self.timestep_boundaries,
        )

    def attention_spec(self) -> AttentionSpec:
        """Return how joint attention is computed under this configuration on this machine."""
        return AttentionSpec(
            backend=self.attention_backend,
            residual=self.residual_attention,
            residual_source=self.residual_source,
            residual_space=self.residual_space,
            head_dim=self.head_dim,
            num_image_tokens=self.num_image_tokens,
            scale=self.backbone.attention_scale(self.text_config),
        )


AutoConfig.register(LatteFlowConfig.model_type, LatteFlowConfig)


def load_network_config(folder: Path) -> LatteFlowConfig:
    """Return the network's configuration in a model folder.

    Raises:
        ArgumentError: when it is of another kind of model, or damaged.
    """

    def check(settings: dict) -> LatteFlowConfig:
        kind = settings.get("model_type")
        if kind != LatteFlowConfig.model_type:
            raise ArgumentError(f"describes a {kind} model; accepted: {LatteFlowConfig.model_type}")
        if not settings.get("vlm_config"):
            raise ArgumentError("vlm_config: missing; accepted: a VLM's configuration")
        return LatteFlowConfig.from_dict(settings)

    return read_json(folder / "config.json", check)
