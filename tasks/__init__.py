"""What each stage does: one folder a stage, in pipeline order; each folder's ``task.py`` is its Prefect face."""
