"""What a model is worth: held-out loss, solved problems, cost, and the difference to its parent."""
