"""What all stages share: methods, artifacts, models, statistics, corpora."""
