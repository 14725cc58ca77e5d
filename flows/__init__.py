"""When and where: running the stages of dvc.yaml, from the command line or as Prefect tasks."""
