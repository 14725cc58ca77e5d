"""Training with litgpt's model in bf16 and the loop of its `pretrain`: Fabric, AdamW, clipping."""

import warnings

import lightning
import torch
from litgpt import GPT, Config
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy
from safetensors.torch import load_file
from turns import Settings, Turns, rows


def main() -> None:
    settings = Settings()
    turns = Turns(settings)
    warnings.filterwarnings("ignore")
    config = Config(name="peer", **settings.shape)
    weights: dict[str, torch.Tensor] = {}
    theirs = load_file(f"{settings.model}/model.safetensors")
    theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"]
    copy_weights_hf_llama(config, {}, weights, theirs)

    fabric = lightning.Fabric(devices=1, accelerator="cpu", precision="bf16-true")
    fabric.launch()
    with fabric.init_module():
        model = GPT(config)
    model.load_state_dict(weights, strict=False)
    model.transformer.wte.weight = model.lm_head.weight
    model.max_seq_length = settings.length
    if settings.compile:
        model = torch.compile(model)
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(
            model.parameters(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
    )
    turns.wait()
    step = 0
    while True:
        data = rows(settings.batch, settings.length + 1, settings.vocabulary, step)
        tokens, targets = data[:, :-1].contiguous(), data[:, 1:].contiguous()
        loss = chunked_cross_entropy(model(tokens), targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        turns.every(settings.steps, step, loss=loss.item())


if __name__ == "__main__":
    main()
