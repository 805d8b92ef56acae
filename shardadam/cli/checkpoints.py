# SPDX-License-Identifier: Apache-2.0
"""``shardadam export`` and ``shardadam inspect``: read checkpoints from a shell, without ranks or a model."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from shardadam.checkpoint.export import FORMATS, WEIGHTS, export
from shardadam.checkpoint.files import MANIFEST, CheckpointError
from shardadam.checkpoint.reader import Reader, open_newest
from shardadam.checkpoint.schema import MODEL_PREFIX, STATE_PREFIX
from shardadam.cli.text import binary_size, facts, show, table
from shardadam.update import formats


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    directory: dict[str, Any] = dict(
        metavar="DIR",
        type=Path,
        help="the directory given to shardadam.save (its newest checkpoint is read), or one checkpoint in it",
    )

    command = commands.add_parser(
        "export",
        help="write a checkpoint as files that load without shardadam",
        description="Writes a checkpoint as plain files: model.pt and optimizer.pt, for load_state_dict of the model "
        "and of torch.optim.AdamW, or model.safetensors and optimizer.safetensors. With --format trainer, writes the "
        "optimizer.pt that a plain transformers Trainer resumes from into a ShardedTrainer's checkpoint (DIR, such as "
        "out/checkpoint-500). Uses little memory for checkpoints of any size.",
    )
    command.add_argument("directory", **directory)
    command.add_argument("--format", required=True, choices=FORMATS)
    command.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="trained",
        help="ema: the averages of the weights (ema_decay) as the model, in the dtypes of the parameters, without the "
        "optimizer; default: trained",
    )
    command.add_argument(
        "--output",
        metavar="OUT",
        type=Path,
        help="directory for the files; default: ./NAME-FORMAT, or DIR with --format trainer",
    )
    command.set_defaults(run=_export)

    command = commands.add_parser(
        "inspect",
        help="list what a checkpoint contains, and verify it",
        description="Lists what a checkpoint contains, and reads all of it to verify its checksums. Exit code 1: it is "
        "damaged or incomplete.",
    )
    command.add_argument("directory", **directory)
    command.add_argument("--json", action="store_true", help="print JSON, for programs")
    command.add_argument("--no-verify", action="store_true", help="check the sizes of files only, without reading them")
    command.set_defaults(run=_inspect)


def _export(options: argparse.Namespace) -> int:
    paths = export(options.directory, format=options.format, output=options.output, weights=options.weights)
    for path in paths:
        show(f"{path}  {binary_size(path.stat().st_size)}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    found: dict[str, Any] = {"path": str(options.directory), "whole": False}
    try:
        with open_newest(options.directory.absolute()) as reader:
            found["path"] = str(reader.path)
            found |= _summary(reader)
            if not options.no_verify:
                for _ in reader.verify():
                    pass
        found |= {"whole": True, "verified": "sizes" if options.no_verify else "checksums"}
    except (CheckpointError, OSError) as error:
        found["error"] = str(error)
    if options.json:
        show(json.dumps(found, indent=2))
    elif "step" in found:
        show(_text(found))
    if "error" in found:
        show(f"shardadam: {found['error']}", to="stderr")
    return 0 if found["whole"] else 1


def _summary(reader: Reader) -> dict[str, Any]:
    manifest, index = reader.manifest, reader.index
    kinds: dict[tuple[str, str], list[int]] = {}
    for key, tensor in index.tensors.items():
        dtype = str(tensor.spec.dtype).removeprefix("torch.")
        counts = kinds.setdefault((_kind(key), dtype), [0, 0, 0])
        counts[:] = counts[0] + 1, counts[1] + tensor.spec.numel, counts[2] + tensor.nbytes
    trained = list(manifest.optimizer.parameters) if manifest.optimizer else []
    numel = sum(index.tensors[f"{STATE_PREFIX}{name}.exp_avg"].spec.numel for name in trained)
    parent = reader.path.parent
    return {
        "step": manifest.step,
        "world_size": manifest.world_size,
        **manifest.versions,
        "parameters": {"tensors": len(trained), "elements": numel},
        "tensors": [
            {"kind": kind, "dtype": dtype, "tensors": count, "elements": elements, "bytes": nbytes}
            for (kind, dtype), (count, elements, nbytes) in sorted(kinds.items(), key=_sort_key)
        ],
        "objects": {"number": len(index.objects), "bytes": sum(stored.nbytes for stored in index.objects.values())},
        "bytes": sum(nbytes for _, nbytes in index.files),
        "files": [{"name": name, "bytes": nbytes} for name, nbytes in index.files],
        "others": sorted(name for name in _checkpoints_in(parent) if name != reader.path.name),
    }


def _checkpoints_in(directory: Path) -> list[str]:
    """Returns the names of checkpoints, as far as they can be read."""
    found = []
    with suppress(OSError):
        for path in directory.iterdir():
            with suppress(OSError):
                if not path.name.startswith(".") and (path / MANIFEST).exists():
                    found.append(path.name)
    return found


KINDS = ("model", *formats.MOMENTS, "scales", "master", formats.AVERAGE)


def _kind(key: str) -> str:
    if key.startswith(MODEL_PREFIX):
        return "model"
    kind = key.rpartition(".")[2]
    return "scales" if kind in formats.SCALES else kind


def _sort_key(entry: tuple[tuple[str, str], list[int]]) -> tuple[int, str, str]:
    (kind, dtype), _ = entry
    return KINDS.index(kind) if kind in KINDS else len(KINDS), kind, dtype


# As text


def _text(found: dict[str, Any]) -> str:
    whole = "no" if not found["whole"] else "yes" if found["verified"] == "checksums" else "sizes only"
    parameters = found["parameters"]
    known = [
        ("checkpoint", found["path"]),
        ("step", str(found["step"])),
        ("saved on", f"{found['world_size']} rank{'s' if found['world_size'] != 1 else ''}"),
        ("versions", f"shardadam {found['shardadam']}, torch {found['torch']}"),
        ("parameters", f"{parameters['elements']:,} in {parameters['tensors']:,} trained tensors"),
        ("bytes", f"{found['bytes']:,} ({binary_size(found['bytes'])})"),
        ("others here", ", ".join(found["others"]) or "none"),
        ("whole", whole),
    ]
    kinds = [
        (entry["kind"], entry["dtype"], f"{entry['elements']:,}", f"{entry['bytes']:,}") for entry in found["tensors"]
    ]
    kinds.append(("other", "", f"{found['objects']['number']:,}", f"{found['objects']['bytes']:,}"))
    files = [(entry["name"], f"{entry['bytes']:,}") for entry in found["files"]]
    return "\n\n".join(
        [
            facts(known),
            table([("tensors", "dtype", "elements", "bytes"), *kinds], right=(2, 3)),
            table([("file", "bytes"), *files], right=(1,)),
        ]
    )
