"""Plain tensors in and out of Hugging Face folders."""
