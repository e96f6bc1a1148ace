"""The whole training step beside the same step in plain PyTorch: seconds and memory, CPU, float32, one process.

    python bench/step.py TEACHER_DIR STUDENT_DIR [--rows 4 --length 126 --block 0 --remat dots --rounds 5]

The directories are those of bench/small_checkpoints.py: Gemma 3 270M teaches SmolLM2 135M. A step is the teacher's
forward pass, the student's forward and backward pass, alpha CE + (1 - alpha) tau^2 KL through W where both
tokenizations have a boundary, clipping, AdamW. First the memory of each form, at its peak while it steps and above what
the process held before it loaded the models, each in a process of its own. Then all in turns: their losses and gradient
norms are compared at every step, so the optimisers are too.

The PyTorch forms are what one would write with transformers: sdpa attention, no attention mask (rows are single
documents and causal), W as a sparse matrix, fused AdamW. "torch" takes all logits of both models, as `model(tokens)`
gives them; "torch, fewer logits" runs both heads only at the positions that are used, and frees what it can.
"stored scores" is our step with the teacher's 64 likeliest tokens read from the batch; its loss is another one.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from memory import give_back, peak_of, resident
from step_case import ALPHA, B1, B2, CLIP, DECAY, RATE, Case, arguments, make_case, make_ours
from timing import side_by_side
from transformers import AutoModelForCausalLM

from distil_jax.tokens.align import ROOT

STORED = 64  # tokens of the teacher at each position
Step = Callable[[], tuple[float, float]]  # one more step: (loss, gradient norm before clipping)


def ours(case: Case, block: int, remat: str, top_k: int = 0) -> Step:
    made = make_ours(case, block, remat, top_k)
    state = made.state

    def step():
        nonlocal state
        state, report = made.update(state, made.frozen, made.batch)
        return float(report["loss"]), float(report["gradient_norm"])

    return step


def plain_torch(case: Case, fewer: bool) -> Step:
    torch.set_num_threads(os.cpu_count())
    load = lambda folder: AutoModelForCausalLM.from_pretrained(  # noqa: E731
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    teacher, student = load(case.folders["teacher"]).eval().requires_grad_(False), load(case.folders["student"]).train()
    batch = {name: torch.tensor(np.asarray(rows), dtype=torch.int64) for name, rows in case.batch.items()}
    supervised_BxL = batch["student_weights"] > 0
    taught_BxL = supervised_BxL & (batch["role"] == ROOT)
    taught_n = taught_BxL[supervised_BxL]  # among the supervised tokens
    count = int(supervised_BxL.sum())
    row = torch.arange(len(taught_BxL))[:, None].expand(taught_BxL.shape)[taught_BxL]
    at = batch["teacher_position"][taught_BxL]
    scored = teacher.lm_head.weight.shape[0]  # Gemma 3's tokenizer has an image token that the text models leave out
    table = case.projection.table()
    teacher_ids, student_ids, weights, mapped = map(
        np.array, (table.teacher_ids, table.student_ids, table.weights, table.mapped)
    )
    kept = teacher_ids < scored
    W_VsxVt = torch.sparse_coo_tensor(
        np.stack([student_ids, teacher_ids])[:, kept],
        torch.tensor(weights[kept]),
        (case.projection.student_vocab, scored),
    ).to_sparse_csr()
    unmapped = torch.tensor(~np.pad(mapped[:scored], (0, max(0, scored - len(mapped)))))
    tau = case.temperature
    decayed, rest = [], []
    for parameter in student.parameters():
        (decayed if parameter.ndim >= 2 else rest).append(parameter)
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(B1, B2), eps=1e-8, fused=True)

    follows = batch["teacher_targets"][row, at][:, None]
    labels = batch["student_targets"][taught_BxL][:, None]

    def projected(q_NxVt):
        """Through W, but the mass of the token that follows goes to the student's that follows (kd.Taken)."""
        known = q_NxVt.gather(1, follows)
        p_NxVs = (W_VsxVt @ q_NxVt.scatter_(1, follows, 0.0).T).T
        return p_NxVs.scatter_add(1, labels, known)

    def all_logits():
        """The losses of the supervised tokens: cross-entropy, and KL at the taught ones. Whole logits of both."""
        with torch.no_grad():
            scores = teacher(batch["teacher_tokens"]).logits[row, at].masked_fill(unmapped, -torch.inf)
            p_NxVs = projected(torch.softmax(scores / tau, dim=1))
        logits = student(batch["student_tokens"]).logits
        ce_n = F.cross_entropy(logits[supervised_BxL], batch["student_targets"][supervised_BxL], reduction="none")
        return ce_n, F.kl_div(F.log_softmax(logits[taught_BxL] / tau, dim=1), p_NxVs, reduction="sum")

    def fewer_logits():
        with torch.no_grad():
            hidden = teacher.model(batch["teacher_tokens"]).last_hidden_state[row, at]
            scores_NxVt = F.linear(hidden, teacher.lm_head.weight)
            scores_NxVt[:, unmapped] = -torch.inf
            q_NxVt = torch.softmax(scores_NxVt.div_(tau), dim=1)
            del scores_NxVt
            p_NxVs = projected(q_NxVt)
            del q_NxVt
        states = student.model(batch["student_tokens"]).last_hidden_state[supervised_BxL]
        logits_nxVs = F.linear(states, student.lm_head.weight)
        log_s1 = F.log_softmax(logits_nxVs, dim=1)
        ce_n = F.nll_loss(log_s1, batch["student_targets"][supervised_BxL], reduction="none")
        log_s = (log_s1 if tau == 1 else F.log_softmax(logits_nxVs / tau, dim=1))[taught_n]
        return ce_n, F.kl_div(log_s, p_NxVs, reduction="sum")

    def step():
        ce_n, kl = fewer_logits() if fewer else all_logits()
        weight_n = torch.where(taught_n, ALPHA, 1.0)
        loss = ((weight_n * ce_n).sum() + (1 - ALPHA) * tau**2 * kl) / count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    return step


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--only", help="measure the memory of this form, here")
    args = parser.parse_args()
    case = make_case(args.teacher, args.student, rows=args.rows, length=args.length, temperature=args.temperature)
    forms = {
        "torch": lambda: plain_torch(case, fewer=False),
        "torch, fewer logits": lambda: plain_torch(case, fewer=True),
        "distil_jax": lambda: ours(case, args.block, args.remat),
        "stored scores": lambda: ours(case, args.block, args.remat, STORED),
    }
    if args.only:
        give_back()
        before = resident()
        peak, _ = peak_of(forms[args.only]())
        return print(f"{(peak - before) / 2**30:.2f} GiB at the peak, above {before / 2**30:.2f}")

    for name in forms:
        out = subprocess.run([sys.executable, *sys.argv, "--only", name], check=True, stdout=subprocess.PIPE, text=True)
        print(f"{name:20s} {out.stdout.splitlines()[-1]}", flush=True)
    tokens = {side: int((case.batch[f"{side}_segment_ids"] > 0).sum()) for side in case.tables}
    taught = int(((case.batch["role"] == ROOT) & (case.batch["student_weights"] > 0)).sum())
    print(f"{args.rows} x {args.length} positions, tokens {tokens}, taught {taught}")
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    steps = {name: make() for name, make in forms.items()}
    side_by_side(
        {name: lambda step=step, name=name: seen[name].append(step()) for name, step in steps.items()}, args.rounds
    )
    for name in ("torch, fewer logits", "distil_jax"):
        np.testing.assert_allclose(seen[name], seen["torch"], rtol=1e-3)
    print(
        f"loss and gradient norm agree over {args.rounds + 1} steps: first {seen['torch'][0]}, last {seen['torch'][-1]}"
    )


if __name__ == "__main__":
    main()
