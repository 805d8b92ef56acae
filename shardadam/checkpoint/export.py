# SPDX-License-Identifier: Apache-2.0
"""Exports a checkpoint as files that torch.load or safetensors reads without shardadam.

Streams tensors in chunks; only a tensor that must be reordered to row-major is whole in memory. Verifies everything it
reads. Files appear when all of them are complete.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from shardadam.checkpoint.checksums import memory_of
from shardadam.checkpoint.directory import create_directory, sync_directory
from shardadam.checkpoint.files import CheckpointError, TensorSpec, create_exclusively
from shardadam.checkpoint.reader import Reader, open_newest
from shardadam.checkpoint.schema import MODEL_PREFIX
from shardadam.checkpoint.values import Values
from shardadam.engine.averaging import rounded
from shardadam.state.flat_shard import in_shape
from shardadam.update import formats

Format = Literal["torch", "safetensors", "trainer"]
FORMATS: tuple[Format, ...] = ("torch", "safetensors", "trainer")
TRAINER_FOLDER = "shardadam"
"""Where a ShardedTrainer's checkpoint has the optimizer."""
Weights = Literal["trained", "ema"]
WEIGHTS: tuple[Weights, ...] = ("trained", "ema")


def export(
    directory: str | os.PathLike[str],
    *,
    format: Format,
    output: str | os.PathLike[str] | None = None,
    weights: Weights = "trained",
) -> list[Path]:
    """Writes the newest checkpoint in ``directory``, or ``directory`` itself if it is one, as plain files. Local.

    ``torch``: ``model.pt`` for ``model.load_state_dict``, and ``optimizer.pt`` for
    ``torch.optim.AdamW.load_state_dict``; both load with ``torch.load(weights_only=True)``. ``safetensors``:
    ``model.safetensors`` and ``optimizer.safetensors``, which has tensors ``state.NAME.exp_avg`` and so on, and
    ``param_groups``, ``steps`` and, with averages, ``n_averaged`` as JSON in its metadata. A model or optimizer that
    was not saved has no file. ``trainer``: ``optimizer.pt`` for transformers' Trainer, from a checkpoint of a
    ShardedTrainer, which has the other files already; without masters and averages, which its AdamW does not have.

    Tensors have the parameters' shapes; moments, masters and averages are float32 (float64 for float64 parameters) in
    every format. ``torch`` files keep strides, and tied tensors share memory. safetensors files are row-major, contain
    tied tensors once, and list their other names as ``aliases`` in the metadata.

    Args:
        directory: with ``trainer``, one checkpoint of a ShardedTrainer, such as ``out/checkpoint-500``.
        output: directory for the files, created if missing. Default: ``NAME-FORMAT`` in the current directory, with the
            name of the checkpoint; with ``trainer``, ``directory``.
        weights: ``"ema"``: the model has the averages of its trained parameters (``ema_decay``) in their place, rounded
            to their dtype as by ``averaged_parameters``; there is no file of the optimizer then.

    Returns:
        The paths of the files.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, it lacks the averages that are to be exported, a file
            exists already, or a file cannot be written; with ``trainer``, the optimizer has other parameters than the
            ``model.safetensors`` beside it. No file is left behind then.
    """
    if format not in FORMATS:
        raise ValueError(f"format: found {format!r}, expected one of {FORMATS}")
    if weights not in WEIGHTS:
        raise ValueError(f"weights: found {weights!r}, expected one of {WEIGHTS}")
    source = Path(directory).absolute()
    if format == "trainer":
        if weights != "trained":
            raise ValueError('weights: found "ema", expected "trained" with format "trainer", which exports no model')
        output = source if output is None else output
        source = _optimizer_of(source)
    with open_newest(source) as reader:
        if format == "trainer":
            _check_against_model(Values(reader), Path(directory) / "model.safetensors")
        output = Path(f"{reader.path.name}-{format}" if output is None else output).absolute()
        values: Values = Values(reader) if weights == "trained" else _AveragedModel(reader)
        write = {"torch": _write_torch, "safetensors": _write_safetensors, "trainer": _write_trainer}[format]
        try:
            with _published(output) as files:
                write(values, files)
            return files.paths
        except OSError as error:
            raise CheckpointError(f"{output}: {error}. Nothing was exported.") from error


class _AveragedModel(Values):
    """The model of a checkpoint with averages in place of its trained parameters, and no optimizer."""

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        self._averages: dict[str, str] = {}  # keys of the averages, by that of the parameter
        for name in self.parameters:
            key = f"{MODEL_PREFIX}{name}"
            if key in self.specs and name not in self.n_averaged:
                raise CheckpointError(
                    f"{reader.path} has no average of {name!r}, expected those of all trained parameters. Train with "
                    "ema_decay, or export the trained weights."
                )
            if key in self.specs:
                self._averages[key] = self.state_of(name)[formats.AVERAGE]
        if not self._averages:
            raise CheckpointError(
                f"{reader.path} has no averages of a model's parameters. Save model and optimizer, with ema_decay, or "
                "export the trained weights."
            )

    def param_groups(self) -> list[dict[str, Any]]:
        return []

    def chunks(self, key: str) -> Iterator[Tensor]:
        if key not in self._averages:
            yield from super().chunks(key)
            return
        for chunk in super().chunks(self._averages[key]):
            yield rounded(chunk, self.specs[key].dtype)


class _Files:
    """Opens files under temporary names, which ``_published`` replaces at the end."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self.paths: list[Path] = []

    def new(self, name: str) -> IO[bytes]:
        path = self._output / name
        if os.path.lexists(path):
            raise CheckpointError(f"{path} exists already. Remove it, or export to another directory.")
        try:
            descriptor = create_exclusively(_temporary(path))
        except FileExistsError as error:
            raise CheckpointError(
                f"{_temporary(path)} exists already: another export is writing there, or one was killed. Remove it, or "
                "export to another directory."
            ) from error
        self.paths.append(path)
        return open(descriptor, "wb")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.exporting")


@contextmanager
def _published(output: Path) -> Iterator[_Files]:
    """Renames all files that the block opened to their own names; if it fails, removes all of them."""
    created: list[Path] = []
    files = _Files(output)
    published: list[Path] = []
    try:
        created = create_directory(output)
        yield files
        for path in files.paths:
            os.replace(_temporary(path), path)
            published.append(path)
        sync_directory(output)
    except BaseException:
        for path in (*published, *map(_temporary, files.paths)):
            path.unlink(missing_ok=True)
        for path in created:
            with suppress(OSError):
                path.rmdir()
        raise


def _finish(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


# torch.save's format: a zip file of a pickle and the bytes of each tensor


ALIGNMENT_BYTES = 64
_ZIP64_FROM_BYTES = 2**30


@dataclass(eq=False, slots=True)
class _Record:
    """A tensor that is read later. If an object contains it twice, both places share one tensor after loading."""

    spec: TensorSpec
    chunks: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return self.spec.numel * self.spec.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Storage:
    """The memory of a tensor, in a pickle."""

    identifier: tuple[Any, ...]


class _Pickler(pickle.Pickler):
    """Pickles ``_Record``s and tensors as torch.save pickles tensors; ``records`` has them in order."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, protocol=2)  # torch's restricted unpickler knows no later one
        self.records: list[_Record] = []

    def persistent_id(self, value: Any) -> Any:
        return value.identifier if isinstance(value, _Storage) else None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            value = _record_of(value)
        if not isinstance(value, _Record):
            return NotImplemented
        key, spec = str(len(self.records)), value.spec
        self.records.append(value)
        arguments: tuple[Any, ...] = (0, spec.shape, _strides(spec), False, OrderedDict())
        legacy = torch.storage._dtype_to_storage_type_map().get(spec.dtype)
        if legacy is not None:
            storage = _Storage(("storage", getattr(torch, legacy), key, "cpu", spec.numel))
            return torch._utils._rebuild_tensor_v2, (storage, *arguments)
        storage = _Storage(("storage", torch.UntypedStorage, key, "cpu", value.nbytes))
        return torch._utils._rebuild_tensor_v3, (storage, *arguments, spec.dtype)


def _record_of(tensor: Tensor) -> _Record:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise CheckpointError(
            f"An object of the model contains a tensor of layout {tensor.layout} and dtype {tensor.dtype} on "
            f"{tensor.device}, expected a dense one on the CPU. Its checkpoint cannot be exported."
        )
    flat = tensor.detach().cpu().contiguous().view(-1)
    return _Record(TensorSpec(tensor.dtype, tuple(tensor.shape), tuple(range(tensor.ndim))), lambda: [flat])


def _strides(spec: TensorSpec) -> tuple[int, ...]:
    return in_shape(torch.empty(spec.numel, device="meta"), spec.shape, spec.order).stride()


def _write_torch(values: Values, files: _Files) -> None:
    keys = [key for key in values.specs if key.startswith(MODEL_PREFIX)]
    objects = values.model_objects()
    if keys or objects:
        records = {key: _stored(values, key) for key in keys}
        aliases = {alias: records[key] for alias, key in values.aliases.items()}
        named = {**records, **aliases, **objects}
        with files.new("model.pt") as file:
            _save(file, {key.removeprefix(MODEL_PREFIX): value for key, value in named.items()})
    groups = values.param_groups()
    if groups:
        with files.new("optimizer.pt") as file:
            _save(file, _adamw_state(values, groups))


def _stored(values: Values, key: str) -> _Record:
    return _Record(values.specs[key], lambda: values.chunks(key))


def _optimizer_of(checkpoint: Path) -> Path:
    """Returns the directory of the optimizer in a ShardedTrainer's checkpoint."""
    if not (checkpoint / TRAINER_FOLDER).is_dir() or not (checkpoint / "trainer_state.json").is_file():
        raise CheckpointError(
            f"{checkpoint} is no checkpoint of a ShardedTrainer, which has a folder {TRAINER_FOLDER} and a "
            "trainer_state.json. Pass one that ShardedTrainer has saved, such as out/checkpoint-500."
        )
    return checkpoint / TRAINER_FOLDER


def _write_trainer(values: Values, files: _Files) -> None:
    groups = values.param_groups()
    with files.new("optimizer.pt") as file:
        _save(file, _adamw_state(values, groups, kinds=formats.MOMENTS))


def _check_against_model(values: Values, path: Path) -> None:
    """Raises if the optimizer's parameters are not among the model's: the Trainer would refuse them, or mix them up.

    Models in several files, and adapters, have other files, and are not checked.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop(_METADATA, None)
    shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    trained = {name: values.specs[values.state_of(name)["exp_avg"]].shape for name in values.parameters}
    if len(trained) > len(shapes):
        raise CheckpointError(
            f"{path} has {len(shapes)} tensors, but the optimizer has {len(trained)} parameters, which must be among "
            "them. Export a checkpoint whose model and optimizer were saved together."
        )
    for name, shape in trained.items():
        if shapes.get(name, shape) != shape:
            raise CheckpointError(
                f"{path}: found {name!r} of shape {shapes[name]}, expected {shape}, as in the optimizer. Export a "
                "checkpoint whose model and optimizer were saved together."
            )


def _adamw_state(
    values: Values, groups: list[dict[str, Any]], kinds: tuple[str, ...] = formats.STATE
) -> dict[str, Any]:
    """Returns what ``AdamW.state_dict`` would, with these kinds of tensors."""
    state: dict[int, Any] = {}
    position, packed = 0, []
    for names, group in zip(values.groups, groups, strict=True):
        packed.append({**group, "params": list(range(position, position + len(names)))})
        for index, name in enumerate(names, position):
            if name in values.steps:
                state[index] = {"step": torch.tensor(values.steps[name], dtype=torch.float32, device="cpu")}
                keys = values.state_of(name)
                state[index] |= {kind: _stored(values, key) for kind, key in keys.items() if kind in kinds}
                if name in values.n_averaged and formats.AVERAGE in kinds:
                    state[index]["n_averaged"] = torch.tensor(values.n_averaged[name], device="cpu")
        position += len(names)
    return {"state": state, "param_groups": packed}


def _save(file: IO[bytes], value: Any) -> None:
    """Writes what ``torch.save(value, file)`` would write if ``_Record``s were tensors."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        info = _aligned("data.pkl", file.tell(), 0)
        with archive.open(info, "w") as entry:
            pickler = _Pickler(entry)
            pickler.dump(value)
        _add_record(archive, file, "byteorder", [memoryview(sys.byteorder.encode())])
        for key, record in enumerate(pickler.records):
            parts = (memory_of(chunk.contiguous()) for chunk in record.chunks())
            _add_record(archive, file, f"data/{key}", parts, record.nbytes)
        _add_record(archive, file, "version", [memoryview(b"3\n")])
    _finish(file)


def _add_record(
    archive: zipfile.ZipFile, file: IO[bytes], name: str, parts: Iterable[memoryview], nbytes: int = 0
) -> None:
    info = _aligned(name, file.tell(), nbytes)
    with archive.open(info, "w", force_zip64=nbytes >= _ZIP64_FROM_BYTES) as entry:
        for part in parts:
            entry.write(part)


def _aligned(name: str, offset: int, nbytes: int) -> zipfile.ZipInfo:
    """Returns an entry whose bytes start at a multiple of ``ALIGNMENT_BYTES``, so that files can be memory-mapped."""
    info = zipfile.ZipInfo(f"archive/{name}")
    header_bytes = 30 + len(info.filename) + (20 if nbytes >= _ZIP64_FROM_BYTES else 0) + 4
    padding = -(offset + header_bytes) % ALIGNMENT_BYTES
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return info


# safetensors: the length of a header, the header, the bytes of each tensor


SAFETENSORS_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
}


_METADATA = "__metadata__"


def _write_safetensors(values: Values, files: _Files) -> None:
    objects = list(values.model_objects())
    if objects:
        raise CheckpointError(
            f"{objects[0]} is no tensor; safetensors files contain only tensors. Export with format torch."
        )
    keys = [key for key in values.specs if key.startswith(MODEL_PREFIX)]
    if keys:
        model = {key.removeprefix(MODEL_PREFIX): key for key in keys}
        aliases = {a.removeprefix(MODEL_PREFIX): key.removeprefix(MODEL_PREFIX) for a, key in values.aliases.items()}
        _write_file(values, files, "model.safetensors", model, {"aliases": aliases} if aliases else {})
    groups = values.param_groups()
    if groups:
        state = {
            f"state.{name}.{kind}": key for name in values.parameters for kind, key in values.state_of(name).items()
        }
        named = [{**group, "params": names} for names, group in zip(values.groups, groups, strict=True)]
        numbers = {"steps": values.steps, **({"n_averaged": values.n_averaged} if values.n_averaged else {})}
        _write_file(values, files, "optimizer.safetensors", state, {"param_groups": named, **numbers})


def _write_file(
    values: Values, files: _Files, file_name: str, keys: Mapping[str, str], metadata: Mapping[str, Any]
) -> None:
    """Writes one file. ``keys``: keys of the checkpoint, by name in the file."""
    if _METADATA in keys:
        raise CheckpointError(
            f"{keys[_METADATA]} is called {_METADATA}, a name that safetensors files have for something else. Export "
            "with format torch."
        )
    try:
        texts = {name: json.dumps(value, default=_to_json) for name, value in metadata.items()}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"A param group contains what JSON lacks: {error}. Export with format torch.") from error
    header: dict[str, Any] = {_METADATA: {"format": "pt", **texts}}
    end = 0
    # In order of descending element size, every tensor is aligned to its own.
    names = sorted(keys, key=lambda name: -values.specs[keys[name]].dtype.itemsize)
    for name in names:
        spec = values.specs[keys[name]]
        if spec.dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{keys[name]} is {spec.dtype}, which safetensors lacks. Export with format torch.")
        begin, end = end, end + spec.numel * spec.dtype.itemsize
        dtype = SAFETENSORS_DTYPES[spec.dtype]
        header[name] = {"dtype": dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with files.new(file_name) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            for chunk in _row_major(values, keys[name]):
                file.write(memory_of(chunk.contiguous()))
        _finish(file)


def _row_major(values: Values, key: str) -> Iterator[Tensor]:
    spec = values.specs[key]
    if spec.order == tuple(range(len(spec.shape))):
        yield from values.chunks(key)
    else:
        flat = torch.empty(math.prod(spec.shape), dtype=spec.dtype, device="cpu")
        start = 0
        for chunk in values.chunks(key):
            flat[start : start + chunk.numel()] = chunk
            start += chunk.numel()
        yield in_shape(flat, spec.shape, spec.order).contiguous().view(-1)


def _to_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")
