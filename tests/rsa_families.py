"""Tiny random models of real Transformers classes, for the tests of `add_rsa`, and an attention in plain loops."""

import copy
import functools
import math

import torch
import transformers as hf
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from modeling_rtransformer.rsa_attention import attention_sites, is_cross_attention


# Three heads with a REM of different kinds, one of them dilated, and a plain one.
HEADS = {"regular": 1, "first_cyclical": 0, "second_cyclical": 1, "dilated_first_cyclical": 1, "dilations": [2]}
# The parameters of those three heads: the second and the third are pairs without their partners.
LAYOUT = [("regular", 1, "eta", 0), ("second_cyclical", 1, "nu", 0), ("first_cyclical", 2, "nu", 1)]
SIZE = {"vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
ENCODER = {**SIZE, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = {**SIZE, **TOKENS, "max_position_embeddings": 128}
GROUPED = {**DECODER, "num_key_value_heads": 2}
ENCODER_DECODER = {
    **{"vocab_size": 37, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64},
    **{"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
}
SERIES = {
    **{"prediction_length": 6, "context_length": 12, "lags_sequence": [1, 2], "num_time_features": 1, "d_model": 32},
    **{"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0, "scaling": None},
}


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 37}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **TOKENS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def gemma3():
    kinds = ["sliding_attention", "full_attention"]
    sizes = {**GROUPED, "head_dim": 8, "sliding_window": 5, "layer_types": kinds, "query_pre_attn_scalar": 8}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes))


def mistral():
    return hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, head_dim=8, sliding_window=5))


def modernbert():
    sizes = {**SIZE, **TOKENS, "max_position_embeddings": 64, "local_attention": 6, "global_attn_every_n_layers": 2}
    return hf.ModernBertForMaskedLM(hf.ModernBertConfig(**sizes, cls_token_id=1, sep_token_id=2))


def distilbert():
    sizes = {"vocab_size": 37, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}
    return hf.DistilBertForMaskedLM(hf.DistilBertConfig(**sizes, dropout=0.0, attention_dropout=0.0))


def vit():
    return hf.ViTForImageClassification(hf.ViTConfig(**SIZE, image_size=12, patch_size=4, num_labels=5))


def t5():
    sizes = {"vocab_size": 37, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = hf.T5Config(**sizes, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0, eos_token_id=None)
    return hf.T5ForConditionalGeneration(config)


def bart():
    tokens = {**TOKENS, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    return hf.BartForConditionalGeneration(hf.BartConfig(**ENCODER_DECODER, **tokens))


def whisper():
    sizes = {**ENCODER_DECODER, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64}
    config = hf.WhisperConfig(**sizes, **TOKENS, decoder_start_token_id=2, suppress_tokens=None)
    return hf.WhisperForConditionalGeneration(config)


def patchtst():
    sizes = {"num_input_channels": 2, "context_length": 24, "patch_length": 4, "patch_stride": 4, "d_model": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "prediction_length": 6}
    return hf.PatchTSTForPrediction(hf.PatchTSTConfig(**sizes))


def opt():
    sizes = {"vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    sizes |= {"word_embed_proj_dim": 32, "max_position_embeddings": 128, "dropout": 0.0}
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes, **TOKENS))


def deepseek_v3():
    sizes = {**DECODER, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8}
    sizes |= {"qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2}
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes))


CAUSAL = {
    "gpt2": gpt2,
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8)),
    "mistral": mistral,
    "gemma3": gemma3,
}
MORE_CAUSAL = {
    "opt": opt,
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**DECODER)),
    "deepseek-v3": deepseek_v3,
}
BIDIRECTIONAL = {
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER, pad_token_id=0)),
    "modernbert": modernbert,
    "distilbert": distilbert,
}
SERIES_MODELS = {
    "informer": lambda: hf.InformerForPrediction(hf.InformerConfig(**SERIES, attention_type="full", distil=False)),
    "time-series": lambda: hf.TimeSeriesTransformerForPrediction(hf.TimeSeriesTransformerConfig(**SERIES)),
}
SEQUENCE_TO_SEQUENCE = {"t5": t5, "bart": bart}
OTHERS = {"vit": vit, "patchtst": patchtst, "whisper": whisper}
FAMILIES = {**CAUSAL, **MORE_CAUSAL, **BIDIRECTIONAL, **SERIES_MODELS, **SEQUENCE_TO_SEQUENCE, **OTHERS}


def build(family):
    """A model of a family in float64, in evaluation mode, whose parameters are large enough to matter."""
    torch.manual_seed(0)
    model = FAMILIES[family]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def inputs(family, batch=2, length=11):
    """Arguments of a forward of a family."""
    torch.manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 12, 12, dtype=torch.float64)}
    if family == "patchtst":
        return {"past_values": torch.randn(batch, 24, 2, dtype=torch.float64)}
    if family in SERIES_MODELS:
        times = {"past_time_features": (batch, 14, 1), "future_time_features": (batch, 6, 1)}
        series = {"past_values": (batch, 14), "past_observed_mask": (batch, 14), "future_values": (batch, 6)}
        values = {name: torch.randn(shape, dtype=torch.float64) for name, shape in {**times, **series}.items()}
        return {**values, "past_observed_mask": torch.ones(batch, 14, dtype=torch.float64)}
    decoder = {"decoder_input_ids": torch.randint(3, 37, (batch, length - 2))}
    if family == "whisper":
        return {"input_features": torch.randn(batch, 8, 24, dtype=torch.float64), **decoder}
    ids = {"input_ids": torch.randint(3, 37, (batch, length))}
    return {**ids, **decoder} if family in SEQUENCE_TO_SEQUENCE else ids


def output(model, **arguments):
    """The main output of a forward: logits, or the parameters of a forecast's distribution side by side."""
    result = model(**arguments)
    if getattr(result, "params", None) is not None:
        return torch.stack(list(result.params))
    return result.logits if "logits" in result else result.prediction_outputs


def rem(kind, distance, dilation, eigenvalue):
    """P[i, j] of the paper for s = i - j, in Python's float64."""
    if distance < 1 or distance % dilation:
        return 0.0
    n = distance // dilation
    if kind == "regular":
        return math.tanh(eigenvalue[0]) ** n
    decay = 1 / (1 + math.exp(-eigenvalue[0]))
    return decay**n * (math.cos if kind == "first_cyclical" else math.sin)(n * eigenvalue[1])


def loop_attention(module, query, key, value, attention_mask, scaling=None, position_bias=None, **kwargs):
    """
    An attention function that computes RSA in loops, from the parameters `eta`, `nu`, `theta`, `mu` of `module.rsa` and
    from `module.rem_layout`, `(kind, dilation, name, index of the parameter)` for each of the first heads.
    """
    batch, heads, queries, size = query.shape
    length = key.shape[2]
    assert queries == length
    [encoding] = module.rsa.rsa_encoding.values()
    share = heads // value.shape[1]
    out = torch.zeros(batch, queries, heads, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            keys, values = key[b, h // share].double(), value[b, h // share].double()
            scores = query[b, h].double() @ keys.T * (size**-0.5 if scaling is None else scaling)
            if position_bias is not None:
                scores = scores + position_bias[min(b, len(position_bias) - 1), h]
            visible = torch.ones(queries, length, dtype=torch.bool)
            if attention_mask is not None:
                row = attention_mask[min(b, len(attention_mask) - 1), min(h, attention_mask.shape[1] - 1)]
                visible = (row > -1e30).expand(queries, length)
            elif module.is_causal:
                visible = visible.tril()
            weights = scores.masked_fill(~visible, -1e300).softmax(-1)
            if h < len(module.rem_layout):
                kind, dilation, name, index = module.rem_layout[h]
                gate = math.tanh(encoding.mu[h].item())
                names = ["eta"] if name == "eta" else ["nu", "theta"]
                eigenvalue = [getattr(encoding, part)[index].item() for part in names]
                for i in range(queries):
                    for j in range(length):
                        distance = i - j if module.is_causal else abs(i - j)
                        p = rem(kind, distance, dilation, eigenvalue) if visible[i, j] else 0.0
                        weights[i, j] = (1 - gate) * weights[i, j] + gate * p
            out[b, :, h] = weights @ values
    return out, None


def open_gates(model, seed=2):
    """Give every RSA parameter of a model a value at random, of either sign for eta and mu, with gates far from 0."""
    generator = torch.Generator().manual_seed(seed)
    bounds = {"eta": (0.7, 1.6), "nu": (0.5, 2), "theta": (0.3, 2.5), "mu": (0.3, 1.2)}
    for path, parameter in model.named_parameters():
        if ".rsa." in path:
            name = path.rpartition(".")[2]
            low, high = bounds[name]
            numbers = low + (high - low) * torch.rand(parameter.shape, generator=generator)
            if name in ("eta", "mu"):
                numbers = numbers * torch.tensor([(-1) ** (index + 1) for index in range(len(numbers))])
            with torch.no_grad():
                parameter.copy_(numbers)


def inject(model, **options):
    """The adapter in the model itself, whatever versions of PEFT the adapters of Transformers need."""
    from peft import inject_adapter_in_model

    from modeling_rtransformer import RsaConfig

    return inject_adapter_in_model(RsaConfig(**(options or HEADS)), model)


def adapted(family, **options):
    model = inject(build(family), **options)
    open_gates(model)
    return model


@functools.cache
def shared_model(family):
    """A model that tests do not change."""
    return adapted(family)


def as_loops(model):
    """The same model, its attention computed by loops that share no code with the package."""
    model = copy.deepcopy(model)
    for module in attention_sites(model).values():
        module.config = module.config.base_config
        module.rem_layout = LAYOUT
        module._forward_pre_hooks.clear()
    AttentionInterface.register("loops", loop_attention)
    AttentionMaskInterface.register("loops", eager_mask)
    for module in model.modules():
        if isinstance(module, hf.PreTrainedModel):
            module.config._attn_implementation = "loops"
    for name, module in model.named_modules():
        if is_cross_attention(name, module) and isinstance(getattr(module, "config", None), hf.PreTrainedConfig):
            module.config = copy.copy(module.config)
            module.config._attn_implementation = "eager"
    return model
