# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""Configuration of R-Transformer, of Transformers with RSA heads, and of both together."""

import dataclasses
import difflib
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


LOCAL_RNN_TYPES = ("gru", "lstm", "rnn", "hard_lstm")
LOCAL_PADDINGS = ("zeros", "none")
ATTENTIVE_RNN_TYPES = ("gru", "lstm", "rnn")
ATTENTIVE_FORMS = ("positions", "slots")
ATTENTIVE_STARTS = ("input", "zero")
ATTENTIVE_FUSIONS = ("gated_sum", "add")
REM_KINDS = ("none", "regular", "first_cyclical", "second_cyclical")
REM_GATES = ("layer", "head")
POSITION_EMBEDDINGS = ("none", "sinusoidal", "relative", "t5")
LAYER_NORM_TYPES = ("standard", "original", "rms")
NORM_POSITIONS = ("pre", "post")
MEMORY_MASKS = ("window", "segment")
STATE_GATES = ("fixed", "lstm")
STATE_UPDATES = ("skip", "dual", "single")
LINEAR_STRUCTURES = ("dense", "monarch", "butterfly")
LINEAR_PARTS = ("local_rnn", "attention", "feed_forward")

# The class that each Auto class gives, as `file.class`. The Auto classes read it from the config of a checkpoint where
# this package is not installed, and the package's `__init__` registers these classes.
AUTO_MAP = {
    "AutoConfig": "configuration_rtransformer.RTransformerConfig",
    "AutoModel": "modeling_rtransformer.RTransformerModel",
    "AutoModelForAudioFrameClassification": "modeling_rtransformer.RTransformerForAudioFrameClassification",
    "AutoModelForCausalLM": "modeling_rtransformer.RTransformerForCausalLM",
    "AutoModelForMaskedLM": "modeling_rtransformer.RTransformerForMaskedLM",
    "AutoModelForQuestionAnswering": "modeling_rtransformer.RTransformerForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_rtransformer.RTransformerForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_rtransformer.RTransformerForTokenClassification",
}

# Transformers saves the files that a config's file imports beside a checkpoint. It finds imports in the text of a file,
# and so in this one, which names the file that needs all others; an import that runs would close a circle.
SAVED_BESIDE_A_CHECKPOINT = """
from .modeling_rtransformer import RTransformerModel
"""

# Fields that forecasters had in this config until version 0.1, and their defaults, which every saved config.json has.
# Forecasters have a config of their own since.
FORMER_FIELDS = {
    "prediction_length": None,
    "context_length": None,
    "patch_length": 1,
    "instance_norm": "none",
    "channel_independent": False,
    "forecast_head": "pooled",
    "linear_shortcut": False,
    "forecast_loss": "mse",
}

# The fields that the other systems of this package share with an R-Transformer: of the embedded input, of the sublayers
# that they are made of, and of the heads.
SHARED_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("is_causal", "num_local_rnns", "local_rnn_type", "local_window", "local_padding"),
    *("rem_kinds", "rem_dilations", "rem_gate", "rem_layers", "position_embedding", "final_norm"),
    *("layer_norm_type", "layer_norm_eps", "num_input_features", "tie_word_embeddings", "lm_head_bias"),
    *("embedding_dropout", "hidden_dropout", "attention_dropout", "initializer_range", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)


def nearest(name: str, valid) -> str:
    """A hint ``"; did you mean `x`?"`` with the valid name nearest to `name`, or an empty string."""
    matches = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f"; did you mean `{matches[0]}`?" if matches else ""


def rem_heads(
    num_attention_heads: int,
    *,
    regular: int = 0,
    first_cyclical: int = 0,
    second_cyclical: int = 0,
    dilated_regular: int = 0,
    dilated_first_cyclical: int = 0,
    dilated_second_cyclical: int = 0,
    dilations: list[int] | None = None,
) -> dict[str, list]:
    """
    The paper's six numbers (k1, ..., k6) as the two configuration fields that say the same head by head.

    The six counts come in the paper's order. The heads are laid out in that order too, plain attention heads last.

    Args:
        num_attention_heads (`int`): heads of a layer; the counts may sum to fewer, the rest are plain attention.
        dilations (`list[int]`): one dilation for each dilated head, in the order regular, first, second cyclical.

    Returns:
        `dict` with `rem_kinds` and `rem_dilations`, each with one entry a head, to pass on to [`RTransformerConfig`].

    Raises:
        ValueError: if the counts exceed the heads or `dilations` has another length than there are dilated heads.

    Source: Huang et al. 2023, section 3.2 ("REMs") and appendix (the settings of k1 to k6 for each task).

    Example:

    ```python
    >>> from modeling_rtransformer import RTransformerConfig, rem_heads

    >>> text8 = rem_heads(8, dilated_first_cyclical=2, dilated_second_cyclical=2, dilations=[6, 6, 12, 12])
    >>> RTransformerConfig(num_attention_heads=8, num_local_rnns=0, **text8).rem_dilations
    [6, 6, 12, 12, 1, 1, 1, 1]
    ```
    """
    undilated_counts = regular, first_cyclical, second_cyclical
    dilated_counts = dilated_regular, dilated_first_cyclical, dilated_second_cyclical
    kinds, dilated = (
        [kind for kind, count in zip(REM_KINDS[1:], counts) for _ in range(count)]
        for counts in (undilated_counts, dilated_counts)
    )
    dilations = list(dilations or [])
    if len(dilations) != len(dilated):
        raise ValueError(
            f"`dilations` must have one entry for each of the {len(dilated)} dilated heads, got {dilations}"
        )
    plain = num_attention_heads - len(kinds) - len(dilated)
    if plain < 0:
        raise ValueError(
            f"the REM heads must be at most `num_attention_heads` ({num_attention_heads}), "
            f"got {len(kinds) + len(dilated)}"
        )
    return {
        "rem_kinds": kinds + dilated + ["none"] * plain,
        "rem_dilations": [1] * len(kinds) + dilations + [1] * plain,
    }


@strict
class RTransformerConfig(PreTrainedConfig):
    r"""
    One block, orthogonal choices: a LocalRNN before the attention (R-Transformer), a Recurrence Encoding Matrix (REM)
    gated into chosen attention heads (RSA), both, or neither (a plain pre-norm Transformer).

    Args:
        vocab_size (`int`, defaults to 256): number of token ids, of the input and of the language model's output.
        hidden_size (`int`, defaults to 512): width D of every layer; divisible by `num_attention_heads`.
        intermediate_size (`int`, *optional*): inner width of the feed-forward layer; four times `hidden_size` if None.
        num_hidden_layers (`int`, defaults to 3): number of blocks.
        num_attention_heads (`int`, defaults to 8): heads H of each attention layer.
        hidden_act (`str`, defaults to `"relu"`): activation of the feed-forward layer, any name of `ACT2FN`.
        is_causal (`bool`, defaults to `True`):
            True: LocalRNN, attention and REM see the past only. False: every layer sees both sides.
        num_local_rnns (`int`, defaults to 1): LocalRNNs in each block; 0 for none.
        local_rnn_type (`str`, defaults to `"gru"`):
            `"gru"`, `"lstm"`, `"rnn"` (tanh), or `"hard_lstm"`: an LSTM with the hard sigmoids of the published
            Butterfly R-Transformer, min(max(z / 5 + 1 / 2, 0), 1), for its checkpoints; it has no kernels.
        local_window (`int`, defaults to 7): window K of the LocalRNN in positions, the current one included.
        local_padding (`str`, defaults to `"zeros"`):
            What windows that reach back before the sequence find there: `"zeros"`, which the RNN reads as inputs (the
            paper), or `"none"`: the RNN begins with the sequence. With `"none"` and a window that holds the sequence a
            LocalRNN is a recurrent network over it, and runs as one.
        rem_kinds (`list[str]`, *optional*):
            One entry a head: `"none"` (plain attention), `"regular"`, `"first_cyclical"` or `"second_cyclical"`.
            None for plain attention throughout. [`rem_heads`] writes it from the paper's (k1, ..., k6).
        rem_dilations (`int` or `list[int]`, defaults to 1):
            Dilation m of the REMs: one value for all heads, or one entry a head (plain heads' entries are not used).
        rem_gate (`str`, defaults to `"layer"`): one gate a `"layer"` (the paper) or one a `"head"`.
        rem_layers (`list[int]`, *optional*): indices of the blocks that have REM heads; None for all.
        attentive_steps (`int`, defaults to 0):
            Steps S of the Attentive Recurrent Network, an RNN at each position whose inputs are chosen by attention;
            0 for none. It reads the keys and values of the first block.
        attentive_rnn_type (`str`, defaults to `"gru"`): its cell, `"gru"`, `"lstm"` or `"rnn"` (tanh).
        attentive_form (`str`, defaults to `"positions"`):
            `"positions"`: a state for each position. `"slots"`: the states of all steps, for a whole sequence and in
            two directions, to which the chosen blocks attend; it needs `is_causal=False`, `attentive_start="zero"`.
        attentive_start (`str`, defaults to `"input"`): its first state, the position's `"input"` or `"zero"`.
        attentive_layers (`list[int]`, *optional*):
            Indices of the blocks that read its last state, negative ones from the end; None for the last block alone,
            the paper's short-cut.
        attentive_fusion (`str`, defaults to `"gated_sum"`):
            How such a block joins the state b with its attention's output a: `"gated_sum"`, g a + (1 - g) b with a
            learned gate g, or `"add"`, a + b.
        position_embedding (`str`, defaults to `"none"`):
            `"none"` leaves the order to the LocalRNN and the REMs. `"sinusoidal"` adds the sinusoids of Vaswani et al.
            2017 (section 3.5) to the scaled embeddings. `"relative"` scales the embeddings likewise and adds a learned
            function of the distance to the attention scores, as Transformer-XL does; `"t5"` adds one number per head
            and bucket of distances, as T5 does.
        clamp_length (`int`, *optional*): the largest distance that `"relative"` tells apart; None for no limit.
        memory_length (`int`, *optional*):
            M, the past positions that attention sees. The cache then keeps M keys and values per block, however long
            the text is. None: attention sees the whole past.
        memory_mask (`str`, defaults to `"window"`):
            `"window"`: each query sees the M keys before it, so that the outputs do not depend on how a text is cut
            into calls. `"segment"`: each query sees the M keys before the call and all keys of the call up to its own,
            which is how Transformer-XL trains.
        see_own_position (`bool`, defaults to `True`):
            False: a query sees only keys strictly before its own, as in the published code of the Block-Recurrent
            Transformer. A query that sees no key gets zeros from the attention.
        recurrent_layers (`list[int]`, *optional*): indices of the blocks with a block-recurrent mixer.
        block_length (`int`, *optional*): W, the positions per update of the recurrent states.
        num_state_vectors (`int`, defaults to 512): S, the recurrent states of a block-recurrent mixer.
        state_gate (`str`, defaults to `"fixed"`): gate of the recurrent states, `"fixed"` or `"lstm"`.
        state_update (`str`, defaults to `"skip"`):
            `"skip"`: one gate, no feed-forward layer; `"dual"`: a gate, then a feed-forward layer with a gate of its
            own; `"single"`: a feed-forward layer and one gate.
        final_norm (`bool`, defaults to `True`): a LayerNorm after the last block; the original R-Transformer has none.
        norm_position (`str`, defaults to `"pre"`):
            `"pre"`: x + sublayer(norm(x)); `"post"`: norm(x + sublayer(x)), with `final_norm` False.
        layer_norm_type (`str`, defaults to `"standard"`):
            `"standard"` is `torch.nn.LayerNorm`; `"original"` divides by the unbiased standard deviation plus
            `layer_norm_eps`, as the published R-Transformer code does, for checkpoints converted from it;
            `"rms"` divides by the root of the mean square and has no bias.
        layer_norm_eps (`float`, defaults to 1e-5): added to the variance, or to the standard deviation, in LayerNorms.
        attention_bias, mlp_bias (`bool`, default to `True`): biases in the projections of both kinds of sublayers.
        normalize_keys (`bool`, defaults to `False`):
            scale queries and keys to unit length, and multiply the scores by one learned factor per head in place of
            1 / sqrt(d).
        linear_structure (`str`, defaults to `"dense"`):
            The weights of the linear layers in the blocks: `"dense"`; `"monarch"`, a product of two block-diagonal
            factors with 2 / `linear_blocks` of the weights where input and output are equally wide; or `"butterfly"`,
            a product of sparse factors with fewer weights still, slow by design, for models trained with it.
        linear_blocks (`int`, defaults to 4):
            Blocks of a Monarch factor: a divisor of `hidden_size`, and its square at most `hidden_size`.
        linear_structure_in (`list[str]`, *optional*):
            The parts that have the structure, of `"local_rnn"`, `"attention"` and `"feed_forward"`; None for all.
            Embeddings, heads and gates are dense.
        num_input_features (`int`, *optional*):
            If set, the input is `input_values` of shape `(batch, length, num_input_features)`, mapped by a linear
            layer in place of the token embedding; there is then no token embedding to tie.
        tie_word_embeddings (`bool`, defaults to `True`): the language model head uses the embedding's weight.
        lm_head_bias (`bool`, defaults to `True`): a bias in the language model head, as the original code has.
        embedding_dropout (`float`, defaults to 0.0): dropout of the embedded input.
        hidden_dropout (`float`, defaults to 0.0): dropout of each sublayer's output and inside the feed-forward layer.
        output_dropout (`float`, defaults to 0.0): dropout of the hidden states after the last block and its norm.
        attention_dropout (`float`, defaults to 0.0):
            dropout of the softmax attention weights (not of the REM). On a CPU any makes training compute and keep the
            weights of all pairs of positions, since PyTorch's fused attention has no dropout there.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial embeddings and projections.
        use_cache (`bool`, defaults to `True`): return the keys, values and LocalRNN windows for decoding.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): special token ids.

    Raises:
        ValueError: a value out of range or an unknown name, with the field, the value and what would be right.

    Sources: Wang et al. 2019, "R-Transformer" (arXiv 1907.05572); Huang et al. 2023, "Encoding Recurrence into
    Transformers" (ICLR 2023).

    Example:

    ```python
    >>> from modeling_rtransformer import RTransformerConfig, RTransformerForCausalLM

    >>> config = RTransformerConfig(hidden_size=128, num_attention_heads=4, rem_kinds=["regular"] * 2 + ["none"] * 2)
    >>> model = RTransformerForCausalLM(config)
    ```
    """

    model_type = "rtransformer"
    code: ClassVar[dict[str, str]] = AUTO_MAP
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 256
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 3
    num_attention_heads: int = 8
    hidden_act: str = "relu"
    is_causal: bool = True
    num_local_rnns: int = 1
    local_rnn_type: str = "gru"
    local_window: int = 7
    local_padding: str = "zeros"
    rem_kinds: list[str] | None = None
    rem_dilations: int | list[int] = 1
    rem_gate: str = "layer"
    rem_layers: list[int] | None = None
    attentive_steps: int = 0
    attentive_rnn_type: str = "gru"
    attentive_form: str = "positions"
    attentive_start: str = "input"
    attentive_layers: list[int] | None = None
    attentive_fusion: str = "gated_sum"
    position_embedding: str = "none"
    clamp_length: int | None = None
    memory_length: int | None = None
    memory_mask: str = "window"
    see_own_position: bool = True
    recurrent_layers: list[int] | None = None
    block_length: int | None = None
    num_state_vectors: int = 512
    state_gate: str = "fixed"
    state_update: str = "skip"
    final_norm: bool = True
    norm_position: str = "pre"
    layer_norm_type: str = "standard"
    layer_norm_eps: float = 1e-5
    attention_bias: bool = True
    mlp_bias: bool = True
    normalize_keys: bool = False
    linear_structure: str = "dense"
    linear_blocks: int = 4
    linear_structure_in: list[str] | None = None
    num_input_features: int | None = None
    tie_word_embeddings: bool = True
    lm_head_bias: bool = True
    embedding_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    output_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("model_type", self.model_type) != self.model_type:
            raise ValueError(
                f"`model_type` must be {self.model_type!r}, got {kwargs['model_type']!r}: this is the checkpoint of "
                "another model, which AutoModel loads"
            )
        for name in FORMER_FIELDS.keys() & kwargs.keys() - self.__dataclass_fields__.keys():
            if kwargs.pop(name) != FORMER_FIELDS[name]:
                raise ValueError(
                    f"`{name}` is a field of RTransformerForecasterConfig; in the config.json of a forecaster that was "
                    "saved before version 0.2, change `model_type` to 'rtransformer_forecaster' (its weights stay)"
                )
        for name in kwargs:
            hint = difflib.get_close_matches(name, self.architecture_fields(), n=1, cutoff=0.9)
            if hint and not hasattr(type(self), name):
                raise ValueError(f"`{name}` is not a field of {type(self).__name__}; did you mean `{hint[0]}`?")
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_input_features is not None:
            self.tie_word_embeddings = False
        kwargs.setdefault("auto_map", dict(self.code))
        super().__post_init__(**kwargs)
        self.validate_architecture()  # a plain ValueError at once; the strict dataclass repeats it after every change

    @classmethod
    def architecture_fields(cls) -> list[str]:
        """Names of the fields that this class adds to those of `PreTrainedConfig`."""
        return [name for name in cls.__dataclass_fields__ if name not in PreTrainedConfig.__dataclass_fields__]

    def validate_architecture(self) -> None:
        """Check every field against the others. Called by the strict dataclass; raises ValueError."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            f"divisible by `num_attention_heads` ({self.num_attention_heads})",
        )
        self._require(self.num_local_rnns >= 0, "num_local_rnns", "at least 0")
        self._require(self.local_window >= 1, "local_window", "at least 1")
        self._require_name("local_rnn_type", LOCAL_RNN_TYPES)
        self._require_name("local_padding", LOCAL_PADDINGS)
        self._require_name("hidden_act", tuple(ACT2FN))
        self._require_name("rem_gate", REM_GATES)
        self._require_name("position_embedding", POSITION_EMBEDDINGS)
        self._require_name("layer_norm_type", LAYER_NORM_TYPES)
        self._require(
            self.position_embedding not in ("sinusoidal", "relative") or self.hidden_size % 2 == 0,
            "hidden_size",
            f"even with `position_embedding` {self.position_embedding!r}",
        )
        for name in ("embedding_dropout", "hidden_dropout", "output_dropout", "attention_dropout"):
            self._require(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        if self.num_input_features is not None:
            self._require(self.num_input_features >= 1, "num_input_features", "at least 1, or None for token ids")
        self._validate_memory()
        self._validate_rem()
        self._validate_structure()
        self._validate_attentive()

    def _validate_memory(self) -> None:
        self._require_name("memory_mask", MEMORY_MASKS)
        self._require_name("norm_position", NORM_POSITIONS)
        self._require_name("state_gate", STATE_GATES)
        self._require_name("state_update", STATE_UPDATES)
        if self.norm_position == "post":
            self._require(not self.final_norm, "final_norm", "False with `norm_position` 'post'")
        if self.memory_length is not None:
            self._require(self.memory_length >= 1, "memory_length", "at least 1, or None for the whole past")
        if self.clamp_length is not None:
            self._require(self.clamp_length >= 1, "clamp_length", "at least 1, or None for no limit")
            is_relative = self.position_embedding == "relative"
            self._require(is_relative, "clamp_length", "None without `position_embedding` 'relative'")
        if not self.is_causal:
            self._require(self.memory_length is None, "memory_length", "None with `is_causal` False")
            self._require(self.see_own_position, "see_own_position", "True with `is_causal` False")
            by_distance = self.position_embedding in ("relative", "t5")
            self._require(not by_distance, "position_embedding", "'none' or 'sinusoidal' with `is_causal` False")
        if self.normalize_keys:
            self._require(self.position_embedding != "relative", "normalize_keys", "False with relative positions")
        if self.recurrent_layers:
            self._validate_recurrent_layers()

    def _validate_recurrent_layers(self) -> None:
        last = self.num_hidden_layers - 1
        for layer in self.recurrent_layers:
            self._require(0 <= layer <= last, "recurrent_layers", f"indices of the blocks, from 0 to {last}")
            has_rem = self.rem_kinds is not None and layer in (self.rem_layers or [])
            self._require(not has_rem, "rem_layers", f"without {layer}, which `recurrent_layers` names")
        self._require((self.block_length or 0) >= 1, "block_length", "at least 1 with `recurrent_layers`")
        self._require(self.num_state_vectors >= 1, "num_state_vectors", "at least 1")
        self._require(self.memory_length is not None, "memory_length", "a number with `recurrent_layers`")
        self._require(self.memory_mask == "window", "memory_mask", "'window' with `recurrent_layers`")

    def _validate_rem(self) -> None:
        heads = self.num_attention_heads
        if self.rem_kinds is not None:
            self._require(len(self.rem_kinds) == heads, "rem_kinds", f"None or one entry for each of the {heads} heads")
            for head, kind in enumerate(self.rem_kinds):
                if kind not in REM_KINDS:
                    raise ValueError(
                        f"`rem_kinds[{head}]` must be one of {', '.join(REM_KINDS)}, "
                        f"got {kind!r}{nearest(kind, REM_KINDS)}"
                    )
        dilations = self.rem_dilations
        if isinstance(dilations, list):
            self._require(len(dilations) == heads, "rem_dilations", f"one value, or one for each of the {heads} heads")
        for dilation in dilations if isinstance(dilations, list) else [dilations]:
            self._require(dilation >= 1, "rem_dilations", "at least 1")
        for layer in self.rem_layers or []:
            self._require(
                0 <= layer < self.num_hidden_layers,
                "rem_layers",
                f"indices of the {self.num_hidden_layers} blocks, from 0 to {self.num_hidden_layers - 1}",
            )

    def _refuse_unread(self, read: tuple[str, ...]) -> None:
        """Refuse a value other than the default in a field of [`RTransformerConfig`] that is not among `read`."""
        for field in dataclasses.fields(RTransformerConfig):
            is_read = field.name in read or field.name in PreTrainedConfig.__dataclass_fields__
            if not is_read and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"`{field.name}` must be left out, since a {self.model_type} does not read it, "
                    f"got {getattr(self, field.name)!r}"
                )

    def _validate_structure(self) -> None:
        self._require_name("linear_structure", LINEAR_STRUCTURES)
        self._require(self.linear_blocks >= 1, "linear_blocks", "at least 1")
        parts = self.linear_structure_in
        self._require(parts is None or bool(parts), "linear_structure_in", "None for all parts, or name at least one")
        for index, part in enumerate(parts or []):
            if part not in LINEAR_PARTS:
                raise ValueError(
                    f"`linear_structure_in[{index}]` must be one of {', '.join(LINEAR_PARTS)}, "
                    f"got {part!r}{nearest(part, LINEAR_PARTS)}"
                )
        if self.recurrent_layers:
            self._require(self.linear_structure == "dense", "linear_structure", "'dense' with `recurrent_layers`")
        if self.linear_structure != "monarch":
            return
        self._require(
            self.hidden_size % self.linear_blocks == 0,
            "linear_blocks",
            f"a divisor of `hidden_size` ({self.hidden_size}) with `linear_structure` 'monarch'",
        )
        widths = ["hidden_size"] + ["intermediate_size"] * ("feed_forward" in self.structured_parts)
        for name in widths:
            self._require(
                self.linear_blocks**2 <= getattr(self, name),
                "linear_blocks",
                f"at most the square root of `{name}` ({getattr(self, name)}) with `linear_structure` 'monarch'",
            )

    def _validate_attentive(self) -> None:
        self._require(self.attentive_steps >= 0, "attentive_steps", "at least 1, or 0 for none")
        self._require_name("attentive_rnn_type", ATTENTIVE_RNN_TYPES)
        self._require_name("attentive_form", ATTENTIVE_FORMS)
        self._require_name("attentive_start", ATTENTIVE_STARTS)
        self._require_name("attentive_fusion", ATTENTIVE_FUSIONS)
        if self.attentive_steps:  # its queries see the first block's keys as an ordinary attention shows them
            self._require(self.memory_length is None, "memory_length", "None with `attentive_steps`")
            self._require(self.see_own_position, "see_own_position", "True with `attentive_steps`")
            self._require(not self.normalize_keys, "normalize_keys", "False with `attentive_steps`")
            by_distance = self.position_embedding in ("relative", "t5")
            self._require(not by_distance, "position_embedding", "'none' or 'sinusoidal' with `attentive_steps`")
        if self.attentive_form == "slots":
            self._require(self.attentive_steps >= 1, "attentive_steps", "at least 1 with `attentive_form` 'slots'")
            self._require(not self.is_causal, "is_causal", "False with `attentive_form` 'slots'")
            self._require(self.attentive_start == "zero", "attentive_start", "'zero' with `attentive_form` 'slots'")
        if self.attentive_layers is None:
            return
        layers, count = self.attentive_layers, self.num_hidden_layers
        self._require(self.attentive_steps >= 1, "attentive_steps", "at least 1 with `attentive_layers`")
        self._require(
            len(layers) > 0 and all(-count <= layer < count for layer in layers),
            "attentive_layers",
            f"None or indices of the {count} blocks, from {-count} to {count - 1}, at least one",
        )

    def _require(self, holds: bool, name: str, requirement: str) -> None:
        if not holds:
            raise ValueError(f"`{name}` must be {requirement}, got {getattr(self, name)}")

    def _require_name(self, name: str, valid: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in valid:
            raise ValueError(f"`{name}` must be one of {', '.join(valid)}, got {value!r}{nearest(value, valid)}")

    def layer_rem_heads(self, layer_idx: int) -> list[tuple[int, str, int]]:
        """`(head, kind, dilation)` of each REM head of the block `layer_idx`, in the order of the heads."""
        if self.rem_kinds is None or self.is_recurrent(layer_idx):
            return []
        if self.rem_layers is not None and layer_idx not in self.rem_layers:
            return []
        dilations = self.rem_dilations
        if isinstance(dilations, int):
            dilations = [dilations] * self.num_attention_heads
        return [(h, kind, m) for h, (kind, m) in enumerate(zip(self.rem_kinds, dilations)) if kind != "none"]

    def is_recurrent(self, layer_idx: int) -> bool:
        """Whether the block `layer_idx` has a block-recurrent mixer in place of its attention."""
        return layer_idx in (self.recurrent_layers or [])

    @property
    def layers_with_attentive_states(self) -> set[int]:
        """Indices of the blocks that read the attentive states; none without `attentive_steps`."""
        layers = [-1] if self.attentive_layers is None else self.attentive_layers
        return {layer % self.num_hidden_layers for layer in layers} if self.attentive_steps else set()

    def layer_mixers(self, layer_idx: int) -> dict[str, int]:
        """The mixers of the block `layer_idx` in the order in which they run: how many of each, by name in `MIXERS`."""
        return {"local_rnn": self.num_local_rnns, "block_recurrent" if self.is_recurrent(layer_idx) else "attention": 1}

    @property
    def input_size(self) -> int | None:
        """Numbers of one position, None where the input is token ids."""
        return self.num_input_features

    @property
    def structured_parts(self) -> tuple[str, ...]:
        """The parts of a block whose linear layers have a structure; none with `linear_structure` "dense"."""
        if self.linear_structure == "dense":
            return ()
        return LINEAR_PARTS if self.linear_structure_in is None else tuple(self.linear_structure_in)

    @property
    def head_dim(self) -> int:
        """Size d of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def has_windows(self) -> bool:
        """Whether a LocalRNN reads inputs before its own position."""
        return self.num_local_rnns > 0 and self.local_window > 1

    @property
    def has_rems(self) -> bool:
        """Whether an attention head has a REM."""
        return any(self.layer_rem_heads(layer_idx) for layer_idx in range(self.num_hidden_layers))

    @property
    def reads_order(self) -> bool:
        """Whether a layer reads the order of the tokens, which an attention mask does not say."""
        return self.has_windows or self.has_rems or bool(self.recurrent_layers)

    @property
    def layer_types(self) -> list[str]:
        """
        What the cache of Transformers must hold for each block: keys and values, all or with `memory_length` the last
        ones, and as a "hybrid" also the LocalRNN windows and the recurrent states if any.
        """
        kinds = ("full_attention", "hybrid") if self.memory_length is None else ("sliding_attention", "hybrid_sliding")
        return [kinds[self.has_windows or self.is_recurrent(layer_idx)] for layer_idx in range(self.num_hidden_layers)]

    @property
    def number_of_conv_states(self) -> int:
        """
        Windows, and recurrent states, that the cache of Transformers has room for in each block: one window for each
        LocalRNN, and the states of a block-recurrent mixer with their keys and values.
        """
        return max(self.num_local_rnns, 3 if self.recurrent_layers else 0)

    @property
    def sliding_window(self) -> int:
        """
        The window of the cache's layers, which keep one key fewer: the M keys before a query and, for a block-recurrent
        mixer, the keys of the block before while the current block fills up. A config without `memory_length` has no
        such attribute, by which Transformers tells models with a window; to set it sets `memory_length`.
        """
        if self.memory_length is None:
            raise AttributeError("`sliding_window` needs `memory_length`, which is None")
        return max(self.memory_length + 1, 2 * self.block_length if self.recurrent_layers else 0)

    @sliding_window.setter
    def sliding_window(self, window: int) -> None:
        self.memory_length = window - 1


__all__ = ["RTransformerConfig", "rem_heads"]
