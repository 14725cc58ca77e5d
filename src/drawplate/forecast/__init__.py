"""What a run will take, told before it runs: memory, seconds and bytes on the disk."""

from drawplate.forecast.machine import peak_memory

__all__ = ["peak_memory"]
