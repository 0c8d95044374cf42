"""Automation: when rounds run: jobs, sensors, schedules."""
