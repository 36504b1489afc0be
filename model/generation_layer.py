"""One generation layer: a VLM decoder layer's twin that reads noisy image tokens (paper section 5, Appendix A, figure).

    x = x + scale_a(t) * RMS_post( Attention( RMS(x), context_l, residual ) )
    x = x + scale_m(t) * RMS_post( MLP( (1 + scale(t)) * RMS(x) + shift(t) ) )

scale_a, scale, shift and scale_m come from the time embedding h_t by one linear map that starts at zero, so that a new layer is
the identity. ``modulation: six`` also shifts and scales the attention's input (adaLN-Zero); ``post_norm: false`` leaves RMS_post
out.

What depends on t alone, the modulation and the gate of the residual maps, is computed by ``condition`` and passed to
``forward``, so that a sampling schedule can compute it ahead.

Shapes: B batch, N image tokens, S context tokens, D hidden, H heads, G kv heads, E head_dim.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from latte_flow.model.attention import AttentionSpec, ContextKeyValues, Residual, joint_attention
from latte_flow.model.configuration import LatteFlowConfig

SHARED_WITH = {"q_norm": "q_proj", "k_norm": "k_proj"}
"""Submodules that are shared where another is: a head norm is fitted to the scale of the projection in front of it."""


@dataclass(frozen=True)
class LayerConditioning:
    """What a layer derives from the time embedding. Each vector is [B, 1, D]; ``residual_gate`` is [B, H].

    ``None`` means: no modulation before attention (``modulation: four``), no residual gate (first layer of a group).
    """

    attention_shift: Tensor | None
    attention_scale: Tensor | None
    attention_out: Tensor
    mlp_shift: Tensor
    mlp_scale: Tensor
    mlp_out: Tensor
    residual_gate: Tensor | None


def set_initial_std(linear: nn.Linear, std: float, bias_std: float = 0.0) -> nn.Linear:
    """Mark a linear for LatteFlowModel._init_weights: weight ~ N(0, std^2), bias ~ N(0, bias_std^2)."""
    linear.initial_std = std, bias_std  # type: ignore[assignment]  # torch types attributes as parameters or modules
    return linear


def _modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    return x if shift is None or scale is None else (1 + scale) * x + shift


class GenerationLayer(GradientCheckpointingLayer):
    """A generation layer, shaped like layer ``layer_idx`` of the VLM.

    Args:
        config: the network's configuration.
        layer_idx: l, in 0 .. L-1.
        spec: how attention is computed.
        vlm_layer: the VLM's layer whose submodules named in ``config.shared_modules`` are used here instead of own ones
            (Blend); None when nothing is shared (Couple).
    """

    def __init__(
        self, config: LatteFlowConfig, layer_idx: int, spec: AttentionSpec, vlm_layer: nn.Module | None = None
    ):
        super().__init__()
        text, backbone = config.text_config, config.backbone
        self.head_dim = config.head_dim
        self.spec = spec
        self.modulation_kind = config.modulation
        # Shared submodules belong to the VLM: a plain dict keeps them out of this module's parameters and state dict, so
        # that every weight has one name and is saved once.
        self._shared: dict[str, nn.Module] = {}
        self._paths = backbone.submodules
        with no_init_weights():  # the own submodules draw their numbers below, the others none
            twin = backbone.decoder_layer(text, layer_idx)
        for name, path in self._paths.items():
            if vlm_layer is not None and SHARED_WITH.get(name, name) in config.shared_modules:
                self._shared[name] = vlm_layer.get_submodule(path)
                continue
            self.add_module(name, twin.get_submodule(path))
            for module in self.get_submodule(name).modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
        self.attention_post_norm: nn.Module
        self.mlp_post_norm: nn.Module
        if config.post_norm:
            self.attention_post_norm = LlamaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
            self.mlp_post_norm = LlamaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        else:
            self.attention_post_norm = self.mlp_post_norm = nn.Identity()
        vectors = {"four": 4, "six": 6}[config.modulation]
        # Zero: a new layer is the identity, and its attention plain (section 4).
        self.modulation = set_initial_std(nn.Linear(text.hidden_size, vectors * text.hidden_size), 0.0)
        self.residual_gate: nn.Linear | None = None
        if config.residual_attention and not config.timestep_experts().is_first_in_group(layer_idx):
            gate = nn.Linear(text.hidden_size, text.num_attention_heads, bias=False)
            self.residual_gate = set_initial_std(gate, 0.0)

    def share_again(self, vlm_layer: nn.Module) -> None:
        """Take the shared submodules from the VLM's layer again, after some of them were replaced."""
        for name in self._shared:
            self._shared[name] = vlm_layer.get_submodule(self._paths[name])

    def copy_from(self, vlm_layer: nn.Module) -> None:
        """Copy the weights of a VLM's layer into this layer's own submodules.

        Raises:
            RuntimeError: when a submodule's keys or shapes differ from this layer's.
        """
        for name, path in self._paths.items():
            if name not in self._shared:
                self.get_submodule(name).load_state_dict(vlm_layer.get_submodule(path).state_dict())

    def part(self, name: str) -> nn.Module:
        """Return a submodule by its name in ``Backbone.submodules``, its own or the shared one."""
        return self._shared[name] if name in self._shared else self.get_submodule(name)

    def condition(self, time_embedding: Tensor) -> LayerConditioning:
        """Return the modulation vectors and the residual gate g(t) = tanh(h_t W_t) (Eq. 3) of a time embedding h_t [B, D]."""
        vectors = self.modulation(nn.functional.silu(time_embedding))[:, None, :]
        if self.modulation_kind == "four":
            attention_out, mlp_scale, mlp_shift, mlp_out = vectors.chunk(4, dim=-1)
            attention_shift = attention_scale = None
        else:
            attention_shift, attention_scale, attention_out, mlp_shift, mlp_scale, mlp_out = vectors.chunk(6, dim=-1)
        gate = None if self.residual_gate is None else torch.tanh(self.residual_gate(time_embedding))
        return LayerConditioning(
            attention_shift=attention_shift,
            attention_scale=attention_scale,
            attention_out=attention_out,
            mlp_shift=mlp_shift,
            mlp_scale=mlp_scale,
            mlp_out=mlp_out,
            residual_gate=gate,
        )

    def project_context(
        self, hidden_states: Tensor, mask: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> ContextKeyValues:
        """Project the VLM's normalised hidden states with this layer's key and value projections (``generation``).

        Args:
            hidden_states: the input of the VLM's layer l after its input RMSNorm, [B, S, D].
            mask: [B, S] bool, True for real tokens.
            position_embeddings: (cos, sin) of the VLM's multimodal RoPE, each [B, S, E].
        """
        key, value = self._heads("k", hidden_states), self._heads("v", hidden_states)
        _, key = apply_rotary_pos_emb(key, key, *position_embeddings)
        return ContextKeyValues(key=key, value=value, mask=mask)

    def forward(
        self,
        x: Tensor,
        conditioning: LayerConditioning,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        context: ContextKeyValues | None = None,
        previous: Residual | None = None,
        causal: bool = False,
    ) -> tuple[Tensor, Residual | None]:
        """Run the layer on image tokens.

        Args:
            x: [B, N, D].
            conditioning: from ``condition``.
            position_embeddings: (cos, sin) of the tokens, each [1 or B, N, E].
            context: the context's keys and values at this layer.
            previous: the residual of the previous layer of the group.
            causal: whether tokens see only earlier ones; generated images are bidirectional.

        Returns:
            The new tokens [B, N, D] and this layer's residual.
        """
        h = _modulate(self.part("input_layernorm")(x), conditioning.attention_shift, conditioning.attention_scale)
        query, key, value = (self._heads(name, h) for name in "qkv")
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attended, residual = joint_attention(
            query,
            key,
            value,
            spec=self.spec,
            context=context,
            previous=previous,
            gate=None if previous is None else conditioning.residual_gate,
            causal=causal,
        )
        x = x + conditioning.attention_out * self.attention_post_norm(self.part("o_proj")(attended))
        h = _modulate(self.part("post_attention_layernorm")(x), conditioning.mlp_shift, conditioning.mlp_scale)
        return x + conditioning.mlp_out * self.mlp_post_norm(self.part("mlp")(h)), residual

    def _heads(self, name: str, x: Tensor) -> Tensor:
        """Project tokens [B, N, D] to queries, keys or values (``q``, ``k``, ``v``) per head, [B, heads, N, E]."""
        heads = rearrange(self.part(f"{name}_proj")(x), "b n (h e) -> b h n e", e=self.head_dim)
        return self.part(f"{name}_norm")(heads) if f"{name}_norm" in self._paths else heads
