"""Hugging Face decoders: load and save them with their edits, and find their blocks.

Importing this module teaches transformers the quantization method "drawplate", after which plain
`AutoModelForCausalLM.from_pretrained` loads what any stage wrote: the edits are installed on the
empty model before the safetensors are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from drawplate import edits
from drawplate.core.artifact import is_ours, verify
from drawplate.core.errors import Damaged, UserError

METHOD = "drawplate"
_FILLED: Any = torch.empty(0)
_FILLED._is_hf_initialized = True


@register_quantization_config(METHOD)
class EditsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The list of edits as it stands in `config.json` under `quantization_config`."""

    def __init__(self, edits: list[dict[str, Any]] | None = None, **_: Any):
        self.quant_method = METHOD
        self.edits = edits or []


@register_quantizer(METHOD)
class EditsQuantizer(HfQuantizer):  # type: ignore[misc]
    """Installs the edits on the empty model; their tensors are then read like any other."""

    requires_calibration = False
    requires_parameters_quantization = False

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for edit in edits.parse(self.quantization_config.edits):
            edit.install(model)
        # What is in no file (angles, masks) transformers computes anew, module by module, and some
        # architectures initialise a child's `weight` there as well. A stand-in has none: until all
        # is loaded it gets one that counts as read from the file, which leaves it alone.
        for module in model.modules():
            if isinstance(module, edits.StandIn):
                cast("Any", module).weight = _FILLED

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for module in model.modules():
            if isinstance(module, edits.StandIn):
                del module.weight

    def param_needs_quantization(self, *_: Any, **__: Any) -> bool:
        """No: what is stored is what is used."""
        return False

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Yes: `save_pretrained` writes the stand-ins' tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes: factors, surviving values, scales and adapters take gradients."""
        return True


def record(model: nn.Module, specs: tuple[edits.Edit, ...]) -> None:
    """Makes `specs` the edits of `model`, so that saving it writes them."""
    config = cast("Any", model).config
    if not specs:
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return
    dumped = [spec.model_dump(exclude_none=True) for spec in specs]
    config.quantization_config = EditsConfig(edits=dumped)


def load(folder: Path | str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Any local folder that holds a Hugging Face decoder -> the model, in evaluation mode.

    A folder that has a manifest is verified against it first. Code in the folder is never run.

    Raises:
        UserError: there is no such folder, or it holds no decoder.
        Damaged: hashes, names, shapes or values are not what they should be.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json, so this is not a Hugging Face model folder")
    if is_ours(folder):
        verify(folder)
    try:
        for file in weight_files(folder):
            with safe_open(file, framework="pt"):  # refuses one that is cut short
                pass
        foreign = _config(folder)
        _refuse_other_quantization(folder, foreign)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (SafetensorError, json.JSONDecodeError) as error:
        raise Damaged(f"{folder}: not readable: {_line(error)}") from None
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        raise UserError(f"{folder}: transformers cannot load this: {_line(error)}") from None
    wrong = {
        what: sorted(str(name) for name in report.get(f"{what}_keys", ()))
        for what in ("missing", "unexpected", "mismatched")
    }
    for what, names in wrong.items():
        if names:
            raise Damaged(f"{folder}: {len(names)} {what} tensors, first {names[0]}")
    _finite(folder, model)
    edits.check(model)
    return cast("PreTrainedModel", model.eval())


def load_tokenizer(folder: Path | str) -> Any:
    """The tokenizer that lies beside a model.

    Raises:
        UserError: the folder holds none.
        Damaged: its files are not those of a tokenizer.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json beside the model")
    settings = folder / "tokenizer_config.json"
    try:
        named = (
            json.loads(settings.read_text()).get("tokenizer_class") if settings.is_file() else ""
        )
        # A generic tokenizer is taken as it stands: the automatic choice goes by the model's type
        # and would put that type's special tokens into it.
        generic = named in {"PreTrainedTokenizerFast", "TokenizersBackend"}
        kind = PreTrainedTokenizerFast if generic else AutoTokenizer
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of any kind: tokenizers raises nothing more special
        raise Damaged(
            f"{folder}: tokenizer.json or tokenizer_config.json is not readable: {_line(error)}; "
            "put those of the model there"
        ) from None


def save(model: PreTrainedModel, folder: Path, tokenizer: Any = None) -> None:
    """Writes the model, its edits and its tokenizer; to be called inside `publish`."""
    _finite(folder, model)
    edits.check(model)
    model.save_pretrained(folder, safe_serialization=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's list of equal blocks, and its path.

    Raises:
        UserError: there is none, or two of the same length.
    """
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    }
    outermost = {
        path: module
        for path, module in lists.items()
        if not any(path.startswith(f"{other}.") for other in lists)
    }
    most = max((len(module) for module in outermost.values()), default=0)
    longest = [(path, module) for path, module in outermost.items() if len(module) == most]
    if len(longest) != 1:
        raise UserError(
            f"{type(model).__name__}: expected one list of decoder blocks, found {len(longest)}"
        )
    return longest[0]


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the model's tensors as a checkpoint stores them, each shared one once."""
    tensors = {(tensor.data_ptr(), tensor.shape): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _config(folder: Path) -> Any:
    """What `config.json` says.

    Raises:
        UserError: transformers makes nothing of it.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of any kind: it computes with whatever stands in the file
        file, zeros = folder / "config.json", ""
        if isinstance(error, ArithmeticError):
            found = json.loads(file.read_text()).items()
            named = [key for key, value in found if type(value) is int and value == 0]
            zeros = f"; 0 are: {', '.join(named)}"
        raise UserError(f"{file}: transformers cannot use this: {_line(error)}{zeros}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model is loaded from; others may lie beside them.

    Raises:
        UserError: one is missing.
        Damaged: the index points outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():  # transformers prefers the one file
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        if Path(name).name != name:
            raise Damaged(f"{index}: points outside the folder: {name!r}")
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name}; expected weights in safetensors files")
    return [folder / name for name in names]


def _refuse_other_quantization(folder: Path, config: Any) -> None:
    other = getattr(config, "quantization_config", None)
    method = (
        other.get("quant_method")
        if isinstance(other, dict)
        else getattr(other, "quant_method", METHOD)
    )
    if other is not None and method != METHOD:
        raise UserError(f"{folder}: already quantized by {method!r}; give the unquantized model")


def _finite(folder: Path, model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise Damaged(f"{folder}: tensor {name} holds NaN or infinity")


def _line(error: BaseException) -> str:
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return more[0].strip() if more and first.endswith(":") else first
