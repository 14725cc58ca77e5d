"""The six stages: typed functions that DVC, Prefect and the command line call alike."""

STAGES = {
    "prepare": "Text and reasoning problems -> tokens, tokenizer, task sets.",
    "pretrain": "Corpus -> a decoder trained from scratch, or `adopt: FOLDER`.",
    "compress": "A model -> fewer stored bytes by factors or sparsity, then recovery.",
    "quantize": "A model -> packed codes of 2, 3, 4 or 8 bits.",
    "finetune": "A model -> one that reasons better and shorter, by reinforcement learning.",
    "evaluate": "Models -> figures, paired verdicts and a report page.",
}
"""What each makes of what, in the order in which a model goes through them."""
