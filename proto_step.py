"""Stage 1: what makes the packed step fast on CUDA. python proto_step.py [--device cpu --model tiny] [--seconds 90]"""
import argparse, cProfile, io, pstats, sys, time, traceback, warnings
from pathlib import Path
ROOT = Path.cwd(); sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
START = time.time()
import torch
p = argparse.ArgumentParser(); p.add_argument("--device", default="cuda"); p.add_argument("--model", default="Llama-3.2-1B")
p.add_argument("--seconds", type=float, default=90); p.add_argument("only", nargs="*"); o = p.parse_args()
dev = torch.device(o.device); gpu = dev.type == "cuda"
import harness, bench_training_step as T
from napo.language_models.fused.lora import without_adapter
from napo.language_models.fused.self_attention import fuse_attentions
from napo.scoring import pack, scorer as S, attention as A
from napo.scoring.graphs import BodyGraphs
from napo_kernels import napo_loss
from napo_kernels.ops import body as body_ops
from transformers import AttentionInterface
harness.device = dev
B, P, N, L = (8, 200, 8, 7) if gpu else (2, 12, 3, 7)
sync = torch.cuda.synchronize if gpu else lambda: None
step = T.Step(o.model, torch.bfloat16, {P}, L); sc, lm = step.scorer, step.scorer.causal_lm; inner = lm.base_model
users = T.make_users(B, P, L, N, T.MODELS[o.model]["v"])
trained = [q for q in step.model.parameters() if q.requires_grad]
g = torch.Generator().manual_seed(1)
with torch.no_grad():
    for n, q in step.model.named_parameters():
        if "lora_B" in n: q.copy_((torch.randn(q.shape, generator=g) * 0.01).to(q))
packed = pack(*users, pad_id=0); print("rows", tuple(packed.input_ids.shape), "errors", step.errors, f"setup {time.time()-START:.1f} s", flush=True)
if gpu: flush = torch.empty(1 << 28, dtype=torch.uint8, device=dev)
def ms(f, n=7):
    if not gpu: t = time.perf_counter(); f(); return 1e3 * (time.perf_counter() - t)
    f(); f(); out = []
    for _ in range(n):
        flush.zero_(); a, b = torch.cuda.Event(True), torch.cuda.Event(True); a.record(); f(); b.record(); b.synchronize(); out.append(a.elapsed_time(b))
    return min(out)
def device_ms(f):
    if not gpu: f(); return 0.0, 0, []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as pr: f(); sync()
    e = [x for x in pr.events() if str(x.device_type).endswith("CUDA")]; top = {}
    for x in e:
        n, t = top.get(x.name[:90], (0, 0.0)); top[x.name[:90]] = (n + 1, t + x.device_time / 1e3)
    return sum(t for _, t in top.values()), len(e), sorted(top.items(), key=lambda i: -i[1][1])[:14]
def logps_and_grads():
    step.optimizer.zero_grad(); lp = sc(packed); v = lp.view(B, -1); napo_loss(v[:, 0], v[:, 1:], margin=1.0).backward()
    r = lp.detach().double().clone(), torch.cat([q.grad.double().flatten() for q in trained]); step.optimizer.zero_grad(); return r
truth = None
def go(label, run=None, check=True, top=False):
    """One line a variant; never lets an error through."""
    global truth
    if o.only and not any(x in label for x in o.only): return
    if time.time() - START > o.seconds: print(f"{label}: no time left"); return
    try:
        run = run or (lambda: step.packed(users, sc))
        t = time.perf_counter(); state = [q.detach().clone() for q in trained]
        logps_and_grads() ; sync(); first = time.perf_counter() - t
        got = [logps_and_grads() for _ in range(3)][-1] if check else None  # graphs begin at the second
        if check and truth is None: truth = got
        e = [float((x - y).norm() / y.norm()) for x, y in zip(got, truth)] if check else []
        if gpu: torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if gpu else 0
        wall = ms(run); sync(); t0, c0 = time.perf_counter(), time.process_time(); run(); host, cpu = 1e3 * (time.perf_counter() - t0), 1e3 * (time.process_time() - c0); sync()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if gpu else 0.0
        busy, kernels, names = device_ms(run)
        with torch.no_grad():
            for q, s in zip(trained, state): q.copy_(s)
        print(f"{label}: first {first:.1f} s, wall {wall:.1f} ms, host {host:.1f} (cpu {cpu:.1f}), device {busy:.1f} in {kernels} kernels, peak {peak:.1f} GiB" + ("; differs: log-probs %.1e, gradients %.1e" % tuple(e) if e else ""), flush=True)
        if top:
            for nm, (c, x) in names: print(f"     {x:8.3f} ms {c:5d} x {nm}")
    except Exception as e:
        print(f"{label}: FAILED {type(e).__name__}: {str(e)[:600]}", flush=True); print("".join(traceback.format_exc().splitlines(True)[-9:]))

def host_parts():
    """(a) without waiting for the device: what the host is busy with."""
    reps, parts = 5, {}
    def at(name, t): parts[name] = parts.get(name, 0.0) + 1e3 * (time.perf_counter() - t) / reps
    for r in range(reps + 2):
        if r == 2: parts.clear()
        sync(); t = time.perf_counter(); b = pack(*users, pad_id=0); at("pack", t)
        t = time.perf_counter(); b = b.to(dev); at("to device", t)
        t = time.perf_counter(); m = S.packed_masks(lm, b); at("masks", t)
        t = time.perf_counter(); h = S.run_body(lm, input_ids=b.input_ids, position_ids=b.position_ids, attention_mask=m); at("body forward", t)
        t = time.perf_counter(); rows = h.flatten(0, 1).index_select(0, b.predicting_rows); lp = sc._head(rows, b.pair_rows, b.targets, b.sequence_ids, b.num_sequences).view(B, -1); at("head", t)
        t = time.perf_counter(); loss = napo_loss(lp[:, 0], lp[:, 1:], margin=1.0); at("loss", t)
        t = time.perf_counter(); step.optimizer.zero_grad(); at("zero_grad", t)
        t = time.perf_counter(); loss.backward(); at("backward", t)
        t = time.perf_counter(); step.optimizer.step(); at("optimizer", t)
        with torch.no_grad():
            t = time.perf_counter()
            c = step.model.disable_adapter(); c.__enter__(); at("disable_adapter enter", t)
            t = time.perf_counter(); sc(b); at("reference pass", t)
            t = time.perf_counter(); c.__exit__(None, None, None); at("disable_adapter exit", t)
    print("host ms: " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items()), flush=True)
def profile(label, run):
    run(); pr = cProfile.Profile(); pr.enable(); run(); pr.disable(); sync(); s = io.StringIO(); pstats.Stats(pr, stream=s).sort_stats("tottime").print_stats(25)
    print(label + "\n" + "\n".join(x[:150] for x in s.getvalue().splitlines()[2:] if x.strip()), flush=True)

own_serves = body_ops.serves
def before():  # the step as it was: no kernels of ours in the body on a GPU
    body_ops.serves = lambda *t: t[0].is_cpu and own_serves(*t)
def after(): body_ops.serves = own_serves
if not o.only or "host" in o.only:
    before(); host_parts(); profile("one step", lambda: step.packed(users, sc)); profile("one step with reference", lambda: step.packed(users, sc, reference=True))
own_multiple = S.width_multiple; S.width_multiple = lambda d: 1
before(); go("fused layers as before, eager"); after()
go("(b1) + Triton norm and silu product, eager")
fused_attention = fuse_attentions(step.model)
go("(b2) + Triton rotation, eager", top=True)

# attention variants, each on top of b2
own_mask = A.attention_mask
def additive(batch, window, implementation, dtype):  # the additive mask once a step, not once a layer
    m = A.visible(batch, window).unsqueeze(1); return torch.zeros(m.shape, dtype=dtype, device=m.device).masked_fill_(~m, float("-inf"))
def gqa(module, q, k, v, attention_mask, dropout=0.0, scaling=None, **kw):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=scaling, enable_gqa=True).transpose(1, 2), None
def in_attention(mask=None, function=None, backend=None, label="", **kw):
    from torch.nn.attention import sdpa_kernel
    own = AttentionInterface().get("sdpa")
    try:
        if mask: S.attention_mask = mask
        if function: AttentionInterface.register("sdpa", function)
        if backend is None: go(label, **kw)
        else:
            with sdpa_kernel(backend): go(label, **kw)
    finally:
        S.attention_mask = own_mask; AttentionInterface.register("sdpa", own)
if gpu and (not o.only or "attention" in o.only):
    from torch.nn.attention import SDPBackend
    in_attention(additive, label="(b3) + additive mask once")
    in_attention(additive, gqa, label="(b4) + enable_gqa", top=True)
    in_attention(additive, gqa, SDPBackend.CUDNN_ATTENTION, label="(b5) gqa, cuDNN only")
    in_attention(None, gqa, SDPBackend.CUDNN_ATTENTION, label="(b5b) gqa, cuDNN only, bool mask")
    in_attention(additive, None, SDPBackend.EFFICIENT_ATTENTION, label="(b6) efficient attention, padded mask")
    # cost of a new length, forward and backward, cuDNN and efficient
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("efficient", SDPBackend.EFFICIENT_ATTENTION)):
        from torch.nn.attention import sdpa_kernel
        try:
            out = []
            for width in ((320, 328) if name == 'cuDNN' else (320, 328, 384)):
                q, k, v = (torch.randn(8, 32, width, 64, device=dev, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
                m = torch.zeros(8, 1, width, width, device=dev, dtype=torch.bfloat16)
                def f():
                    with sdpa_kernel(backend): return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=m)
                sync(); t = time.perf_counter(); y = f(); sync(); a = time.perf_counter() - t; t = time.perf_counter(); y.sum().backward(); sync(); b = time.perf_counter() - t
                out.append(f"{width}: {1e3*a:.0f} + {1e3*b:.0f} ms, again {ms(lambda: torch.autograd.grad(f().sum(), (q, k, v)), 3):.2f}")
            print(f"new lengths, {name}: " + "; ".join(out), flush=True)
        except Exception as e: print(f"new lengths, {name}: FAILED {str(e)[:300]}")

# graphs of our own capture, padded to a width of 64
def with_graphs():
    sc._body = BodyGraphs(lm, sc._eager_body)
def no_graphs(): sc._body = sc._eager_body
def eager_wide(): S.width_multiple = own_multiple
eager_wide(); go("(b2) at a width of 64 n, eager"); no_graphs()
warnings.simplefilter("always")
with_graphs(); go("(e) own CUDA graphs over b2", top=True); no_graphs()
with_graphs(); in_attention(additive, gqa, label="(e2) own CUDA graphs over b4", top=True); no_graphs()
go("(b2) with reference, PEFT's disable_adapter", lambda: step.packed(users, sc, reference=True))
peft_off = step.model.disable_adapter; step.model.disable_adapter = lambda: without_adapter(step.model)
go("(b2) with reference, our switch", lambda: step.packed(users, sc, reference=True))
with_graphs(); go("(e3) own graphs, with reference, our switch", lambda: step.packed(users, sc, reference=True)); no_graphs()
if gpu and (not o.only or "e4" in o.only):  # torch's own graphed callables over each decoder layer
    try:
        own = [l.forward for l in inner.layers]; b = packed.to(dev).widened(64); m = S.packed_masks(lm, b)
        with torch.no_grad(): emb = inner.embed_tokens(b.input_ids); cos, sin = inner.rotary_emb(emb, b.position_ids)
        class Layer(torch.nn.Module):
            def __init__(s, l): super().__init__(); s.l = l
            def forward(s, x, mask, c, n): return s.l(x, attention_mask=mask, position_embeddings=(c, n), use_cache=False)
        t = time.perf_counter(); mods = [Layer(l) for l in inner.layers]
        made = torch.cuda.make_graphed_callables(tuple(mods), tuple((emb.clone().requires_grad_(i > 0), m, cos, sin) for i in range(len(mods))), allow_unused_input=True)
        for l, f in zip(inner.layers, made): l.forward = lambda x, attention_mask=None, position_embeddings=None, f=f, **kw: f(x, attention_mask, *position_embeddings)
        print(f"make_graphed_callables of layers: {time.perf_counter()-t:.1f} s"); eager_wide(); go("(e4) make_graphed_callables, layer by layer")
    except Exception as e: print(f"(e4) FAILED {type(e).__name__}: {str(e)[:400]}")
    finally:
        for l in inner.layers: vars(l).pop("forward", None)
        no_graphs()
def compiled(label, mode=None, regional=True):
    """torch.compile of layers; fused attention off, so that the compiler sees transformers' own rotation."""
    if o.only and not any(x in label for x in o.only): return
    if not o.only and (not regional or time.time() - START > o.seconds - 30): print(f"{label}: not run, ask for it by name"); return
    attn = [(m, vars(m).pop("forward")) for m in step.model.modules() if type(m).__name__.endswith("Attention") and "forward" in vars(m)]
    own_body = inner.forward
    for name in ("recompile_limit", "cache_size_limit"): setattr(torch._dynamo.config, name, 64)
    try:
        torch._dynamo.reset()
        if regional:
            for l in inner.layers: l.forward = torch.compile(type(l).forward.__get__(l), dynamic=False, mode=mode)
        else: inner.forward = torch.compile(own_body, dynamic=False, mode=mode)
        o.only = []; o.seconds += 1000
        eager_wide(); go(label, top=True)
        if regional: with_graphs(); go("(e5) own graphs over " + label, top=True)
        print("compiled frames:", dict(torch._dynamo.utils.counters["stats"]), "breaks:", dict(torch._dynamo.utils.counters["graph_break"]))
    except Exception as e: print(f"{label}: FAILED {type(e).__name__}: {str(e)[:400]}")
    finally:
        for l in inner.layers: vars(l).pop("forward", None)
        inner.forward = own_body; vars(inner).pop("forward", None)
        for m, f in attn: m.forward = f
        no_graphs()
if gpu:
    compiled("(d) regional compile")
    compiled("(c) compile body, reduce-overhead", mode="reduce-overhead", regional=False)
print(f"all {time.time()-START:.0f} s")
