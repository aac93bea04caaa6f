"""The weights that a rank is replayed with: the recorded run's checkpoint, as it lies here."""

import torch

from dinfer.errors import ModelError, excerpt
from dinfer.model.checkpoint import check
from dinfer.model.decoder import Decoder
from dinfer.saved.replay.record import RankRecord, RecordError


def decoder_of(
    recorded: RankRecord, model_path: str = "", device: str = "", given: Decoder | None = None
) -> Decoder:
    """The recorded run's checkpoint, loaded here unless it is `given`. Raises RecordError."""
    path = str(given.spec.path) if given else model_path or recorded.config.model_path
    try:
        found = given.spec.fingerprint if given else check(path).fingerprint
    except ModelError as error:
        raise RecordError(
            f"the run's checkpoint cannot be read here: {error} Give model_path=… where it lies."
        ) from error
    if found != recorded.checkpoint:
        raise RecordError(
            f"{path} is another checkpoint than the run's: its fingerprint is {found[:16]}…, the run's "
            f"{recorded.checkpoint[:16]}…. Give model_path=… the same one."
        )
    like = "cuda:0" if recorded.device.startswith("cuda") and torch.cuda.is_available() else "cpu"
    try:
        torch.device(device or like)
    except RuntimeError:
        raise RecordError(
            f"device is {excerpt(device)}; it must be one of PyTorch's: cpu, cuda:0, …"
        ) from None
    decoder = given or Decoder.load(path, recorded.dtype, device or like)
    dtype = str(decoder.dtype).removeprefix("torch.")
    if dtype != recorded.dtype:
        raise RecordError(
            f"the run computed in {recorded.dtype}, but the weights that were given are {dtype}: leave decoder out, "
            "and they are loaded as the run's were."
        )
    return decoder
