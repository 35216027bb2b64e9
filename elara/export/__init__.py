"""Out of the framework: GGUF for llama.cpp and Ollama, one compact file for elara.py, a folder for the hub."""

from elara.export.config import ExportConfig

__all__ = ["ExportConfig"]
