"""What two gloo ranks do in `test_distributed.py`, and the one-rank runs that they must equal."""

import warnings
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from once import once
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from resdiag.models.resnet import build_model
from resdiag.watch.loop import ranks as distributed
from resdiag.watch.loop.attach import attach

STEPS, BATCH = 2, 8
MODELS = ("elu_pre", "relu_nobn", "vit")
SPLITS = {"even": (4, 4), "uneven": (5, 3), "one": (8,), "three": (4, 1, 3)}
PATIENCE = timedelta(minutes=10)
"""For a rank that others wait for, on a machine that does much else."""


def make_model(name, seed=3):
    """A float64 model: rounding is then far below any mistake."""
    torch.manual_seed(seed)
    if name == "vit":
        from torchvision.models.vision_transformer import VisionTransformer

        model = VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=10)
        nn.init.normal_(model.heads.head.weight)  # zeros would stop every gradient at step 0
        return model.double()
    return build_model(name, 8, width=0.5, seed=seed).double()


def make_batch(step, samples=BATCH):
    """The global batch of a step; samples differ in scale, or ranks would be too much alike."""
    generator = torch.Generator().manual_seed(11 + step)
    images = torch.randn(samples, 3, 16, 16, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.5, 2, samples, dtype=torch.float64)
    labels = torch.randint(10, (samples,), generator=generator)
    return images * scale.view(-1, 1, 1, 1), labels


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(model, loss, *, watched=None, steps=STEPS, monitored=True, **options):
    """Some steps of `loss(step)`; the frames, the notes and the weights."""
    optimizer = make_optimizer(model)
    options = {"samples": None, **options}
    monitor = attach(watched or model, optimizer=optimizer, **options) if monitored else None
    for step in range(steps):
        optimizer.zero_grad()
        loss(step)
        optimizer.step()
        if monitor is not None:
            monitor.step()
    out = {"weights": {name: whole(p.detach()) for name, p in model.named_parameters()}}
    if monitor is not None:
        out |= {
            "frame": monitor.to_frame(),
            "curve": monitor.to_frame("step"),
            "notes": monitor.warnings,
            "blocks": [block.to_dict() for block in monitor.blocks],
            "unavailable": monitor.unavailable,
        }
        monitor.close()
    return out


def one_rank(name, sizes=(BATCH,), parts=1, order=None, **options):
    """The run of one process whose loss is the mean of the ranks' losses."""
    model = make_model(name)

    def loss(step):
        for part in range(parts):
            images, labels = make_batch(step * parts + part)
            if order is not None:
                images, labels = images[order], labels[order]
            losses = F.cross_entropy(model(images), labels, reduction="none")
            mean = torch.stack([piece.mean() for piece in losses.split(sizes)]).mean()
            (mean / parts).backward()

    return train(model, loss, **options)


def mesh_of(shape=(2,)):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])


def shard(model, mesh=None, **policy):
    from torch.distributed.fsdp import fully_shard

    for module in list(model.modules()):
        if type(module).__name__ in ("Block", "EncoderBlock"):
            fully_shard(module, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def many_ranks(
    rank,
    name,
    kind,
    *,
    split="even",
    parts=1,
    inner=False,
    shape=None,
    before=None,
    compiled=False,
    **options,
):
    """The same by several ranks: `kind` is "ddp" or "fsdp"."""
    model = make_model(name)
    if kind == "fsdp":
        called = model = shard(model, mesh_of(shape or (2,)))
    elif compiled:
        torch._dynamo.reset()
        counters.clear()
        called = DistributedDataParallel(torch.compile(model, backend="aot_eager", fullgraph=True))
        options["example_inputs"] = (make_batch(0)[0].split(SPLITS[split])[rank],)
    else:
        called = DistributedDataParallel(model)
    watched = model if inner or compiled else called

    def loss(step):
        for part in range(parts):
            images, labels = (t.split(SPLITS[split])[rank] for t in make_batch(step * parts + part))
            last = part == parts - 1
            with nullcontext() if last else called.no_sync():
                (F.cross_entropy(called(images), labels) / parts).backward()

    out = train(model, loss, watched=watched, **options)
    if compiled:
        out["graphs"] = counters["stats"]["unique_graphs"]
        out["breaks"] = dict(counters["graph_break"])
    return out


# -- cases that are no comparison with one rank --------------------------------------------------


def absent(rank):
    """Rank 1 leaves out step 1; the training itself goes on, so the others do not wait for it."""
    model, batch = make_model("elu_pre"), make_batch(0)
    ddp = DistributedDataParallel(model)
    monitor = attach(ddp, samples=None)
    for step in range(3):
        with monitor.paused() if rank == 1 and step == 1 else nullcontext():
            F.cross_entropy(ddp(batch[0]), batch[1]).backward()
        monitor.step()
        ddp.zero_grad()
    frame = monitor.to_frame()
    monitor.close()
    return {"frame": frame, "notes": monitor.warnings}


def unreduced(rank):
    """Gradients read under no_sync(): what each rank has is its own."""
    ddp = DistributedDataParallel(make_model("elu_pre"))
    images, labels = (t.split(BATCH // 2)[rank] for t in make_batch(0))
    monitor = attach(ddp, samples=None)
    with ddp.no_sync():
        F.cross_entropy(ddp(images), labels).backward()
        monitor.step()
    frame, curve = monitor.to_frame(), monitor.to_frame("step")
    monitor.close()
    return {"frame": frame, "curve": curve, "notes": monitor.warnings}


def _stopped(model, images, labels, **options):
    """One step; what stopped the watching."""
    monitor = attach(model, **options)
    F.cross_entropy(model(images), labels).backward()
    monitor.step()
    rows = monitor.to_frame().drop(columns=["step", "block", "point"])
    monitor.close()
    return {"notes": monitor.warnings, "all NaN": bool(rows.isna().all(axis=None))}


def strangers(rank):
    """Models that are trained apart, in the same process group."""
    return _stopped(make_model("elu_pre", seed=rank), *make_batch(0))


def stages(rank):
    """Ranks with different blocks."""
    torch.manual_seed(0)
    return _stopped(build_model("elu_pre", (8, 14)[rank]).double(), *make_batch(0))


def late(rank):
    """Rank 1 never comes."""
    distributed.TIMEOUT = timedelta(seconds=3)
    ddp = DistributedDataParallel(make_model("elu_pre"))
    optimizer = make_optimizer(ddp)
    dist.barrier()  # attaching too waits for the other rank no longer than that
    monitor = attach(ddp, optimizer=optimizer)
    distributed.TIMEOUT = timedelta(minutes=5)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(ddp(make_batch(0)[0]), make_batch(0)[1]).backward()
        optimizer.step()
        if rank == 0:
            monitor.step()
    monitor.close()
    weight = float(sum(p.detach().sum() for p in ddp.parameters()))
    return {"notes": monitor.warnings, "weight": weight}


def lonely(rank):
    """Only rank 0 attaches. Last of all: process groups are numbered, and now differently."""
    if rank == 1:
        return {}
    distributed.TIMEOUT = timedelta(seconds=1)
    try:
        attach(make_model("elu_pre"))
    except ValueError as error:
        return {"error": str(error)}
    return {}


def joined(rank):
    ddp = DistributedDataParallel(make_model("elu_pre"))
    monitor = attach(ddp)
    with ddp.join():
        F.cross_entropy(ddp(make_batch(0)[0]), make_batch(0)[1]).backward()
        monitor.step()
    monitor.close()
    return {"notes": monitor.warnings}


def points(rank):
    """Gradients of shards read at a second point, and at one named to `attach`."""
    out = {}
    for point in (None, "pre_clip"):
        model = shard(make_model("elu_pre"), mesh_of())
        images, labels = (t.split(BATCH // 2)[rank] for t in make_batch(0))
        optimizer = make_optimizer(model)
        monitor = attach(model, optimizer=optimizer, samples=None, grad_read_point=point)
        F.cross_entropy(model(images), labels).backward()
        monitor.read_gradients("pre_clip")
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        monitor.step()
        out[point] = {"frame": monitor.to_frame(), "notes": monitor.warnings}
        monitor.close()
    return out


def refused(rank):
    """Messages of what is refused at once."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    def message(call, *args, **kwargs):
        try:
            call(*args, **kwargs)
        except (ValueError, RuntimeError) as error:
            return str(error)
        return ""

    mesh = mesh_of()
    split = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flat = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    monitor = attach(make_model("elu_pre"))
    out = {
        "tensor parallel": message(
            attach, parallelize_module(split, mesh, {"0": ColwiseParallel()})
        ),
        "FSDP1": message(attach, flat),
        "local shards": message(attach, shard(make_model("elu_pre"), mesh), reduce=False),
        "demand": message(monitor.force_record),
    }
    monitor.close()
    return out


def collectives(rank):
    """How many sums two recorded steps of six take, and the process groups left behind."""
    from torch.distributed.distributed_c10d import _world

    calls, before = [], len(_world.pg_map)
    real = dist.all_reduce

    def counted(vector, **kwargs):
        calls.append(vector.numel())
        return real(vector, **kwargs)

    dist.all_reduce = counted
    try:
        many_ranks(rank, "elu_pre", "ddp", steps=6, every=5)
    finally:
        dist.all_reduce = real
    return {"calls": calls, "left": len(_world.pg_map) - before}


def own(rank):
    """With BatchNorm: the joint record and each rank's own of one training."""
    out = {}
    for variant in ("original", "elu_after", "elu"):
        options = {"steps": 1, "samples": None}
        out[variant] = many_ranks(rank, variant, "ddp", **options)
        out[variant, "own"] = many_ranks(rank, variant, "ddp", reduce=False, **options)
    return out


def mixed(rank):
    """Shards whose passes run in bfloat16; watched and not."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def run(**options):
        model = shard(make_model("elu_pre").float(), mesh_of(), mp_policy=policy)

        def loss(step):
            images, labels = (t.split(BATCH // 2)[rank] for t in make_batch(step))
            F.cross_entropy(model(images.float()).float(), labels).backward()

        return train(model, loss, **options)

    return {"watched": run(), "plain": run(monitored=False)}


def broken(rank):
    """One NaN in rank 1's images."""
    ddp = DistributedDataParallel(make_model("elu_pre"))
    images, labels = (t.split(BATCH // 2)[rank].clone() for t in make_batch(0))
    if rank == 1:
        images[0, 0, 0, 0] = torch.nan
    monitor = attach(ddp, samples=None)
    F.cross_entropy(ddp(images), labels).backward()
    monitor.step()
    frame = monitor.to_frame()
    monitor.close()
    return {"frame": frame, "notes": monitor.warnings}


CASES = {
    **{
        (name, "compiled", metrics): (
            many_ranks,
            name,
            "ddp",
            {"compiled": True, "metrics": metrics, "moment_samples": 16},
        )
        for name, metrics in (("elu_pre", "core"), ("relu_nobn", "full"))
    },
    **{(name, kind): (many_ranks, name, kind, {}) for name in MODELS for kind in ("ddp", "fsdp")},
    ("vit", "ddp", "inner"): (many_ranks, "vit", "ddp", {"inner": True}),
    ("elu_pre", "ddp", "uneven"): (many_ranks, "elu_pre", "ddp", {"split": "uneven"}),
    ("relu_nobn", "fsdp", "uneven"): (many_ranks, "relu_nobn", "fsdp", {"split": "uneven"}),
    ("relu_nobn", "ddp", "parts"): (many_ranks, "relu_nobn", "ddp", {"parts": 2}),
    ("elu_pre", "fsdp", "copies"): (many_ranks, "elu_pre", "fsdp", {"shape": (2, 1)}),
    ("relu_nobn", "ddp", "samples"): (many_ranks, "relu_nobn", "ddp", {"samples": 2}),
    ("elu_pre", "ddp", "unwatched"): (many_ranks, "elu_pre", "ddp", {"monitored": False}),
    ("vit", "fsdp", "unwatched"): (many_ranks, "vit", "fsdp", {"monitored": False}),
    **{case.__name__: (case,) for case in (absent, unreduced, strangers, stages, joined, refused)},
    **{case.__name__: (case,) for case in (collectives, own, mixed, broken, points, late, lonely)},
}


THREE = {
    ("elu_pre", "ddp", "three"): (many_ranks, "elu_pre", "ddp", {"split": "three"}),
    ("elu_pre", "ddp", "parts"): (many_ranks, "elu_pre", "ddp", {"split": "three", "parts": 2}),
    ("vit", "fsdp", "three"): (many_ranks, "vit", "fsdp", {"split": "three", "shape": (3,)}),
}
"""What three ranks do, each with another number of samples."""


def main(rank, folder):
    """Run every case of this rank; results go to a file per rank and number of ranks."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for size, cases in ((3, THREE), (2, CASES)):
        if rank >= size:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store{size}",
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
        )
        results = {}
        for key, (case, *rest) in cases.items():
            options = rest.pop() if rest else {}
            results[key] = case(rank, *rest, **options)
        torch.save(results, f"{folder}/{size}-{rank}.pt")
        dist.destroy_process_group()


def run(tmp_path_factory):
    """Start the ranks, once for all workers: by number of ranks, each rank's results by case."""
    folder = once(tmp_path_factory, "ranks", _start)

    def load(size, rank):
        path = folder / f"{size}-{rank}.pt"
        return torch.load(path, weights_only=False)  # noqa: TID251 - our own

    return {size: [load(size, rank) for rank in range(size)] for size in (2, 3)}


def _start(folder):
    # a server that has imported PyTorch forks the ranks
    torch.multiprocessing.set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(
        main, args=(str(folder),), nprocs=3, start_method="forkserver"
    )
