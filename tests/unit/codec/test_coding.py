"""Codecs: any block arrives, lossless to the bit, lossy within its bound, in no more bytes than are announced."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dinfer.codec import lossless
from dinfer.codec.choice import ABOUT, DTYPES, NONE, BlockSize, Codec, CodecError
from dinfer.codec.coding import as_received, decode, encode, size_of

DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SPECIAL = [0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e-45, 1e-38, 3e38, -3e38, 65504.0]

codecs = st.builds(Codec, st.sampled_from(list(ABOUT)), st.sampled_from(list(ABOUT)))
sizes = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 70))


def fits(codec: Codec, dtype: str) -> bool:
    return all(DTYPES.get(name, dtype) == dtype for name in codec)


def block_of(size: tuple[int, int, int], dtype: str, seed: int, special: list[float]) -> Tensor:
    tokens, heads, dim = size
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(tokens, 2, heads, dim, generator=generator).mul_(10.0 ** (seed % 9 - 4))
    flat = block.view(-1)
    for n, value in enumerate(special):
        flat[(seed + 7 * n) % flat.numel()] = value
    return block.to(DTYPE[dtype])


def bits(block: Tensor) -> Tensor:
    return block.contiguous().view(-1).view(torch.uint8)


@given(
    codecs,
    sizes,
    st.sampled_from(list(DTYPE)),
    st.integers(0, 999),
    st.lists(st.sampled_from(SPECIAL), max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_any_block_arrives(
    codec: Codec, size: tuple[int, int, int], dtype: str, seed: int, special: list[float]
) -> None:
    if not fits(codec, dtype):
        with pytest.raises(CodecError, match=r"codec \w+ is for KV in"):
            codec.check(dtype)
        return
    codec.check(dtype)
    block = block_of(size, dtype, seed, special)
    data = encode(codec, block)
    assert data.dtype == torch.uint8
    largest = codec.largest(size_of(block))
    assert data.numel() <= largest
    assert data.numel() == largest or not codec.is_sized
    out = torch.full_like(block, 7.0)
    decode(codec, data, out)
    for n, name in enumerate(codec):
        sent, came = block[:, n].float(), out[:, n].float()
        if name in ("none", "lossless"):
            assert torch.equal(bits(block[:, n]), bits(out[:, n]))
            continue
        if name == "bf16":
            assert torch.equal(sent.to(torch.bfloat16).float().nan_to_num(), came.nan_to_num())
            continue
        shared = _shared(name, sent)
        broken = ~shared.isfinite().all(-1, keepdim=True).expand_as(shared)
        broken = broken.flatten(2)[..., : size[2]]
        assert came[broken].isnan().all()  # what is not a number never arrives as one
        assert came[~broken].isfinite().all()
        most = shared.abs().amax(-1, keepdim=True).expand_as(shared).flatten(2)[..., : size[2]]
        step = {"int8": 1 / 127, "int4": 1 / 7, "fp8": 1 / 8}[name]
        allowed = (0.51 if name != "fp8" else 0.52) * step * most + 2e-38 + 0.01 * sent.abs()
        assert ((came - sent).abs() <= allowed)[~broken].all()


def _shared(name: str, values: Tensor) -> Tensor:
    """The values that share a scale, along the last dimension."""
    if name != "int4":
        return values.unsqueeze(2)
    filled = torch.nn.functional.pad(values, (0, -values.shape[-1] % 32))
    return filled.reshape(*filled.shape[:-1], -1, 32)


@given(st.binary(min_size=1, max_size=600).filter(lambda data: len(data) % 2 == 0))
@settings(max_examples=300, deadline=None)
def test_lossless_keeps_every_bit_of_any_bytes(data: bytes) -> None:
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8).numpy()
    coded = lossless.encode(values)
    assert len(coded) <= len(values) + 1
    assert lossless.decode(coded, len(values) // 2).tobytes() == data


def test_lossless_makes_values_of_a_model_smaller() -> None:
    block = torch.randn(128, 2, 4, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    data = encode(Codec.of("lossless"), block)
    assert block.nbytes / data.numel() > 1.35
    assert torch.equal(bits(as_received(Codec.of("lossless"), block)), bits(block))


def test_lossless_of_all_exponents_is_one_byte_more() -> None:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.uint8).numpy()
    coded = lossless.encode(values)
    assert len(coded) == len(values) + 1
    assert lossless.decode(coded, 1 << 16).tobytes() == values.tobytes()


@given(codecs, st.integers(0, 99), st.integers(0, 10_000), st.integers(0, 7), st.integers(-3, 3))
@settings(max_examples=200, deadline=None)
def test_damaged_bytes_decode_to_something_or_are_refused(
    codec: Codec, seed: int, at: int, bit: int, more: int
) -> None:
    dtype = next(one for one in DTYPE if fits(codec, one)) if any(fits(codec, one) for one in DTYPE) else ""
    if not dtype or codec.is_none:
        return
    block = block_of((3, 2, 40), dtype, seed, [])
    data = encode(codec, block).clone()
    data[at % data.numel()] ^= 1 << bit
    data = data[: data.numel() + more] if more < 0 else torch.nn.functional.pad(data, (0, more))
    try:
        decode(codec, data, torch.empty_like(block))
    except CodecError:
        return
    assert more == 0 or not codec.is_sized


@given(st.sampled_from(["fp8", "int8", "int4", "bf16"]), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_what_a_lossy_codec_makes_does_not_depend_on_the_chunks(name: str, cut: int) -> None:
    block, codec = block_of((10, 2, 48), "float32", 3, [float("nan")]), Codec.of(name)
    parts = torch.cat([as_received(codec, block[:cut]), as_received(codec, block[cut:])])
    assert torch.equal(bits(parts), bits(as_received(codec, block)))


@pytest.mark.parametrize("text", ["int8", "none", "k=int8,v=fp8", "k=int4,v=none"])
def test_a_codec_reads_what_it_writes(text: str) -> None:
    codec = Codec.of(text)
    assert str(codec) == text
    assert Codec.numbered(codec.number) == codec


def test_one_of_k_and_v_may_be_left_out_and_both_alike_is_one_name() -> None:
    assert Codec.of("v=int8") == ("none", "int8")
    assert str(Codec.of("k=int8, v=int8")) == "int8"
    assert Codec.of("k=none").is_none


@pytest.mark.parametrize(
    "text", ["", "int9", "k=int9", "k=int8,v", "q=int8", "k=int8,k=int8,w=int8", "int8,fp8"]
)
def test_an_unknown_codec_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(CodecError, match="none, lossless, bf16, fp8, int8, int4"):
        Codec.of(text)


def test_what_is_lossy_and_what_has_a_size() -> None:
    assert not Codec.of("lossless").is_lossy
    assert not Codec.of("lossless").is_sized
    assert Codec.of("k=lossless,v=int8").is_lossy
    assert NONE.is_sized
    size = BlockSize(128, 8, 128, "bfloat16")
    assert size.nbytes / Codec.of("int8").typical(size) == pytest.approx(1.97, abs=0.01)
    assert size.nbytes / Codec.of("int4").typical(size) == pytest.approx(3.55, abs=0.01)
    assert 1.3 < size.nbytes / Codec.of("lossless").typical(size) < 1.4
