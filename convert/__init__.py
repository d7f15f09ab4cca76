"""Hugging Face folders and GGUF files to our tree and back."""

from configs import check_siblings

check_siblings()
