"""`dinfer bench gpu`: one rank on one GPU beside transformers, which runs the same weights in the same process.

Variants are timed in turn, round after round, so that what changes with time changes all of them alike.
"""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from dinfer.bench.prefill import BenchModel
from dinfer.config import Config, ConfigError
from dinfer.display import Table

NEW_TOKENS = 64

STEPS = 40
"""of one layer, by hand"""


QWEN3_4B = BenchModel(
    hidden_size=2560, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate_size=9728, vocab_size=151936
)  # fmt: skip
"""the shape of the random bfloat16 model that is timed by default"""

POSITIONS = 40960
"""of that model"""


def bench_gpu(
    model: str,
    tokens: int,
    chunk_size: int,
    repeats: int,
    say: Callable[[str], None],
    *,
    growth: bool = False,
) -> dict[str, Any]:
    """All figures; times in seconds. `model`: a checkpoint's folder, "" for random weights of Qwen3-4B's shape.

    Raises ConfigError without a GPU, and ModelError.
    """
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "bench gpu needs a CUDA device, and torch finds none here; `dinfer doctor` says why."
        )
    bench = _Bench(_decoder(model), tokens, chunk_size)
    try:
        result = bench.run(repeats, say)
        result["growth"] = bench.growth(say) if growth else []
    finally:
        bench.close()
    return result


class _Bench:
    def __init__(self, decoder: Any, tokens: int, chunk_size: int) -> None:
        import torch

        from dinfer.engine.kernels import Kernels
        from dinfer.transport.gloo import open_store
        from dinfer.transport.interface import LOOPBACK
        from dinfer.transport.nccl import NcclComm

        self.torch, self.decoder, self.chunk_size = torch, decoder, chunk_size
        self.ids = [(i * i * 7 + i * 13 + 5) % decoder.vocab_size for i in range(tokens)]
        self.comm = NcclComm(0, 1, open_store(LOOPBACK, 0)[0], 60)
        self.kernels = Kernels()
        self._engine: Any = None

    def close(self) -> None:
        if self._engine is not None:
            self._engine.release()
        self.comm.close()

    def run(self, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
        torch = self.torch
        capture: dict[str, float] = {}
        variants: dict[str, Callable[[], float]] = {
            "transformers, whole": lambda: self._transformers(len(self.ids)),
            "transformers, in chunks": lambda: self._transformers(self.chunk_size),
            "exact": lambda: self.prefill("exact"),
            "graph": lambda: self.prefill("graph"),
            "compiled": lambda: self.prefill("compiled"),
            "compiled, no digests": lambda: self.prefill("compiled", digests=False),
            "compiled, a condition elsewhere": lambda: self.prefill("compiled", condition=True),
        }
        for mode in ("graph", "compiled"):
            began = perf_counter()
            if self.engine(mode).graphs is None:
                raise ConfigError(f"kernels={mode} cannot run this model here; the log says why.")
            capture[mode] = perf_counter() - began
            say(f"{mode}: captured in {capture[mode]:.1f} s")
        prefill = _in_turn(variants, repeats)
        say("prefill is timed")
        decode = _in_turn(
            {
                "transformers": self._generate,
                "exact": lambda: self.decode("exact"),
                "graph": lambda: self.decode("graph"),
                "compiled": lambda: self.decode("compiled"),
            },
            repeats,
        )
        say("decode is timed")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.prefill("compiled")
        step, layer = self._steps()
        spec = self.decoder.spec
        kv = (
            (len(self.ids) + NEW_TOKENS)
            * spec.layers
            * 2
            * spec.kv_heads
            * spec.head_dim
            * self.decoder.dtype.itemsize
        )
        medians = {name: median(took) for name, took in prefill.items()}
        rates = {name: (NEW_TOKENS - 1) / median(took) for name, took in decode.items()}
        return {
            "gpu": torch.cuda.get_device_name(),
            "torch": str(torch.__version__),
            "model": f"{spec.model_type}, {spec.layers} layers, hidden {spec.hidden_size}",
            "tokens": len(self.ids),
            "chunk_size": self.chunk_size,
            "repeats": repeats,
            "capture_s": capture,
            "prefill_s": prefill,
            "prefill_medians_s": medians,
            "decode_s": decode,
            "decode_tokens_per_s": rates,
            "digests_share": medians["compiled"] / medians["compiled, no digests"] - 1,
            "condition_share": medians["compiled, a condition elsewhere"] / medians["compiled"] - 1,
            "step_s": step,
            "layer_s": layer,
            "memory": {
                "peak": torch.cuda.max_memory_allocated(),
                "weights": sum(weight.nbytes for weight in self.decoder.model.parameters()),
                "kv": kv,
                "graphs": self.kernels.nbytes,
            },
        }

    def growth(self, say: Callable[[str], None]) -> list[dict[str, Any]]:
        """Prefill with compiled kernels for more tokens, and for other chunks."""
        rows = []
        most = min(32768, self.decoder.max_positions)
        cases = [(tokens, self.chunk_size) for tokens in (512, 2048, 8192, 32768) if tokens <= most]
        cases += [(len(self.ids), size) for size in (32, 64, 256, 512, 1024)]
        for tokens, size in cases:
            self.ids = [(i * i * 7 + i * 13 + 5) % self.decoder.vocab_size for i in range(tokens)]
            self.chunk_size = size
            took = [self.prefill("compiled") for _ in range(4)][1:]
            rows.append({"tokens": tokens, "chunk_size": size, "seconds": median(took)})
            say(f"{tokens:,} tokens by {size}: {median(took) * 1e3:.0f} ms")
        return rows

    def engine(self, kernels: str, *, digests: bool = True) -> Any:
        from dinfer.engine.engine import Engine

        config = Config.of(
            {
                "world_size": 1, "gpu_ids": (0,), "backend": "nccl", "kernels": kernels, "digests": digests,
                "chunk_size": self.chunk_size, "max_new_tokens": NEW_TOKENS, "prompt_ids": (0,),
            }
        )  # fmt: skip
        if self._engine is not None:
            self._engine.release()
        gc.collect()
        graphs = self.kernels.prepare(self.decoder, config)
        self._engine = Engine(self.decoder, self.comm, config, graphs=graphs)
        return self._engine

    def prefill(self, kernels: str, *, digests: bool = True, condition: bool = False) -> float:
        from dinfer.plan.breakpoints import Breakpoint

        engine = self.engine(kernels, digests=digests)
        engine.prepare(self.ids)
        if condition:
            one = Breakpoint(1, layer=0, chunk=0, condition="absmax", bound=float("inf"))
            engine.prompt.conditions.arm([one])
        return self._timed(lambda: engine.prefill_phase())

    def decode(self, kernels: str) -> float:
        """The seconds of all new tokens but the first."""
        engine = self.engine(kernels)
        engine.prefill_phase(self.ids)
        decoding = engine.decoding()
        decoding.step()
        return self._timed(lambda: list(decoding.run(NEW_TOKENS)))

    def _steps(self) -> tuple[float, float]:
        """The median seconds of a step of one layer by hand, and of that layer's graph alone."""
        engine = self.engine("compiled")
        engine.prepare(self.ids)
        engine.step("layer", 60)
        steps = [self._timed(lambda: engine.step("layer", 60)) for _ in range(STEPS)]
        graphs = engine.graphs.layers
        hidden = self.decoder.embed(self.ids[: self.chunk_size])
        graphs.begin(hidden.shape[1], 0)
        layers = [self._timed(lambda: graphs.run(0, hidden)) for _ in range(STEPS)]
        return median(steps), median(layers)

    def _transformers(self, chunk: int) -> float:
        from transformers import DynamicCache

        torch, model = self.torch, self.decoder.model
        ids = torch.tensor([self.ids], device=self.decoder.device)

        @torch.no_grad()  # type: ignore[untyped-decorator]
        def forward() -> None:
            cache = DynamicCache(config=model.config)
            for start in range(0, len(self.ids), chunk):
                model(ids[:, start : start + chunk], past_key_values=cache, logits_to_keep=1)

        return self._timed(forward)

    def _generate(self) -> float:
        """The same of transformers' greedy `generate`, after a prompt of the same length."""
        from transformers import DynamicCache

        torch, model = self.torch, self.decoder.model
        ids = torch.tensor([self.ids], device=self.decoder.device)
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
            torch.cuda.synchronize()
            first = self._timed(lambda: self._new_tokens(ids, cache, 1))
            cache.crop(ids.shape[1] - 1)
            return self._timed(lambda: self._new_tokens(ids, cache, NEW_TOKENS)) - first

    def _new_tokens(self, ids: Any, cache: Any, count: int) -> None:
        options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count}
        self.decoder.model.generate(ids, past_key_values=cache, pad_token_id=0, **options)

    def _timed(self, work: Callable[[], object]) -> float:
        self.torch.cuda.synchronize()
        began = perf_counter()
        work()
        self.torch.cuda.synchronize()
        return perf_counter() - began


def table(result: dict[str, Any]) -> str:
    chunked = result["prefill_medians_s"]["transformers, in chunks"]
    prefill = [
        [
            name,
            *(f"{value * 1e3:.1f}" for value in (median(took), min(took), max(took))),
            f"{chunked / median(took):.2f}",
        ]
        for name, took in result["prefill_s"].items()
    ]
    base = result["decode_tokens_per_s"]["transformers"]
    decode = [
        [name, f"{rate:.1f}", f"{rate / base:.2f}"] for name, rate in result["decode_tokens_per_s"].items()
    ]
    memory = {name: value / 2**30 for name, value in result["memory"].items()}
    lines = [
        f"{result['gpu']}, torch {result['torch']}; {result['model']}; {result['tokens']:,} tokens in chunks of "
        f"{result['chunk_size']}, one rank; medians of {result['repeats']}, in turn",
        str(Table(("prefill", "ms", "min", "max", "speed-up over transformers in chunks"), prefill)),
        str(Table(("decode", "tokens/s", "speed-up over transformers"), decode)),
        f"digests add {result['digests_share']:.1%}; a condition at another op adds {result['condition_share']:.1%}",
        f"a step of one layer by hand {result['step_s'] * 1e3:.2f} ms, its graph {result['layer_s'] * 1e3:.2f} ms",
        f"captured: {', '.join(f'{mode} {took:.1f} s' for mode, took in result['capture_s'].items())}",
        f"peak memory {memory['peak']:.2f} GiB; weights {memory['weights']:.2f}, KV {memory['kv']:.2f}, graphs "
        f"{memory['graphs']:.2f}",
    ]
    if result["growth"]:
        rows = [[f"{r['tokens']:,}", r["chunk_size"], f"{r['seconds'] * 1e3:.0f}"] for r in result["growth"]]
        lines.append(str(Table(("tokens", "chunk size", "prefill, ms"), rows)))
    return "\n".join(lines)


def _in_turn(variants: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """The seconds of each variant, round after round, after a round that is not counted."""
    rounds: Sequence[dict[str, float]] = [
        {name: run() for name, run in variants.items()} for _ in range(repeats + 1)
    ]
    return {name: [one[name] for one in rounds[1:]] for name in variants}


def _decoder(model: str) -> Any:
    """A decoder on the GPU: that of a checkpoint, or one of random weights."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from dinfer.model.checkpoint import Spec
    from dinfer.model.decoder import Decoder

    if model:
        return Decoder.load(model, "bfloat16", "cuda")
    shape = QWEN3_4B
    config = Qwen3Config(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=POSITIONS, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.backends.cuda.enable_cudnn_sdp(False)
    with torch.device("cuda"):
        made: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    made = made.eval().requires_grad_(False)
    count = sum(weight.numel() for weight in made.parameters())
    spec = Spec(
        path=Path("random weights"), model_type="qwen3", layers=shape.layers, hidden_size=shape.hidden_size,
        heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim, vocab_size=shape.vocab_size,
        max_positions=POSITIONS, model_positions=POSITIONS, length_dependent=False, dtype="bfloat16",
        tokenizer=False, weight_bytes=2 * count, stored_dtype="bfloat16", parameters=count,
        intermediate_size=shape.intermediate_size, fingerprint="",
    )  # fmt: skip
    return Decoder(made, spec)
