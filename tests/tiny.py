"""Tiny random models and a byte tokenizer on disk: what tests run in place of a downloaded model.

Everything here is a directory that ``from_pretrained`` loads, the same bytes for the same seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB = 258
"""Tokens of :func:`tiny_tokenizer`: ``<|endoftext|>`` is 0, ``<|pad|>`` is 1, the 256 bytes follow."""
POSITIONS = 256
"""Context of the tiny models, in tokens."""


def tiny_tokenizer(path: Path) -> Path:
    """Save a byte-level tokenizer (one token a UTF-8 byte, no BOS added) into ``path`` and return ``path``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|pad|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(specials + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[0], pad_token=specials[1],
        model_max_length=POSITIONS,
    )
    fast.save_pretrained(path)
    return path


def tiny_model(path: Path, config: Any, *, seed: int = 0) -> Path:
    """Save a randomly initialised causal LM of a transformers ``config``, with the tokenizer, into ``path``.

    The caller's random state is left as it was.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(path)
    return tiny_tokenizer(path)


def tiny_llama(path: Path, *, vocab: int = VOCAB, seed: int = 0, **overrides: Any) -> Path:
    """A Llama with a tied head (SmolLM2's family): hidden size 32, 2 layers. ``overrides`` go to the config."""
    from transformers import LlamaConfig

    values: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "tie_word_embeddings": True,
    }
    return tiny_model(path, LlamaConfig(**{**values, **overrides}), seed=seed)


def tiny_gpt_neox(path: Path, *, vocab: int = VOCAB, seed: int = 0, **overrides: Any) -> Path:
    """A GPTNeoX with an untied head (Pythia's family): hidden size 32, 2 layers. ``overrides`` go to the config."""
    from transformers import GPTNeoXConfig

    values: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": POSITIONS,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "tie_word_embeddings": False,
    }
    return tiny_model(path, GPTNeoXConfig(**{**values, **overrides}), seed=seed)
