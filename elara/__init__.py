"""Elara: a language model of experts, recursion and diffusion drafting, and the framework that trains it."""
