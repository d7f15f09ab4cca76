"""Plans: a recipe's step compiled for hardware that is not there, and what it needs.

targets -> abstract (a job of shapes) -> program (what the compiler made of it) -> costs (what that takes) -> report.
"""
