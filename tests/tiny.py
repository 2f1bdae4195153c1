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


def tiny_olmo3(path: Path, *, vocab: int = VOCAB, seed: int = 0, **overrides: Any) -> Path:
    """An OLMo-3 with an untied head (the paper's scorer's family): hidden size 32, 2 layers."""
    from transformers import Olmo3Config

    values: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "tie_word_embeddings": False,
    }
    return tiny_model(path, Olmo3Config(**{**values, **overrides}), seed=seed)


def tiny_bpe(path: Path, *, vocab: int) -> Path:
    """Replace the tokenizer in ``path`` by a byte-pair one trained on English words: about two tokens a word."""
    from importlib.resources import files

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = sorted(word for file in sorted(files("wonderwords.assets").iterdir(), key=lambda file: file.name)
                   if file.name.endswith(".txt") for word in file.read_text().split())  # fmt: skip
    specials = ["<|endoftext|>", "<|pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator((f" {word}" for word in words), trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=specials, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    ))  # fmt: skip
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[0],
                                   pad_token=specials[1])  # fmt: skip
    fast.save_pretrained(path)
    return path


def tiny_encoder(path: Path) -> Path:
    """A random sentence-transformers model: a BERT of one layer under mean pooling."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    inner = path.with_name(f"{path.name}-bert")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=32)  # fmt: skip
        BertModel(config).save_pretrained(tiny_tokenizer(inner))
    body = Transformer(str(inner), max_seq_length=64)
    SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension())]).save(str(path))
    return path
