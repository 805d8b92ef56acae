# SPDX-License-Identifier: Apache-2.0
"""Reads this rank's elements of a checkpoint's tensors in place, converted to the formats that they have here. Local.

Note: codes in other boxes
    A scale belongs to 128 codes that follow each other in the memory of a box. Where all elements of a block here come
    from blocks of equal scales, codes and scale are taken as they are. The others are decoded, and encoded again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shardadam.checkpoint.boxes import Run
from shardadam.checkpoint.contents import Contents, OwnedParameter, spec_of
from shardadam.checkpoint.pieces import Piece, pieces_of
from shardadam.checkpoint.reader import Reader, items_within
from shardadam.checkpoint.values import decoded
from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.state.flat_shard import in_shape
from shardadam.state.masters import write_master_
from shardadam.transport.placement import local_tensor
from shardadam.update import formats, reference


def read_tensors(contents: Contents, reader: Reader) -> None:
    """Reads tensors that are not sharded, and this rank's pieces of parameters and their state, in place."""
    aliases, saved = reader.manifest.aliases, reader.manifest.optimizer
    trained = saved.parameters if saved is not None else {}
    for key, tensor in contents.others.items():
        _read_other(tensor, reader, aliases.get(key, key))
    for parameter in contents.owned:
        source = _Source(reader, parameter, aliases)
        parameter.param.kept_master = None
        for piece in pieces_of(parameter.param):
            if contents.model is not None and source.dtype("parameter") is not None:
                _read_parameter(piece, source)
            if parameter.name in trained:
                _read_state(piece, source)
                piece.state_was_written()


class _Source:
    """The stored tensors of one parameter, read in the memory order of the box that this rank holds of it."""

    def __init__(self, reader: Reader, parameter: OwnedParameter, aliases: Mapping[str, str]) -> None:
        self._reader = reader
        kinds = (*formats.MOMENTS, *formats.SCALES, "master", formats.AVERAGE)
        keys = {kind: parameter.state_key(kind) for kind in kinds}
        keys["parameter"] = aliases.get(parameter.value_key, parameter.value_key)
        self._tensors = {kind: reader.index.tensors[key] for kind, key in keys.items() if key in reader.index.tensors}
        self._keys = keys
        _, self._box = spec_of(parameter.name, parameter.param.parameter)
        self._codes_box = -1
        for number, box in enumerate(
            self._tensors[formats.MOMENTS[0]].boxes if formats.SCALES[0] in self._tensors else ()
        ):
            if box.spec == self._box:
                self._codes_box = number

    def dtype(self, kind: str) -> torch.dtype | None:
        return self._tensors[kind].spec.dtype if kind in self._tensors else None

    @property
    def is_scaled(self) -> bool:
        """Whether the moments are codes."""
        return formats.SCALES[0] in self._tensors

    @property
    def has_same_blocks(self) -> bool:
        """Whether the moments are codes, and each scale is that of the same elements as here."""
        return self._codes_box >= 0

    def read(self, kind: str, piece: Piece, into: Tensor | None = None) -> Tensor:
        """Returns the piece of a tensor (of scales: its blocks); reads into ``into`` and returns it where possible.

        Args:
            kind: scales only if ``has_same_blocks``.
        """
        start, stop = piece.start, piece.stop
        if kind in formats.SCALES:
            start, stop = start // ALIGNMENT_NUMEL, -(-stop // ALIGNMENT_NUMEL)
        tensor = self._tensors[kind]
        dtype = tensor.spec.dtype
        direct = into is not None and into.dtype == dtype and into.device.type == "cpu" and into.is_contiguous()
        flat = into if direct and into is not None else torch.empty(stop - start, dtype=dtype, device="cpu")
        if kind in formats.SCALES:
            self._reader.read_stored_(self._keys[kind], tensor.boxes[self._codes_box], start, flat)
        else:
            self._reader.read_(self._keys[kind], self._box, start, flat)
        return flat

    def moments(self, piece: Piece, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the exact moments."""
        if self.is_scaled and not self.has_same_blocks:
            first, second = (self.codes(kind, piece)[0].to(device) for kind in formats.MOMENTS)
            return first, second
        kinds = (*formats.MOMENTS, *(formats.SCALES if self.is_scaled else ()))
        return formats.read_moments({kind: self.read(kind, piece).to(device) for kind in kinds})

    def codes(self, kind: str, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        """Returns a moment that is stored as codes in other boxes: its values, and code and scale of each element."""
        tensor, numel = self._tensors[kind], piece.stop - piece.start
        scale_kind = formats.SCALES[formats.MOMENTS.index(kind)]
        dtypes = (torch.float32, tensor.spec.dtype, torch.float32)
        found = tuple(torch.empty(numel, dtype=dtype, device="cpu") for dtype in dtypes)
        runs = [Run(self._box, piece.start, flat) for flat in found]
        for box, scales_box in zip(tensor.boxes, self._tensors[scale_kind].boxes, strict=True):
            for item in items_within(box, runs[0].regions):
                codes = self._reader.read_item(self._keys[kind], item)
                first, last = item.start // ALIGNMENT_NUMEL, (item.start + item.numel - 1) // ALIGNMENT_NUMEL
                scales = torch.empty(last + 1 - first, dtype=torch.float32, device="cpu")
                self._reader.read_stored_(self._keys[scale_kind], scales_box, first, scales)
                skipped = item.start - first * ALIGNMENT_NUMEL
                each = scales.repeat_interleave(ALIGNMENT_NUMEL)[skipped : skipped + item.numel]
                for run, values in zip(runs, (decoded(kind, codes, scales, skipped), codes, each), strict=True):
                    run.copy_(Run(box.spec, item.start, values))
        return found[0], found[1], found[2]


def _read_parameter(piece: Piece, source: _Source) -> None:
    parameter = piece.parameter()
    if source.dtype("parameter") == parameter.dtype:
        _copy_(parameter, source.read("parameter", piece, parameter))
    else:
        exact = source.read("parameter" if source.dtype("master") is None else "master", piece)
        narrow = exact.dtype == torch.float32 and parameter.dtype in (torch.bfloat16, torch.float16)
        parameter.copy_(reference.round_half_away(exact, parameter.dtype) if narrow else exact)


def _read_state(piece: Piece, source: _Source) -> None:
    state = piece.state()
    own = [kind for kind in (*formats.MOMENTS, *formats.SCALES) if kind in state]
    if any(source.dtype(kind) != state[kind].dtype for kind in own):
        formats.write_moments_(state, *source.moments(piece, state[formats.MOMENTS[0]].device))
    elif source.is_scaled and not source.has_same_blocks:
        _read_codes(piece, source, state)
    else:
        for kind in own:
            _copy_(state[kind], source.read(kind, piece, state[kind]))
    if "master" in state or "remainder" in state:
        parameter = master = piece.parameter()
        if source.dtype("master") is not None:
            master = source.read("master", piece).to(parameter.device)
        elif source.dtype("parameter") == torch.float32:
            master = source.read("parameter", piece).to(parameter.device)
        write_master_(piece.param, master, state=state, parameter=parameter, start=piece.state_start)
    if formats.AVERAGE in state and source.dtype(formats.AVERAGE) is not None:  # else n_averaged becomes 0
        average = state[formats.AVERAGE]
        _copy_(average, source.read(formats.AVERAGE, piece, average))


def _read_codes(piece: Piece, source: _Source, state: Mapping[str, Tensor]) -> None:
    """See "Note: codes in other boxes"."""
    device = state[formats.MOMENTS[0]].device
    found = [source.codes(kind, piece) for kind in formats.MOMENTS]
    exp_avg, exp_avg_sq = (values.to(device) for values, _, _ in found)
    formats.write_moments_(state, exp_avg, exp_avg_sq)
    for kind, scale_kind, (_, codes, scales) in zip(formats.MOMENTS, formats.SCALES, found, strict=True):
        missing = -len(scales) % ALIGNMENT_NUMEL
        blocks = torch.cat([scales, scales[-1:].expand(missing)]).view(-1, ALIGNMENT_NUMEL)
        is_kept = (blocks == blocks[:, :1]).all(dim=1)
        of_elements = is_kept.repeat_interleave(ALIGNMENT_NUMEL)[: len(codes)].to(device)
        state[kind].copy_(torch.where(of_elements, codes.to(device), state[kind]))
        state[scale_kind].copy_(torch.where(is_kept.to(device), blocks[:, 0].to(device), state[scale_kind]))


def _copy_(target: Tensor, value: Tensor) -> None:
    if value is not target:
        target.copy_(value)


def _read_other(tensor: Tensor, reader: Reader, key: str) -> None:
    stored = reader.index.tensors[key]
    _, box = spec_of(key, tensor)
    # Read in the memory order that is stored, the copy reorders.
    same = next((each.spec for each in stored.boxes if each.spec.all_runs == box.all_runs), box)
    flat = torch.empty(box.numel, dtype=stored.spec.dtype, device="cpu")
    reader.read_(key, same, 0, flat)
    local_tensor(tensor).detach().copy_(in_shape(flat, same.shape, same.order))
