"""Monitoring of a run: metrics, health, stragglers, hung ranks, stop requests, sample grids."""
