"""drawplate: text in, a small, fast, evaluated reasoning language model out.

Importing the package teaches transformers to load what any stage wrote.
"""

from drawplate.core.hf import load, load_tokenizer

__all__ = ["load", "load_tokenizer"]
