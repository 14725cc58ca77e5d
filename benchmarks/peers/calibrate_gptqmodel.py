"""GPTQ with GPTQModel: to packed codes, which are decoded again for the layer error."""

import os

import torch

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # with one, its default on two cores, it refuses to start
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors.torch import save_file
from turns import Settings, Turns, rows


def main() -> None:
    settings = Settings()
    turns = Turns(settings)
    tokens = rows(settings.rows, settings.length, settings.vocabulary, 9)
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    while True:
        how = QuantizeConfig(
            bits=settings.bits,
            group_size=settings.group,
            sym=False,
            offload_to_disk=False,
            device="cpu",
        )
        model = GPTQModel.load(settings.model, how, dtype=torch.float32)
        turns.wait()
        model.quantize(data, batch_size=settings.batch, backend=BACKEND.TORCH)
        turns.done()
        found = dict(model.model.named_modules())
        for name in settings.layers:
            module = found[name]
            if module.qzero_format() == 1:  # zero points are stored less one, which decoding is not
                convert_gptq_v1_to_v2_format_module(module, module.bits, module.pack_dtype)
        dense = {name: found[name].dequantize_weight().T.float() for name in settings.layers}
        save_file({name: w.contiguous() for name, w in dense.items()}, settings.weights)


if __name__ == "__main__":
    main()
