"""What the server costs, and how training and sampling share the machine: through HTTP and the official client.

    python -m bench.served [MODEL_DIR] [--cases train sample rollouts share latency] [--rounds 3] [--json FILE]

The in-process side is the engine in this program; the other is ``selfloop serve`` with the official client in a process
of its own, on the same model, tokens and seeds. Needs ``.venv-client`` (``make setup``).
"""

import functools
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.harness import ours, program, work
from bench.harness.measure import alternate, ratios, scaled, seconds, wall_clock
from bench.harness.peer import Peer, loops_client
from bench.harness.program import Bench, Case
from bench.harness.server import Server, add_model, peak_rss_bytes, serving

MODEL = "bench/model"
PROMPT, NEW_TOKENS, ROLLOUT_TOKENS, STREAMS = 16, 48, 256, 32
MIB = 2**20


@contextmanager
def served(bench: Bench, num_clients: int) -> Generator[tuple[Server, list[Peer]]]:
    """A server of the model, and clients with a run each; measured by the wall's clock."""
    with ExitStack() as stack:
        stack.enter_context(wall_clock())
        data_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="selfloop-bench-")))
        add_model(data_dir, bench.model_dir, MODEL)
        server = stack.enter_context(serving(data_dir, "--dtype", bench.engine.info.dtype))
        clients = [loops_client(server, MODEL) for _ in range(num_clients)]
        for client in clients:
            stack.callback(client.close)
        yield server, clients


def rate(answer: dict[str, Any]) -> float:
    return answer["num_tokens"] / answer["seconds"]


def beside_engine(bench: Bench, case: str, through: Callable[[], float], alone: Callable[[], float]) -> None:
    values = alternate({"through": through, "alone": alone}, bench.rounds)
    bench.report.add(case, "through the client", "tokens/s", values["through"])
    bench.report.add(case, "engine alone", "tokens/s", values["alone"])
    share = scaled(ratios(values["through"], values["alone"]), 100)
    bench.report.add(case, "of the engine alone", "%", share, at_least=95)


def train(bench: Bench) -> None:
    length = bench.size(256)
    sequences = work.sequences([length] * 8, bench.vocab_size)
    data, run, num_steps = [work.datum(s) for s in sequences], bench.fresh_run("served", 32), 2

    def steps() -> None:
        for _ in range(num_steps):
            ours.train_step(bench.engine, run, data)

    with served(bench, 1) as (_, (client,)):
        client.ask("batch", sequences=sequences)
        beside_engine(
            bench,
            f"training, 8 x {length}, rank 32, over HTTP",
            lambda: rate(client.ask("steps", num=num_steps)),
            lambda: num_steps * 8 * length / seconds(steps),
        )
    bench.engine.remove_run(run)


def sample(bench: Bench, new_tokens: int = NEW_TOKENS) -> None:
    num_new = bench.size(new_tokens, 4)
    prompts = [work.random_ids(PROMPT, bench.vocab_size, i) for i in range(STREAMS)]
    run = bench.fresh_run("served", 32)
    bench.engine.publish(run, "served")
    asked = ours.requests(prompts, num_new, adapters=["served"], use_end_tokens=True)

    def alone() -> float:
        sampled = ours.sample(bench.engine, asked)
        return sum(len(s.tokens) for sequences in sampled.sequences for s in sequences) / sampled.total_s

    with served(bench, 1) as (_, (client,)):
        beside_engine(
            bench,
            f"sampling, {STREAMS} x {num_new} tokens, over HTTP",
            lambda: rate(client.ask("sample", prompts=prompts, max_tokens=num_new, seconds=0)),
            alone,
        )
    bench.engine.drop_adapter("served")
    bench.engine.remove_run(run)


def share(bench: Bench) -> None:
    """One stream of samples and one training loop, each alone and then both at once."""
    window_s, num_new = (1.0 if bench.quick else 8.0), bench.size(32, 4)
    prompts = [work.random_ids(PROMPT, bench.vocab_size, 0)]
    with served(bench, 2) as (_, (trainer, streamer)):
        trainer.ask("batch", sequences=work.sequences([bench.size(128)] * 2, bench.vocab_size))

        def stream() -> None:
            streamer.send("sample", prompts=prompts, max_tokens=num_new, seconds=window_s)

        together: list[float] = []

        def both() -> float:
            """The stream's rate; the trainer's is kept aside."""
            trainer.send("train", seconds=window_s)
            stream()
            together.append(rate(trainer.answer()))
            return rate(streamer.answer())

        def stream_alone() -> float:
            stream()
            return rate(streamer.answer())

        values = alternate(
            {"train": lambda: rate(trainer.ask("train", seconds=window_s)), "stream": stream_alone, "both": both},
            bench.rounds,
        )
    trained = together[-bench.rounds :]
    case, add = "one sampling stream while another run trains", bench.report.add
    add(case, "stream alone", "tokens/s", values["stream"])
    add(case, "stream beside training", "tokens/s", values["both"])
    add(case, "of the stream alone", "%", scaled(ratios(values["both"], values["stream"]), 100), at_least=30)
    add(case, "training alone", "tokens/s", values["train"])
    add(case, "training beside the stream", "tokens/s", trained)
    add(case, "of the training alone", "%", scaled(ratios(trained, values["train"]), 100), at_least=30)


def latency(bench: Bench) -> None:
    """Round trips and starts; the memory that the server's processes take."""
    num = bench.rounds
    starts: list[float] = []
    for _ in range(num):
        with tempfile.TemporaryDirectory(prefix="selfloop-bench-") as folder:
            with serving(Path(folder)) as server:
                starts.append(server.start_s)
    with served(bench, 1) as (server, (client,)):
        idle = server.process.memory_info().rss
        client.ask("batch", sequences=work.sequences([bench.size(64)], bench.vocab_size))
        client.ask("first_token", num=1)
        empty = client.ask("empty", num=bench.size(50))["seconds"]
        first = client.ask("first_token", num=num)["seconds"]
        case, add = "the server's own times and memory", bench.report.add
        add(case, "launch to /healthz", "ms", scaled(starts, 1e3))
        add(case, "an operation that computes nothing", "ms", scaled(empty, 1e3))
        add(case, "save to the first token of it", "ms", scaled(first, 1e3))
        add(case, "gateway resident at the start", "MiB", idle / MIB)
        add(case, "gateway resident at its peak", "MiB", peak_rss_bytes(server.process) / MIB)
        add(case, "worker resident at its peak", "MiB", peak_rss_bytes(server.worker()) / MIB)


CASES: dict[str, Case] = {
    "train": train,
    "sample": sample,
    "rollouts": functools.partial(sample, new_tokens=ROLLOUT_TOKENS),
    "share": share,
    "latency": latency,
}


def main(arguments: Sequence[str] | None = None) -> None:
    program.run("served", __doc__, CASES, arguments)


if __name__ == "__main__":
    main()
