"""Runs inside other people's processes: records their torch.distributed ops into files, and reads these again.

It imports torch (2.4 or newer) and the standard library, runs on Python 3.10 and newer, and imports only its own
modules, by relative imports: the same source also works as the top-level package `dinfer_probe`, from a zip.
Start with `records`, the form of the files.
"""
