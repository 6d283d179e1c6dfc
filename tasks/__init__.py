"""Prefect tasks, one stage each: call one `grace_core.stages` function, track it in MLflow."""
