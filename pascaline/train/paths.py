"""The fast paths that a stage asks for, each beside its plain form, and what the log says of them."""

import warnings

import torch

from pascaline.device import device_name
from pascaline.model.fp8_linear import lacking, to_fp8_
from pascaline.model.moe import Experts
from pascaline.model.transformer import Model
from pascaline.tables import Stage


def take(model: Model, stage: Stage, dtype: torch.dtype, device: torch.device | None = None) -> list[str]:
    """Put what `stage` asks for into `model`, before it is cut; one line each on where it computes and how. device: where a model
    without memory will be."""
    device = device or model.device
    cuda = device.type == "cuda"
    flex = stage.compile and cuda and not stage.qk_clip  # its kernel keeps the largest logit to itself
    attention = "FlexAttention under the document mask" if flex else "PyTorch's kernel" if cuda else "matmuls by blocks of queries"
    experts = "grouped matmul" if cuda else "a matmul for each expert's segment"
    told = [f"{str(dtype).removeprefix('torch.')} on {device_name(device)}; attention: {attention}"]
    if model.config.n_routed_experts:
        told[0] += f"; experts: {experts}"
    if stage.fp8:
        why = lacking(device)
        how = f"emulated in float32, to try it out ({why})" if why else "by the device's own product where both sides are multiples of 128"
        told.append(f"{to_fp8_(model)} linear layers in fp8, scaled by 1x128 and 128x128, {how}")
    if stage.compile:
        model.flex = flex
        compile_(model)
        told.append(f"{len(model.model.layers)} layers compiled, one by one, in the first step of each shape")
    return told


def compile_(model: Model) -> None:
    """Compile each layer's forward in place; hooks around it (FSDP's) stay as they are. The CPU's way through the experts is left out: its
    segments are other ones each time, and would be compiled each time."""
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex operators")  # only the turns are
    for module in model.modules():
        if isinstance(module, Experts):
            module.by_segment = torch.compiler.disable(module.by_segment)  # type: ignore[method-assign]
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward)
