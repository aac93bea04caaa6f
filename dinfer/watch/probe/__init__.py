"""Runs inside other people's processes: records their torch.distributed ops into files, and reads these again.

It imports torch (2.4 or newer) and the standard library, runs on Python 3.10 and newer, and imports only its own
modules, by relative imports: the same source also works as the top-level package `dinfer_probe`, from a zip.
Whatever goes wrong here must not reach the user's code: each entry catches any Exception, says so in the records, and
leaves off what cannot go on.
Start with `records`, the form of the files.
"""
