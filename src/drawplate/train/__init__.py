"""The one training loop, shared by pretraining, recovery after compression, and finetuning."""
