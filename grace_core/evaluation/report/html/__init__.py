"""The report as a page: whatever came from data, models or paths is escaped where it enters."""
