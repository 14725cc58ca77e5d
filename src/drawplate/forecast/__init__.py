"""What a run will take, told before it runs: memory, seconds and bytes on the disk."""
