"""What image generation reads of the vision-language model: the per-layer context of a prompt (paper section 5).

The multimodal tokens never attend to generated image tokens, so their states depend neither on the timestep nor on the noisy
image. transformers' own VLM is run once per prompt; what each generation layer reads is kept:

* ``context_projection: generation``: the input of VLM layer l after that layer's input RMSNorm, [B, S, D], which the generation
  layer projects itself;
* ``context_projection: vlm``: the keys and values of VLM layer l with multimodal RoPE applied, [B, G, S, E] each.

Shapes: P prompts, B batch, S context tokens, D hidden, G kv heads, E head_dim.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latte_flow.model.attention import ContextKeyValues
from latte_flow.model.backbone import backbone_of
from latte_flow.model.errors import ArgumentError
from latte_flow.model.files import reading
from latte_flow.model.settings import MAX_CHARACTERS


@dataclass(frozen=True)
class Context:
    """The context of P prompts at some or all layers.

    Attributes:
        states: layer index -> normalised hidden states [P, S, D], or (keys, values) of [P, G, S, E] each.
        mask: [P, S] bool, True for real tokens.
        position_ids: temporal, row and column positions of the tokens, [3, P, S].
    """

    states: Mapping[int, Tensor | tuple[Tensor, Tensor]]
    mask: Tensor
    position_ids: Tensor

    def gather(self, rows: Tensor, layers: Iterable[int] | None = None) -> "Context":
        """Return the context of some prompts at some layers.

        Args:
            rows: prompt indices, integers on this context's device, [B]; a prompt may be named many times.
            layers: layer indices; None for all.
        """

        def pick(state):
            return tuple(s[rows] for s in state) if isinstance(state, tuple) else state[rows]

        wanted = self.states.keys() if layers is None else layers
        return Context(
            states={layer: pick(self.states[layer]) for layer in wanted},
            mask=self.mask[rows],
            position_ids=self.position_ids[:, rows],
        )

    def to(self, *args, **kwargs) -> "Context":
        """Return this context with its states moved or cast as by ``Tensor.to``; mask and positions keep their type."""

        def move(state):
            return (
                tuple(s.to(*args, **kwargs) for s in state) if isinstance(state, tuple) else state.to(*args, **kwargs)
            )

        states = {layer: move(state) for layer, state in self.states.items()}
        first = next(iter(states.values()))
        device = (first[0] if isinstance(first, tuple) else first).device
        return Context(states=states, mask=self.mask.to(device), position_ids=self.position_ids.to(device))

    def concatenate(self, other: "Context") -> "Context":
        """Return the prompts of this context followed by those of another, the shorter padded on the right."""
        length = max(self.mask.shape[1], other.mask.shape[1])

        def pad(x: Tensor, dim: int) -> Tensor:  # appends zeros; a False in the mask hides them
            return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, length - x.shape[dim]))

        def join(a, b):
            if isinstance(a, tuple):
                return tuple(torch.cat([pad(x, 2), pad(y, 2)]) for x, y in zip(a, b, strict=True))
            return torch.cat([pad(a, 1), pad(b, 1)])

        return Context(
            states={layer: join(state, other.states[layer]) for layer, state in self.states.items()},
            mask=torch.cat([pad(self.mask, 1), pad(other.mask, 1)]),
            position_ids=torch.cat([pad(self.position_ids, 2), pad(other.position_ids, 2)], dim=1),
        )

    def empty(self, prompts: int) -> "Context":
        """Return room for the context of some prompts as long as these: nothing but padding, its states not initialised."""

        def room(state):
            return tuple(map(room, state)) if isinstance(state, tuple) else state.new_empty(prompts, *state.shape[1:])

        return Context(
            states={layer: room(state) for layer, state in self.states.items()},
            mask=self.mask.new_zeros(prompts, *self.mask.shape[1:]),
            position_ids=self.position_ids.new_zeros(3, prompts, *self.position_ids.shape[2:]),
        )

    def write(self, rows: Tensor, other: "Context") -> None:
        """Put the prompts of another context, as long as these, into some rows of this one, in place."""
        for layer, state in self.states.items():
            source = other.states[layer]
            mine = state if isinstance(state, tuple) else (state,)
            theirs = source if isinstance(source, tuple) else (source,)
            for target, values in zip(mine, theirs, strict=True):
                target[rows] = values
        self.mask[rows] = other.mask
        self.position_ids[:, rows] = other.position_ids

    @property
    def num_bytes(self) -> int:
        """Size of the states in bytes."""
        flat = [s for state in self.states.values() for s in (state if isinstance(state, tuple) else (state,))]
        return sum(s.numel() * s.element_size() for s in flat)


def tokenize_prompts(tokenizer, prompts: Sequence[str], *, multiple: int | None = None) -> dict[str, Tensor]:
    """Put each prompt into the VLM's chat format and tokenize it, padded on the right to the longest.

    Args:
        tokenizer: the VLM's.
        prompts: one or more.
        multiple: S is rounded up to a multiple of this.

    Returns:
        input_ids [P, S] and attention_mask [P, S], int64.

    Raises:
        ArgumentError: when no prompt is given, the tokenizer has no chat template, or a prompt is too long in its chat format.
    """
    if not prompts:
        raise ArgumentError("prompts: got none; at least one prompt is needed")
    if tokenizer.chat_template is None:
        raise ArgumentError(
            "tokenizer: it has no chat template; use the tokenizer of an Instruct checkpoint, or set tokenizer.chat_template"
        )
    rows = [message_ids(tokenizer, prompt) for prompt in prompts]
    padding = {"padding_side": "right", "pad_to_multiple_of": multiple, "return_tensors": "pt"}
    with reading("the tokenizer"):
        encoded = tokenizer.pad({"input_ids": rows}, **padding)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def check_chat_template(tokenizer) -> None:
    """Refuse a tokenizer whose chat template is missing, fails, writes nothing, or gigabytes, which take hours to tokenize.

    Raises:
        ArgumentError: says which.
    """
    if tokenizer.chat_template is not None:
        with reading("the tokenizer's chat template"):
            text = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
        if len(text) > MAX_CHARACTERS:
            raise ArgumentError(
                f"the tokenizer's chat template: writes {len(text)} characters; accepted: {MAX_CHARACTERS}"
            )
    tokenize_prompts(tokenizer, [""])


def check_text(texts: Iterable[str]) -> None:
    """Raise ArgumentError for a prompt that is not UTF-8, such as one of a class folder whose name has another encoding."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ArgumentError(f"prompts: got {text[:80]!r}; accepted: text in UTF-8") from error


def message_ids(tokenizer, text: str, *, with_image: bool = False) -> list[int]:
    """Return the token ids of a user message in the VLM's chat format. Special tokens in the text are text, not control tokens.

    Args:
        tokenizer: the VLM's.
        text: the user's words.
        with_image: whether a picture comes before the text; the template writes one placeholder for it.

    Raises:
        ArgumentError: when the message is too long in its chat format.
    """
    check_text([text])
    content = [{"type": "image"}, {"type": "text", "text": text}] if with_image else text
    chat = [{"role": "user", "content": content}]
    # A program: it may fail, and write nothing or much more than the prompt.
    with reading("the tokenizer's chat template"):
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
        )
    if not 0 < len(ids) <= MAX_CHARACTERS:
        raise ArgumentError(
            f"prompts: {len(ids)} tokens in the tokenizer's chat format; accepted: 1 to {MAX_CHARACTERS}"
        )
    return ids


def truncate_prompts(tokenizer, prompts: Sequence[str], max_tokens: int | None) -> list[str]:
    """Return prompts of at most ``max_tokens`` tokens each; longer ones lose their end, None keeps all.

    All prompts of a run are padded to one length, so one caption of a thousand words would make every context as large.
    """
    if max_tokens is None or not prompts:
        return list(prompts)
    check_text(prompts)
    encoded = tokenizer(list(prompts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [
        prompt if len(ids) <= max_tokens else tokenizer.decode(ids[:max_tokens]).rstrip("\ufffd")  # half a character
        for prompt, ids in zip(prompts, encoded, strict=True)
    ]


def encode_context(
    vlm, prompt_inputs: Mapping[str, Tensor], projection: str, layers: Iterable[int] | None = None
) -> Context:
    """Run the VLM once over tokenized prompts and keep what the generation layers read. Differentiable.

    Args:
        vlm: a transformers model of a family in model/backbone.py.
        prompt_inputs: what its processor returns: input_ids [P, S], attention_mask [P, S], and for prompts with pictures
            pixel_values, image_grid_thw and mm_token_type_ids.
        projection: ``generation`` or ``vlm`` (LatteFlowConfig.context_projection).
        layers: the layers to keep; None for all.
    """
    inputs: dict = dict(prompt_inputs)
    mask = inputs["attention_mask"].bool()
    if inputs.get("image_grid_thw") is not None:
        position_ids, _ = vlm.model.get_rope_index(
            inputs["input_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
        )
    else:
        position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
    wanted = range(vlm.config.text_config.num_hidden_layers) if layers is None else layers
    inputs |= {"attention_mask": _causal_mask(mask, vlm.dtype), "position_ids": position_ids}
    if projection == "vlm":
        cache = vlm.model(**inputs, use_cache=True).past_key_values
        states = {layer: (cache.layers[layer].keys, cache.layers[layer].values) for layer in wanted}
    else:
        backbone = backbone_of(vlm.config)
        decoder_layers, path = backbone.decoder_layers(vlm), backbone.path("input_layernorm")
        norms = {layer: decoder_layers[layer].get_submodule(path) for layer in wanted}
        # Read where they enter a layer: transformers' hidden_states lack the features of pictures that DeepStack adds between.
        read: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for layer, norm in norms.items():
                hooks.enter_context(norm.register_forward_pre_hook(partial(_keep_input, read, layer)))
            vlm.model(**inputs, use_cache=False)
        states = {layer: norm(read[layer]) for layer, norm in norms.items()}
    return Context(states=states, mask=mask, position_ids=position_ids)


def _keep_input(read: dict[int, Tensor], layer: int, module: nn.Module, arguments: tuple[Tensor]) -> None:
    """Forward pre-hook: keep a module's input."""
    (read[layer],) = arguments


def _causal_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the VLM's causal mask with padding hidden, [P, 1, S, S], to be added to logits.

    transformers would build it from ``attention_mask`` too, but first looks whether there is any padding: a host synchronisation
    in every training step of Blend. Layers with a sliding window get the same mask: prompts are shorter than the window.
    """
    length = mask.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril() & mask[:, None, None, :]
    # Padding sees itself: no row without a key.
    visible = visible | torch.eye(length, dtype=torch.bool, device=mask.device)
    return torch.zeros(visible.shape, dtype=dtype, device=mask.device).masked_fill(~visible, torch.finfo(dtype).min)


def as_key_values(context: Context) -> dict[int, ContextKeyValues]:
    """Return the keys and values of a ``vlm`` context per layer, in the form that attention takes."""
    return {
        layer: ContextKeyValues(key=key, value=value, mask=context.mask)
        for layer, (key, value) in context.states.items()
    }
