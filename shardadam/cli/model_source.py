# SPDX-License-Identifier: Apache-2.0
"""The model that a plan is made for, from a number of parameters, a Hugging Face config or a function that builds it.

Builds models on the meta device, so that nothing is allocated. Uses the network only with ``download``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardadam.cli.errors import CommandError
from shardadam.planner import PlannedParameter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_MOST_CHARACTERS = 1000
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The parameters of a model, without their values.

    Args:
        what: as the user typed it.
        source: "number", "hugging_face" or "function".
        description: for readers; the class of the model, for example.
        parameters: by name, in the order of ``model.named_parameters()``; tied ones once.
    """

    what: str
    source: str
    description: str
    parameters: tuple[tuple[str, PlannedParameter], ...]

    @property
    def planned(self) -> list[PlannedParameter]:
        return [parameter for _, parameter in self.parameters]

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.planned)

    @property
    def trainable_numel(self) -> int:
        return sum(parameter.numel for parameter in self.planned if parameter.trainable)

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of elements of each dtype, by the dtype's short name."""
        counts: Counter[str] = Counter()
        for parameter in self.planned:
            counts[dtype_name(parameter.dtype)] += parameter.numel
        return dict(counts)

    def units(self) -> dict[str, list[PlannedParameter]]:
        """Returns the parameters of each module that ``fully_shard`` would be called on, guessed from their names.

        These are the outermost numbered modules ("model.layers.3"); all other parameters belong to the root, "".
        """
        found: dict[str, list[PlannedParameter]] = {}
        for name, parameter in self.parameters:
            parts = name.split(".")[:-1]
            numbers = [index for index, part in enumerate(parts) if part.isdigit()]
            found.setdefault(".".join(parts[: numbers[0] + 1]) if numbers else "", []).append(parameter)
        return found


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the short name, "bf16"; torch's name if there is none."""
    return _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def find_model_source(what: str, dtype: torch.dtype | None = None, *, download: bool = False) -> ModelSource:
    """Finds or builds the model that the user typed.

    Args:
        what: a number of parameters, a path, a name on the Hugging Face Hub, or module:function.
        dtype: of all floating-point parameters; None: the model's own, and bfloat16 for a number.
        download: whether a name that is not in the local cache may be looked up on the Hugging Face Hub.

    Raises:
        CommandError: the model cannot be found or built, or has no trainable parameters.
    """
    numel = parse_count(what)
    if numel is not None:
        found = decoder_of(what, numel)
        dtype = dtype or torch.bfloat16
    elif what.endswith(".py"):
        module = ".".join(Path(what).with_suffix("").parts).lstrip("./")
        raise CommandError(
            f"{what}: found a Python file, expected module:function. Give {module}:FUNCTION, where FUNCTION (or a "
            "class) returns the model and takes no arguments; the current directory is searched for the module."
        )
    elif Path(what).exists():
        found = _of_hugging_face(what, download=False)
    elif re.fullmatch(r"[\w.]+:[\w.]+", what):
        found = _of_function(what)
    elif what.startswith(("/", ".", "~")) or what.endswith((".json", "/")):
        raise CommandError(f"{what}: no such file or directory, expected a config.json or a directory that has one")
    else:
        found = _of_hugging_face(what, download=download)
    if not any(parameter.trainable and parameter.numel for parameter in found.planned):
        raise CommandError(f"{what}: found a model without trainable parameters, expected one to train")
    return found if dtype is None else _cast(found, dtype)


def _cast(source: ModelSource, dtype: torch.dtype) -> ModelSource:
    parameters = (
        (name, replace(parameter, dtype=dtype) if parameter.dtype.is_floating_point else parameter)
        for name, parameter in source.parameters
    )
    return replace(source, parameters=tuple(parameters))


# From a number


def parse_count(text: str) -> int | None:
    """Reads a number of parameters: "7B", "350M", "1.3e9", "1000". None if ``text`` is not a number.

    Raises:
        CommandError: the number is not between 1 and 10^13.
    """
    match = re.fullmatch(r"(\d+\.?\d*(?:[eE]\+?\d+)?)([KkMmBbTt]?)", text.replace(",", "").replace("_", ""))
    if match is None:
        return None
    number = float(match[1]) * {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[match[2].lower()]
    if not 1 <= number <= 1e13:
        raise CommandError(f"found {text} parameters, expected a number of 1 to 10^13")
    return round(number)


def decoder_of(what: str, numel: int) -> ModelSource:
    """Returns a decoder of exactly ``numel`` parameters with the proportions of Llama 2.

    A layer has four square matrices and three of 8/3 the width; there is one layer for each 128 of width. Embedding and
    head have 32,000 tokens (fewer in small models). The remainder goes to the vocabulary, then to the last norm.
    """

    def vocabulary_of(width: int) -> int:
        return min(32_000, max(1, numel // (8 * width)))

    def size(width: int) -> int:
        layer = sum(_numel(shape) for _, shape in _layer_shapes(width))
        return 2 * vocabulary_of(width) * width + width + max(1, width // 128) * layer

    widths = [width for width in (*range(16, 128, 16), *range(128, 2**17, 128)) if size(width) <= numel]
    if not widths:
        return ModelSource(what, "number", "one vector", (("weight", PlannedParameter((numel,))),))
    width = widths[-1]
    layer = sum(_numel(shape) for _, shape in _layer_shapes(width))
    vocabulary = vocabulary_of(width)
    # Between two widths, more layers make up most of the difference.
    layers = max(1, (numel - 2 * vocabulary * width - width) // layer)
    vocabulary = (numel - layers * layer - width) // (2 * width)
    rest = numel - layers * layer - 2 * vocabulary * width
    shapes = [
        ("embedding.weight", (vocabulary, width)),
        *((f"layers.{index}.{name}", shape) for index in range(layers) for name, shape in _layer_shapes(width)),
        ("norm.weight", (rest,)),
        ("head.weight", (vocabulary, width)),
    ]
    description = f"a decoder of {layers:,} layers, width {width:,}, {vocabulary:,} tokens"
    return ModelSource(what, "number", description, tuple((name, PlannedParameter(shape)) for name, shape in shapes))


def _layer_shapes(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = -(-8 * width // (3 * 16)) * 16
    for name in ("query", "key", "value", "out"):
        yield f"attention.{name}.weight", (width, width)
    yield "mlp.gate.weight", (hidden, width)
    yield "mlp.up.weight", (hidden, width)
    yield "mlp.down.weight", (width, hidden)
    yield "attention_norm.weight", (width,)
    yield "mlp_norm.weight", (width,)


def _numel(shape: Iterable[int]) -> int:
    return PlannedParameter(tuple(shape)).numel


# From a model


def _of_model(what: str, source: str, model: nn.Module) -> ModelSource:
    return ModelSource(what, source, type(model).__name__, tuple(PlannedParameter.of_model(model).items()))


def _of_hugging_face(what: str, *, download: bool) -> ModelSource:
    """Builds the model of a config. Never looks up an existing path on the Hub."""
    path = Path(what)
    if path.is_dir() and not (path / "config.json").is_file():
        raise CommandError(f"{what}: found a directory without config.json, expected one of a Hugging Face model")
    if importlib.util.find_spec("transformers") is None:
        raise CommandError(
            f"{what}: a Hugging Face config needs transformers, which is not installed: pip install "
            "'shardadam[transformers]'. A number of parameters (7B) or module:function works without it."
        )
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    try:
        # Without trust_remote_code=False, transformers asks on the terminal whether to run code of the config's author.
        config = transformers.AutoConfig.from_pretrained(what, local_files_only=not download, trust_remote_code=False)
    except Exception as error:
        raise CommandError(_why_no_config(what, error, download=download)) from error
    try:
        with torch.device("meta"):
            model = _build_config(transformers, config)
    except Exception as error:
        raise CommandError(_why_not_built(what, error)) from error
    source = _of_model(what, "hugging_face", model)
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CommandError(f"{what}: the config has dtype {dtype!r}, expected a floating-point one, such as bfloat16")
    return _cast(source, dtype)


def _build_config(transformers: Any, config: Any) -> nn.Module:
    """Builds the class that is trained, with its head, if the config names one that transformers has."""
    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, (list, tuple)) and names else None
    build = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(build, type) and issubclass(build, nn.Module):
        model: nn.Module = build(config)
    else:
        model = transformers.AutoModel.from_config(config, trust_remote_code=False)
    return model


def _why_not_built(what: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):  # its advice is to run the code
        return (
            f"{what}: found a config that needs Python code of its author, which shardadam does not run. Build the "
            "model in a function of your own, and give module:function."
        )
    return f"{what}: transformers cannot build this model: {_text_of(error)}"


def _why_no_config(what: str, error: Exception, *, download: bool) -> str:
    if "trust_remote_code" in str(error):
        return _why_not_built(what, error)
    if Path(what).exists():
        return f"{what}: not a config that transformers can read: {_text_of(error)}"
    where = f"on the Hugging Face Hub: {_text_of(error)}"
    if not download and isinstance(error, OSError):
        where = "in the local Hugging Face cache. Give --download to look it up on the Hub."
    return (
        f"{what}: expected a number of parameters (7B, 350M, 1.3e9), a file or directory, module:function, or the name "
        f"of a model; found no such model {where}"
    )


def _of_function(what: str) -> ModelSource:
    """Builds the model that a function returns. Searches the current directory first, as ``python`` does."""
    module_name, _, function_name = what.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        model = _call_on_meta(what, module_name, function_name)
    finally:
        sys.path.remove(here)
    return _of_model(what, "function", model)


def _call_on_meta(what: str, module_name: str, function_name: str) -> nn.Module:
    arguments, sys.argv = sys.argv, [module_name]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise CommandError(f"{what}: no module {error.name!r} in the current directory or installed") from error
        raise CommandError(f"{what}: importing {module_name} failed: {_text_of(error)}") from error
    except SystemExit as error:
        raise CommandError(
            f"{what}: importing {module_name} ended the process (SystemExit: {error.code}), expected definitions only: "
            "it parses the command line or trains where it is imported. Put that part of it under "
            '`if __name__ == "__main__":`.'
        ) from error
    except Exception as error:
        raise CommandError(f"{what}: importing {module_name} failed: {_text_of(error)}") from error
    finally:
        sys.argv = arguments
    try:
        function = attrgetter(function_name)(module)
    except AttributeError as error:
        raise CommandError(f"{what}: module {module_name!r} has no {function_name!r}") from error
    if not callable(function):
        raise CommandError(f"{what}: found a {type(function).__name__}, expected a function that returns an nn.Module")
    try:
        with torch.device("meta"):
            model = function()
    except Exception as error:
        raise CommandError(f"{what}: calling it on the meta device failed: {_text_of(error)}") from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"{what}: returned a {type(model).__name__}, expected an nn.Module")
    return model


def _text_of(error: BaseException) -> str:
    """Returns one line: the type, the message, and the file and line that raised it; the same of its root cause."""
    root, seen = error, {id(error)}
    while (before := root.__cause__ or (None if root.__suppress_context__ else root.__context__)) is not None:
        if id(before) in seen:
            break
        root = before
        seen.add(id(root))
    text = _own_text_of(error)
    return text if root is error else f"{text}, caused by {_own_text_of(root)}"


def _own_text_of(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    raised_at = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_MOST_CHARACTERS]}{'...' * (len(text) > _MOST_CHARACTERS)}{raised_at}"
