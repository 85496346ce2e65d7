"""Bytes on disk: files of tensors, digests, publication, and the checks on what is not trusted."""
