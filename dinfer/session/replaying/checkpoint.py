"""The checkpoint that a replay needs: the same one, in the same dtype, or a message that says what differs."""

import torch

from dinfer.model.checkpoint import check
from dinfer.model.decoder import Decoder
from dinfer.model.errors import ModelError
from dinfer.model.fingerprint import fingerprint
from dinfer.session.replaying.recorded import Recorded, RecordError


def decoder_of(
    recorded: Recorded, model_path: str = "", device: str = "", given: Decoder | None = None
) -> Decoder:
    """The recorded run's checkpoint, loaded here, unless it is `given`. Raises RecordError."""
    path = str(given.spec.path) if given else model_path or recorded.config.model_path
    try:
        found = fingerprint(check(path))
    except ModelError as error:
        raise RecordError(
            f"the run's checkpoint cannot be read here: {error} Give replay(…, model_path=…) where it lies."
        ) from error
    if found != recorded.checkpoint:
        raise RecordError(
            f"{path} is another checkpoint than the run's: its fingerprint is {found[:16]}…, the run's "
            f"{recorded.checkpoint[:16]}…. Give replay(…, model_path=…) the same one."
        )
    decoder = given or Decoder.load(path, recorded.dtype, device or _device_like(recorded.device))
    dtype = str(decoder.dtype).removeprefix("torch.")
    if dtype != recorded.dtype:
        raise RecordError(
            f"the run computed in {recorded.dtype}, but the weights that were given are {dtype}: leave decoder out, "
            "and they are loaded as the run's were."
        )
    return decoder


def _device_like(recorded: str) -> str:
    return "cuda:0" if recorded.startswith("cuda") and torch.cuda.is_available() else "cpu"
