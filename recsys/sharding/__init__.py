"""Placing the embedding tables on ranks: the plan and its execution."""
