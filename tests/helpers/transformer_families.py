"""Tiny models with random weights of the families in transformers that decode with selective_state_update."""

import torch

_COMMON = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
_MIXED = {**_COMMON, **_ATTENTION}
_BAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 8}

FAMILIES = {
    "Mamba": {**_COMMON, "state_size": 8},
    "FalconMamba": {**_COMMON, "state_size": 8},
    "Mamba2": {**_COMMON, "num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 8},
    "Bamba": {**_MIXED, **_BAMBA, "attn_layer_indices": [1]},
    "NemotronH": {
        **{name: value for name, value in _MIXED.items() if name != "num_hidden_layers"},
        "layers_block_type": ["linear_attention", "full_attention", "mlp"],
        "head_dim": 8,
        "ssm_state_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "FalconH1": {**_MIXED, **_BAMBA, "mamba_d_ssm": 64, "head_dim": 8},
    "Zamba2": {
        **_MIXED,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_d_state": 16,
        "mamba_ngroups": 2,
        "n_mamba_heads": 4,
        "chunk_size": 8,
    },
    "GraniteMoeHybrid": {
        **_MIXED,
        **_BAMBA,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 16,
    },
    "Jamba": {**_MIXED, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
}


def tiny(family):
    """Return a model of a family, the same in each run, that does not stop before it has written all."""
    import transformers  # which takes seconds

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family], eos_token_id=None)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # far enough from zero for the tokens to differ
        parameter.data.mul_(3) if parameter.ndim == 2 else None
    return model
