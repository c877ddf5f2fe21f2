"""Training throughput beside transformers + PEFT and the roof of the matrix unit.

    python -m bench.train [MODEL_DIR] [--cases full quarter mixed ...] [--rounds 3] [--json FILE]

A step is forward, backward, clipping and AdamW. Tokens a second count real tokens, never padding. The other side trains
the same adapter on the same tokens in one padded batch, as a data collator makes it, in the same process, in turn.
"""

from collections.abc import Sequence
from functools import partial

from bench.harness import ours, program, work
from bench.harness.measure import alternate, ratios, scaled, seconds
from bench.harness.program import Bench, Case

RANK = 32


def compare(
    bench: Bench,
    case: str,
    lengths: Sequence[int],
    *,
    rank: int = RANK,
    supervised: float = 1.0,
    ratio_target: float | None = None,
    roof_target: float | None = None,
    autocast_adapter: bool = True,
) -> None:
    """Steps on random sequences of these lengths, both sides and the roof in alternation."""
    ids = work.sequences(lengths, bench.vocab_size)
    data = [work.datum(s, supervised) for s in ids]
    peft = bench.peft(rank, autocast_adapter=autocast_adapter)
    batch = peft.batch(ids, supervised)
    run = bench.fresh_run("train", rank)
    num_tokens = sum(lengths)
    values = alternate(
        {
            "roof": bench.roof.gflops,
            "ours": lambda: num_tokens / seconds(lambda: ours.train_step(bench.engine, run, data)),
            "theirs": lambda: num_tokens / seconds(lambda: peft.step(batch)),
        },
        bench.rounds,
    )
    bench.engine.remove_run(run)
    add = bench.report.add
    add(case, "selfloop", "tokens/s", values["ours"])
    add(case, "transformers + PEFT", "tokens/s", values["theirs"])
    add(case, "ratio", "x", ratios(values["ours"], values["theirs"]), at_least=ratio_target)
    needed = scaled(values["ours"], bench.cost.train_gflop(supervised))
    add(case, "of the arithmetic roof", "%", scaled(ratios(needed, values["roof"]), 100), at_least=roof_target)
    if len(set(lengths)) > 1:
        padding = 1 - num_tokens / (len(lengths) * max(lengths))
        add(case, "padding of the other side", "%", 100 * padding)


def full(bench: Bench) -> None:
    lengths = [bench.size(256)] * 8
    compare(bench, "8 x 256, all supervised, rank 32", lengths, ratio_target=1.5, roof_target=60)


def quarter(bench: Bench) -> None:
    lengths = [bench.size(256)] * 8
    compare(bench, "8 x 256, the last quarter supervised, rank 32", lengths, supervised=0.25, ratio_target=1.8)


def low_precision(bench: Bench) -> None:
    """Beside PEFT with the adapter and its moments in the model's dtype, where small updates are lost to rounding."""
    case = "4 x 256, all supervised, rank 32, PEFT's adapter in the model's dtype"
    compare(bench, case, [bench.size(256)] * 4, autocast_adapter=False)


def mixed(bench: Bench) -> None:
    """Lengths as they are in conversations: their logarithms evenly spread."""
    lengths = work.long_tailed_lengths(8, 16, bench.size(512, 20))
    compare(bench, "8 sequences of 16 to 512, long-tailed, rank 32", lengths, ratio_target=3.0)


def mixed_even(bench: Bench) -> None:
    lengths = work.even_lengths(8, 16, bench.size(512, 20))
    compare(bench, "8 sequences of 16 to 512, evenly spread, rank 32", lengths, ratio_target=3.0)


def shapes(bench: Bench) -> None:
    for num, length in ((1, 64), (2, 64), (4, 128), (1, 1024), (32, 64)):
        compare(bench, f"{num} x {length}, all supervised, rank 32", [bench.size(length)] * num)


def ranks(bench: Bench) -> None:
    for rank in (8, 128):
        compare(bench, f"4 x 256, all supervised, rank {rank}", [bench.size(256)] * 4, rank=rank)


def custom(bench: Bench) -> None:
    """A loss of the client's own: two calls, of which the second only needs the backward if the first is kept."""
    length = bench.size(256)
    data = [work.datum(s) for s in work.sequences([length] * 8, bench.vocab_size)]
    run, other = bench.fresh_run("custom", RANK), bench.fresh_run("custom-other", RANK)
    num_tokens = 8 * length

    def once(forward_run: str) -> float:
        steps = partial(ours.custom_loss, bench.engine, data, forward_run=forward_run, backward_run=run)
        return num_tokens / seconds(steps)

    values = alternate({"kept": lambda: once(run), "anew": lambda: once(other)}, bench.rounds)
    bench.engine.remove_run(run)
    bench.engine.remove_run(other)
    case, add = f"custom loss on 8 x {length}, rank {RANK}", bench.report.add
    add(case, "forward kept for its backward", "tokens/s", values["kept"])
    add(case, "forward computed twice", "tokens/s", values["anew"])
    add(case, "ratio", "x", ratios(values["kept"], values["anew"]))


CASES: dict[str, Case] = {
    "full": full,
    "quarter": quarter,
    "mixed": mixed,
    "mixed-even": mixed_even,
    "low-precision": low_precision,
    "shapes": shapes,
    "ranks": ranks,
    "custom": custom,
}


def main(arguments: Sequence[str] | None = None) -> None:
    program.run("train", __doc__, CASES, arguments)


if __name__ == "__main__":
    main()
