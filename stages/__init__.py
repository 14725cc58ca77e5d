"""The six stages: typed functions that DVC, Prefect and the command line call alike."""
