"""The same weights encoded and decoded by the libraries of the field, in the layout of our formats.

    python -m tests.formats.libraries            compare on random and edge weights (`make test-formats`)
    python -m tests.formats.libraries --golden   write golden.safetensors, which the default tests read

Runs in `.venv-peers/formats`: compressed-tensors, torchao and bitsandbytes are not among our dependencies.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.formats.weights import cases
from treering.formats import FP8, MXFP4, NF4, NVFP4, Format, Integer
from treering.store.untrusted import read_header
from treering.weights.quantized.folder import read_quantized

PACKAGES = ("compressed-tensors==0.20.0", "torchao==0.18.0", "bitsandbytes==0.50.2", "loguru")
GOLDEN = Path(__file__).with_name("golden.safetensors")
Library = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]  # weight -> our tensors, the library's decoded weight


def u8(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def digest(t: Tensor) -> str:
    return hashlib.sha256(u8(t).numpy().tobytes()).hexdigest()


def compressed_config(args: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def check_folder(config: dict[str, Any], stored: dict[str, Tensor], decoded: Tensor) -> None:
    """Our reader of published folders gives what the library decodes of the very tensors that it would save."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file({key: t.contiguous() for key, t in stored.items()}, file)
        shapes = {header.name: (header.dtype, tuple(header.shape)) for header in read_header(file)}
        (weight,) = read_quantized(
            config,
            shapes,
            lambda key, rows=slice(None): stored[key][rows] if stored[key].ndim else stored[key],
            "FOLDER",
        ).weights.values()
        assert torch.equal(weight.dense(decoded.dtype), decoded), weight.form


def compressed(form: Format, dtype: torch.dtype) -> Library:
    """compressed-tensors' own quantizer, packer and decoder."""
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    arguments: dict = {"symmetric": True}
    if isinstance(form, NVFP4):
        arguments |= {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
        arguments |= {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
        compressor, group = NVFP4PackedCompressor, 16
    elif isinstance(form, MXFP4):
        arguments |= {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
        arguments |= {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
        compressor, group = MXFP4PackedCompressor, 32
    elif isinstance(form, FP8):
        arguments |= {"num_bits": 8, "type": "float", "strategy": form.scale}
        compressor, group = NaiveQuantizationCompressor, 0
    else:
        assert isinstance(form, Integer)
        group = form.group
        arguments |= {"num_bits": form.width, "type": "int", "symmetric": not form.asymmetric}
        arguments |= {"strategy": "group", "group_size": group} if group > 0 else {"strategy": "channel"}
        compressor = PackedQuantizationCompressor

    def run(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        args = QuantizationArgs(**arguments)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        grouped = weight.unflatten(-1, (-1, group)) if group else weight[:, None]
        low, high = grouped.amin(-1), grouped.amax(-1)
        if isinstance(form, FP8) and form.scale == "tensor":
            low, high = weight.min().reshape(1), weight.max().reshape(1)
        whole = generate_gparam(weight.min(), weight.max()) if isinstance(form, NVFP4) else None
        scale, zero = calculate_qparams(low, high, args, global_scale=whole)
        state = {"weight": weight, "weight_scale": scale}
        if form.settings().get("asymmetric"):  # a zero point of 0 would turn −0.0 into 0.0
            state["weight_zero_point"] = zero
        if whole is not None:
            state["weight_global_scale"] = whole
        state = compressor.compress(state, scheme)
        decoded = compressor.decompress(dict(state), scheme)["weight"]
        check_folder(compressed_config(args), {f"m.{key}": t for key, t in state.items()}, decoded)
        if isinstance(form, NVFP4):
            whole = u8(state["weight_global_scale"])[None]
            return {"codes": state["weight_packed"], "scales": u8(state["weight_scale"]), "global": whole}, decoded
        if isinstance(form, MXFP4):
            return {"codes": state["weight_packed"], "scales": state["weight_scale"]}, decoded
        if isinstance(form, FP8):
            scales = state["weight_scale"].reshape(-1, 1)
            return {"codes": u8(state["weight"]), "scales": u8(scales)}, decoded
        tensors = {"codes": u8(state["weight_packed"]), "scales": u8(state["weight_scale"])}
        return tensors | ({"zeros": u8(zero.to(torch.int8))} if form.asymmetric else {}), decoded

    return run


def torchao(form: Format, dtype: torch.dtype) -> Library:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    def run(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        assert isinstance(form, MXFP4)
        mode = {"floor": ScaleCalculationMode.FLOOR, "even": ScaleCalculationMode.EVEN}[form.rounding]
        t = MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32, mode)
        return {"codes": u8(t.qdata), "scales": u8(t.scale)}, t.dequantize(dtype)

    return run


def bitsandbytes(form: Format, dtype: torch.dtype) -> Library:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def run(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        assert isinstance(form, NF4)
        rows = len(weight)
        packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=form.nested, quant_type="nf4")
        tensors = {"codes": packed.view(rows, -1)}
        if form.nested:
            tensors |= {"scales": state.absmax.view(rows, -1), "nested": u8(state.state2.absmax[:, None])}
            tensors["offset"] = u8(state.offset.reshape(1, 1).float())
        else:
            tensors["scales"] = u8(state.absmax.view(rows, -1))
        decoded = dequantize_4bit(packed, state)
        stored = {"m.weight": packed} | {f"m.weight.{key}": t for key, t in state.as_dict(packed=True).items()}
        check_folder({"quant_method": "bitsandbytes", "load_in_4bit": True}, stored, decoded)
        return tensors, decoded

    return run


def pairs(dtype: torch.dtype) -> Iterator[tuple[str, Format, Library]]:
    scale = str(dtype).removeprefix("torch.")
    ours: list[tuple[str, Format, Callable]] = [
        ("compressed-tensors", NVFP4(), compressed),
        ("compressed-tensors", MXFP4(), compressed),
        ("compressed-tensors", FP8(scale_dtype=scale), compressed),
        ("compressed-tensors", FP8(scale="tensor", scale_dtype=scale), compressed),
        ("torchao", MXFP4(rounding="floor"), torchao),
        ("torchao", MXFP4(rounding="even"), torchao),
        ("bitsandbytes", NF4(), bitsandbytes),
        ("bitsandbytes", NF4(nested=False), bitsandbytes),
    ]
    for width in (3, 4, 8):
        for group in (0, 32, 128):
            # compressed-tensors 0.20 cannot decode a single column of zero points.
            for asymmetric in (False, True) if group else (False,):
                form = Integer(width=width, group=group, scale_dtype=scale, asymmetric=asymmetric)  # type: ignore[arg-type]
                ours.append(("compressed-tensors", form, compressed))
    for library, form, run in ours:
        yield library, form, run(form, dtype)


def compare(seed: int) -> dict[str, list[int]]:
    """Return for each pair the numbers of comparisons, of encodings and of decodings that differ."""
    counts: dict[str, list[int]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for library, form, run in pairs(dtype):
            for weight in cases(dtype, seed).values():
                if library == "compressed-tensors":
                    weight = weight + 0  # it drops the sign of −0.0, which torchao keeps
                theirs, decoded = run(weight)
                ours = form.encode(weight)
                row = counts.setdefault(f"{library} {form.settings()}", [0, 0, 0])
                problem = form.problem(theirs, tuple(weight.shape))
                assert not problem, problem
                row[0] += 1
                row[1] += any(not torch.equal(ours[key], theirs[key]) for key in ours)
                row[2] += not torch.equal(form.decode(theirs, weight.shape[-1], decoded.dtype), decoded)
    return counts


def write_golden() -> None:
    """Write one file: a weight of each dtype, every library's tensors for it, and digests of what it decodes to."""
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict] = {}
    for dtype in (torch.float32, torch.bfloat16):
        kinds = cases(dtype)
        weight = torch.cat([kinds["blocks"][:5], kinds["ties"][:4], kinds["heavy"][:7]])[:, :128].contiguous() + 0
        tensors[f"weight {dtype}"] = weight
        for library, form, run in pairs(dtype):
            if isinstance(form, Integer) and (form.width, form.group) not in {(3, 32), (4, 128), (8, 0)}:
                continue
            theirs, decoded = run(weight)
            key = f"{len(described)}"
            described[key] = {"library": library, "weight": f"weight {dtype}", "form": form.settings()}
            described[key] |= {"dtype": str(decoded.dtype), "decoded": digest(decoded)}
            tensors |= {f"{key}.{part}": t.contiguous() for part, t in theirs.items()}
    save_file(tensors, GOLDEN, {"cases": json.dumps(described), "packages": " ".join(PACKAGES)})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--golden", action="store_true")
    parser.add_argument("--inside", action="store_true", help="this is the environment that holds the libraries")
    options = parser.parse_args()
    if not options.inside:
        from benchmarks.peers import environment

        python = environment.python("formats", PACKAGES, "compressed_tensors, torchao, bitsandbytes")
        command = [str(python), "-W", "ignore", "-m", "tests.formats.libraries", "--inside"]
        sys.exit(subprocess.run(command + (["--golden"] if options.golden else [])).returncode)
    if options.golden:
        write_golden()
        return
    total: dict[str, list[int]] = {}
    for seed in range(10):
        for key, row in compare(seed).items():
            total[key] = [a + b for a, b in zip(total.get(key, [0, 0, 0]), row, strict=True)]
    for key, (count, encoded, decoded) in total.items():
        print(f"{count:5} compared, {encoded:4} encoded and {decoded:4} decoded otherwise: {key}")
    differ = sum(row[2] for row in total.values()) + sum(
        row[1] for key, row in total.items() if "'nested': True" not in key
    )
    print(f"{sum(row[0] for row in total.values())} comparisons, {differ} differences")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
