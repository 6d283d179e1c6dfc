"""What operators use around the pipeline: set-up of Prefect, checks of the servers, lineage.

Knows Prefect and MLflow, and is used by the tasks; `grace_core` knows neither.
"""
